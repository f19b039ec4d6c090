"""Tiles hold neighbours, and the denoiser's output does not change."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.attention.order import TokenOrder, tiled
from fastdiff.miniature.families import family


def test_consecutive_tokens_are_squares_and_every_token_is_there_once():
    ids = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(5), torch.arange(6), indexing="ij"), -1).view(-1, 3)
    order = tiled(ids.float(), 2)
    assert order.sort().values.tolist() == list(range(60))
    assert ids[order[:4]].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


@torch.no_grad()
def test_the_output_is_the_same_in_double_precision():
    pipe: Any = family("flux")
    pipe.transformer.double()
    denoiser, args, kwargs = capture(pipe, 64, 32)
    kwargs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    expected = denoiser(*args, **kwargs)[0]
    with fastdiff.accelerate(pipe, TokenOrder(2)) as handle:
        found = denoiser(*args, **kwargs)[0]
        assert handle.report().rows[0].accelerated == 1
    error = (found - expected).norm() / expected.norm()
    assert error <= 1e-12


@torch.no_grad()
def test_residuals_of_a_controlnet_leave_the_order_alone():
    pipe: Any = family("flux")
    denoiser, args, kwargs = capture(pipe, 32, 32)
    residuals = [torch.randn_like(denoiser.x_embedder(kwargs["hidden_states"]))]
    kwargs = {**kwargs, "controlnet_block_samples": residuals}
    expected = denoiser(*args, **kwargs)[0]
    with fastdiff.accelerate(pipe, TokenOrder(2)) as handle:
        assert torch.equal(denoiser(*args, **kwargs)[0], expected)
        assert "controlnet_block_samples" in str(handle.report())


def test_a_tile_of_one_is_refused():
    with pytest.raises(ValueError, match="tile=1"):
        TokenOrder(1)
