"""A stream over a denoiser that `fastdiff.runtime` compiled keeps its calls at one shape without being told."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.miniature.families import family
from fastdiff.runtime.compile import Compile
from fastdiff_pipelines import Stream
from fastdiff_pipelines.denoiser import is_compiled


@pytest.mark.slow
def test_a_plan_that_compiles_makes_the_stream_pad():
    pipe = family("sdxl")
    frames = torch.rand(4, 3, 32, 32) * 2 - 1
    options: dict[str, Any] = dict(steps=2, strength=0.6, height=32, width=32)
    expected = [output.pixels for output in Stream(pipe, "red", **options).run(frames)]
    with fastdiff.accelerate(pipe, Compile(scope="whole", backend="eager")) as handle:
        assert is_compiled(pipe.unet)
        stream = Stream(pipe, "red", **options)
        stream.warmup()
        found = [output.pixels for output in stream.run(frames)]
        assert "1 graph(s) compiled, 0 of them again" in str(handle.report())
        report = stream.report()
    assert not is_compiled(pipe.unet)
    assert report.padded
    assert (report.shapes, report.recompiles) == (1, 0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
