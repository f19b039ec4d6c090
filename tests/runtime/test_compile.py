"""Compilation: graphs counted, shapes declared, and models that do not compile said so in words."""

import re
import time

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.miniature.families import family
from fastdiff.runtime.compile import Compile, warmup


@pytest.fixture
def pipe():
    torch.set_num_threads(1)
    return family("flux")


def graphs(handle) -> tuple[int, int]:
    """How many graphs the report tells of, and how many of them were compiled again."""
    ((compiled, again),) = re.findall(r"(\d+) graph\(s\) compiled, (\d+) of them again", str(handle.report()))
    return int(compiled), int(again)


@pytest.mark.slow
def test_blocks_share_graphs_and_a_new_size_is_counted(pipe):
    with fastdiff.accelerate(pipe, Compile(backend="eager", shapes=((32, 32),), dynamic=False)) as handle:
        declared, again = graphs(handle)
        assert declared < 4  # blocks, of two kinds
        assert again == 0
        warmup(handle, [(32, 32)])
        assert graphs(handle) == (declared, 0)
        assert not handle.report().misses
        warmup(handle, [(48, 32)])
        assert graphs(handle)[1] > 0
        assert "add it to shapes" in str(handle.report())


def test_a_forward_that_breaks_the_graph_is_refused_with_torchs_reason(pipe):
    block = pipe.transformer.transformer_blocks[0]
    block.norm1.register_forward_pre_hook(lambda part, inputs: time.sleep(inputs[0].sum().item() * 0))
    with pytest.raises(fastdiff.Unsupported, match="does not compile into one graph"):
        fastdiff.accelerate(pipe, Compile(backend="eager", shapes=((32, 32),)))
    assert "forward" not in pipe.transformer.__dict__
    assert "forward" not in block.__dict__


def test_compiles_beneath_a_block_cache_and_not_around_hooks_inside_blocks(pipe):
    with fastdiff.accelerate(pipe, DiffusersCache()):
        assert Compile(backend="eager").supports(pipe)
    with fastdiff.accelerate(pipe, DiffusersCache(method="taylorseer")):
        assert "inside the transformer's blocks breaks graphs" in Compile(backend="eager").supports(pipe).reason


def test_what_cannot_be_compiled_is_refused(pipe):
    assert "opt-in" in Compile(on_cpu=False).supports(pipe).reason
    assert "no backend 'warp'" in Compile(backend="warp").supports(pipe).reason
    assert "names no repeated blocks" in Compile(scope="regional").supports(family("sd3")).reason
    pipe.transformer.compile(backend="eager")
    assert "compiled already" in Compile().supports(pipe).reason


@pytest.mark.slow
def test_inductor_computes_the_same_forward(pipe):
    denoiser, args, kwargs = capture(pipe, 32, 32)
    with torch.no_grad():
        plain = denoiser(*args, **kwargs)[0]
        with fastdiff.accelerate(pipe, Compile()):
            compiled = denoiser(*args, **kwargs)[0]
        assert (compiled - plain).norm() / plain.norm() < 1e-5
        assert torch.equal(denoiser(*args, **kwargs)[0], plain)
