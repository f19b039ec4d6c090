"""Slices: the same output, less memory the more there are, and norms that span slices keep whole statistics."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from torch import Tensor

import fastdiff
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks, Requests
from fastdiff.miniature.families import family
from fastdiff.runtime.memory import peak_bytes
from fastdiff.runtime.slicing import SlicedInference, _Sliced, whole_statistics

WIDTHS: dict[str, Any] = {"block_out_channels": (32, 32), "cross_attention_dim": 16, "norm_num_groups": 8}
FRAMES = 6


class Pipe:
    """As much of a pipeline as `accelerate` needs."""

    def __init__(self, unet: Any):
        self.unet = unet
        self.components = {"unet": unet}


def image_unet() -> tuple[Any, tuple]:
    made = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        layers_per_block=1,
        **WIDTHS,
    )
    return made, (torch.randn(6, 4, 32, 32), torch.full((6,), 500), torch.randn(6, 5, 16))


def motion_unet() -> tuple[Any, tuple]:
    made = UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=4,
        motion_num_attention_heads=4,
        layers_per_block=1,
        **WIDTHS,
    )
    return made, (torch.randn(1, 4, FRAMES, 16, 16), torch.tensor(500), torch.randn(FRAMES, 5, 16))


def temporal_unet() -> tuple[Any, tuple]:
    made = UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
        layers_per_block=1,
        **WIDTHS,
    )
    return made, (torch.randn(1, 4, FRAMES, 16, 16), torch.tensor(500), torch.randn(1, 5, 16))


MODELS = {"image": image_unet, "motion": motion_unet, "temporal": temporal_unet}


def filled(model: Any) -> Any:
    """Weights that are born zero, such as last temporal convolutions, would hide what is before them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.05, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_slices_give_the_same_in_less_memory(name: str):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    pipe = Pipe(filled(model))
    whole, before = peak_bytes(lambda: model(*inputs).sample)
    peaks = [before]
    for slices in (2, 3, 6):
        with fastdiff.accelerate(pipe, SlicedInference(slices)) as handle:
            found, peak = peak_bytes(lambda: model(*inputs).sample)
            assert handle.report().rows[0].accelerated == 1
        assert (found - whole).norm() / whole.norm() < 1e-5
        peaks.append(peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.8 * peaks[0]
    again, after = peak_bytes(lambda: model(*inputs).sample)
    assert torch.equal(again, whole)
    assert after == before


def test_double_precision_is_exact_to_its_own_rounding():
    torch.manual_seed(0)
    model, inputs = temporal_unet()
    pipe = Pipe(filled(model).double())
    given = [one.double() if one.is_floating_point() else one for one in inputs]
    with torch.no_grad():
        whole = model(*given).sample
        with fastdiff.accelerate(pipe, SlicedInference(5)):
            found = model(*given).sample
    assert (found - whole).norm() / whole.norm() < 1e-12


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_those_of_the_whole(affine: bool):
    norm = torch.nn.GroupNorm(4, 8, affine=affine).requires_grad_(False)
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 8, 3, 4, 5) * torch.linspace(1, 50, 4)[:, None] + 7
    scale, shift = whole_statistics(norm, x)
    torch.testing.assert_close(x * scale + shift, norm(x), rtol=1e-5, atol=1e-5)
    part = x[:, :, :, 1:2]
    torch.testing.assert_close(part * scale + shift, norm(x)[:, :, :, 1:2], rtol=1e-5, atol=1e-5)
    # the norm of a slice is something else, and taking it is the mistake this is about
    assert (norm(part) - norm(x)[:, :, :, 1:2]).abs().max() > 0.1


@pytest.mark.parametrize(("slices", "length", "sizes"), [(4, 10, [2, 3, 2, 3]), (4, 3, [1, 1, 1]), (2, 1, [1])])
def test_slices_cover_everything_evenly(slices: int, length: int, sizes: list[int]):
    sliced = _Sliced(slices, Hooks("SlicedInference", Requests()))
    pieces = sliced.pieces(length)
    assert [size for _, size in pieces] == sizes
    assert [start for start, _ in pieces] == [sum(sizes[:place]) for place in range(len(sizes))]
    assert sliced.engaged == (length > 1)


def test_what_cannot_be_sliced_is_refused():
    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (self.layer(sample),)

    with pytest.raises(fastdiff.Unsupported, match="that can be sliced"):
        fastdiff.accelerate(Pipe(Denoiser()), SlicedInference())
    with pytest.raises(ValueError, match="slices"):
        SlicedInference(1)


def test_feed_forwards_of_a_transformer_are_sliced_by_tokens():
    pipe: Any = family("flux")
    with fastdiff.accelerate(pipe, SlicedInference()) as handle:
        assert "FeedForward" in str(handle.report())
    assert anatomy(pipe).denoiser is pipe.transformer


def test_peak_bytes_counts_what_is_alive_at_once():
    x = torch.zeros(1000)

    def chain() -> Tensor:
        a = x + 1  # 4,000 bytes
        b = a + 1  # 8,000 alive
        del a
        c = b.view(10, 100)  # a view is nothing new
        return c + 1  # 8,000 again

    result, peak = peak_bytes(chain)
    assert result.shape == (10, 100)
    assert peak == 8000
    assert peak_bytes(lambda: x.view(10, 100))[1] == 0
