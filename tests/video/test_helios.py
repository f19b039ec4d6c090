"""Helios as a generator: the frames of the whole clip, one chunk at a time."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.acceleration import Unsupported
from fastdiff.miniature.video_families import inputs, video_family
from fastdiff.video.helios import chunks


def call(frames=15) -> dict[str, Any]:
    # whole timesteps, because diffusers' loop rounds them and its pipeline does not
    given = inputs("helios", frames) | {"num_inference_steps": 2, "sigmas": np.array([0.9, 0.4]), "guidance_scale": 3.0}
    return given | {"generator": torch.Generator().manual_seed(0)}


def generator_call() -> dict[str, Any]:
    return {name: value for name, value in call().items() if name != "num_frames"}


def test_chunks_are_the_clip():
    pipe = video_family("helios")
    whole = pipe(**call(), output_type="pt").frames
    made = torch.cat(list(chunks(pipe, 3, **generator_call())), dim=2).permute(0, 2, 1, 3, 4)
    assert made.shape[1] == 15
    torch.testing.assert_close((made / 2 + 0.5).clamp(0, 1)[:, : whole.shape[1]], whole, atol=1e-5, rtol=0)


def test_there_is_no_end_and_the_history_does_not_grow(monkeypatch):
    from fastdiff.video import helios

    states = []
    real = helios.helios_loop

    def kept(pipe, given):
        states.append(real(pipe, given))
        return states[-1]

    monkeypatch.setattr(helios, "helios_loop", kept)
    stream = chunks(video_family("helios"), None, **generator_call())
    sizes = []
    for frames in itertools.islice(stream, 6):
        assert frames.shape == (1, 3, 5, 32, 32)
        sizes.append(states[0][2].history_latents.shape[2])
    assert set(sizes) == {7}


def test_two_streams_do_not_mix():
    pipe = video_family("helios")
    alone = list(chunks(pipe, 2, **generator_call()))
    pairs = zip(chunks(pipe, 2, **generator_call()), chunks(pipe, 2, **generator_call()), strict=True)
    for (one, two), expected in zip(pairs, alone, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(two, expected)


@pytest.mark.parametrize("name", ["promt", "num_frames", "output_type", "callback_on_step_end"])
def test_inputs_that_would_be_ignored_are_refused(name):
    with pytest.raises(TypeError, match=name):
        next(chunks(video_family("helios"), 1, **generator_call() | {name: None}))


def test_other_pipelines_are_refused():
    with pytest.raises(Unsupported, match="no Helios"):
        next(chunks(video_family("wan"), 1))
