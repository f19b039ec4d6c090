"""Tiles hold neighbours, and the denoiser's output does not change."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.attention.grid import latent_grid, raster, tiled, token_grid
from fastdiff.attention.order import TokenOrder
from fastdiff.attention.plug import Call, Plug
from fastdiff.attention.selection import places
from fastdiff.hooks import Hooks, Requests
from fastdiff.miniature.families import family
from tests.attention.tiny import tiny


def test_consecutive_tokens_are_squares_and_every_token_is_there_once():
    ids = raster((2, 5, 6))
    order = tiled(ids, 2)
    assert order.sort().values.tolist() == list(range(60))
    assert ids[order[:4]].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    cubes = tiled(ids, 2, frames=2)
    assert cubes.sort().values.tolist() == list(range(60))
    assert ids[cubes[:8]].amax(0).tolist() == [1, 1, 1]


def test_grids_are_found_at_every_level():
    assert token_grid((1, 32, 32), 256) == (1, 16, 16)
    assert token_grid((4, 9, 5), 4 * 5 * 3) == (4, 5, 3)
    assert token_grid((5, 8, 8), 3 * 64) == (3, 8, 8)
    assert token_grid((1, 8, 8), 20) is None
    assert token_grid((1, 8, 8), 20, words=True) == (1, 4, 4)
    video = torch.zeros(1, 3, 16, 8, 9)
    assert latent_grid({"hidden_states": video}, 16) == (3, 8, 9)
    assert latent_grid({"hidden_states": video}, 3) == (16, 8, 9)
    assert latent_grid({"hidden_states": torch.zeros(1, 64, 8), "num_frames": 1, "height": 8, "width": 8}, 8) == (
        1,
        8,
        8,
    )
    assert latent_grid({"sample": torch.zeros(1, 64, 8)}, 8) is None


def _double(values: dict[Any, Any]) -> dict[Any, Any]:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
@torch.no_grad()
def test_the_output_of_a_pipeline_s_denoiser_is_the_same_in_double_precision(name: str):
    pipe: Any = family(name)
    (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).double()
    denoiser, args, kwargs = capture(pipe, 64, 32)
    args, kwargs = tuple(_double(dict(enumerate(args))).values()), _double(kwargs)
    if kwargs.get("added_cond_kwargs"):
        kwargs["added_cond_kwargs"] = _double(kwargs["added_cond_kwargs"])
    expected = denoiser(*args, **kwargs)[0]
    with fastdiff.accelerate(pipe, TokenOrder(2)) as handle:
        found = denoiser(*args, **kwargs)[0]
        assert handle.report().rows[0].accelerated == 1, str(handle.report())
    assert (found - expected).norm() / expected.norm() <= 1e-12
    assert torch.equal(denoiser(*args, **kwargs)[0], expected)


class _Pipe:
    """As much of a pipeline as an acceleration looks at."""

    def __init__(self, transformer: Any):
        self.components = {"transformer": transformer}

    def __call__(self) -> None:
        """Not called here."""


@pytest.mark.parametrize("name", ["hunyuan-video", "wan", "cogvideox", "ltx", "mochi"])
@torch.no_grad()
def test_video_in_cubes_gives_the_same_output(name: str):
    torch.manual_seed(0)
    model, inputs = tiny(name)
    model.eval()
    expected = model(**inputs, return_dict=False)[0]
    hooks, pipe = Hooks("test", Requests()), _Pipe(model)
    one = TokenOrder(2, frames=2)
    assert one.supports(pipe)
    seen: list[torch.Tensor] = []

    def attend(call: Call) -> None:
        where, words = places(call)
        seen.append(where[~words])

    plug = Hooks("plug", hooks.requests)
    Plug(plug, model, attend, 1)
    one.apply(pipe, hooks)
    found = model(**inputs, return_dict=False)[0]
    assert hooks.counter.accelerated == 1, hooks.counter.misses
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # selections by place are told of the order
    assert any(len(where) >= 8 and where[:8].amax(0).tolist() == [1, 1, 1] for where in seen)
    hooks.undo()
    plug.undo()
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)


@torch.no_grad()
def test_what_is_added_between_blocks_leaves_the_order_alone():
    for name, argument in (("flux", "controlnet_block_samples"), ("sd3", "block_controlnet_hidden_states")):
        pipe: Any = family(name)
        denoiser, args, kwargs = capture(pipe, 32, 32)
        shape = denoiser.x_embedder(kwargs["hidden_states"]) if name == "flux" else torch.zeros(1, 16, 32)
        kwargs = {**kwargs, argument: [torch.randn_like(shape)]}
        expected = denoiser(*args, **kwargs)[0]
        with fastdiff.accelerate(pipe, TokenOrder(2)) as handle:
            assert torch.equal(denoiser(*args, **kwargs)[0], expected)
            assert argument in str(handle.report())


def test_blocks_that_convolve_are_refused():
    import diffusers

    kind: Any = diffusers.SanaTransformer2DModel
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    verdict = TokenOrder().supports(_Pipe(model))
    assert not verdict
    assert "cannot be reordered" in verdict.reason or "no transformer blocks" in verdict.reason


def test_a_tile_of_one_is_refused():
    with pytest.raises(ValueError, match="tile=1"):
        TokenOrder(1)
    with pytest.raises(ValueError, match="frames=0"):
        TokenOrder(frames=0)
