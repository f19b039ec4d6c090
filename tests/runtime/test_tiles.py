"""Tiles: every cell computed, as many calls as said, no seam where there is none in the network."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.miniature.families import family
from fastdiff.runtime.tiles import TiledInference, tile_starts
from fastdiff.sampling.interval import GuidanceInterval


class Net(torch.nn.Module):
    """A denoiser whose output is a known function of each cell, the text and the time."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.config = SimpleNamespace(sample_size=4, in_channels=3)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any = None, return_dict: bool = True) -> Any:
        self.seen.append(tuple(sample.shape))
        told = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1, 1, 1)
        return (torch.tanh(sample * self.scale) + told,)


class Pipe:
    """The least a pipeline must be."""

    def __init__(self):
        self.unet, self.scheduler = Net(), None

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def __call__(self) -> None:
        raise NotImplementedError


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("grid", "halo"), [("moving", 0), ("moving", 3), ("fixed", 3), ("overlapping", 3)])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (4, 11), (13, 7), (3, 12)])
def test_a_pointwise_network_gives_in_tiles_what_it_gives_whole(grid: str, halo: int, size: tuple[int, int]):
    pipe: Any = Pipe()
    x, told = _draw(2, 3, *size), torch.tensor([7.0, 7.0], dtype=torch.float64)
    expected = pipe.unet(x, told)[0]
    for time in (told, told[0], torch.tensor([3.0, 9.0], dtype=torch.float64)):
        expected = pipe.unet(x, time)[0]
        pipe.unet.seen.clear()
        with fastdiff.accelerate(pipe, TiledInference(4, grid, halo=halo)):
            found = pipe.unet(x, time)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if grid != "overlapping":
            assert len(pipe.unet.seen) == -(-size[0] // 4) * -(-size[1] // 4)
        sides = tuple(side if side <= 4 else 4 + 2 * halo * (grid == "moving") for side in size)
        assert {shape[-2:] for shape in pipe.unet.seen} == {sides}


def test_with_a_halo_a_network_that_looks_at_neighbours_leaves_no_border():
    """A convolution of radius 2, half the halo, gives what it gives on the whole, whose edges are joined."""
    pipe: Any = Pipe()
    weight = _draw(3, 3, 5, 5)

    def looks(sample: Any, timestep: Any, encoder_hidden_states: Any = None) -> Any:
        return (torch.nn.functional.conv2d(sample, weight, padding=2),)

    pipe.unet.forward = looks
    x = _draw(2, 3, 12, 16)
    joined = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="circular")
    expected = torch.nn.functional.conv2d(joined, weight)
    with fastdiff.accelerate(pipe, TiledInference(4, halo=4, halo_below=100)):
        near, far = pipe.unet(x, 99.0)[0], pipe.unet(x, 100.0)[0]
    torch.testing.assert_close(near, expected, rtol=1e-12, atol=1e-12)
    assert (far - expected).abs().max() > 0.1


def test_overlapping_tiles_take_more_calls():
    pipe: Any = Pipe()
    with fastdiff.accelerate(pipe, TiledInference(4, "overlapping")):
        pipe.unet(_draw(1, 3, 16, 16), 1.0)
    assert len(pipe.unet.seen) == 7 * 7


def test_a_latent_of_one_tile_passes_as_it_is():
    pipe: Any = Pipe()
    x = _draw(2, 3, 4, 4)
    with fastdiff.accelerate(pipe, TiledInference()) as handle:
        found = pipe.unet(x, 5.0)[0]
        row = handle.report().rows[0]
    assert torch.equal(found, pipe.unet(x, 5.0)[0])
    assert (row.seen, row.accelerated) == (1, 0)
    assert "fits one tile" in row.notes[0]


def test_the_grid_moves_with_the_timestep_and_only_with_it():
    pipe: Any = Pipe()
    edges: list[torch.Tensor] = []

    def edge(sample: Any, timestep: Any, encoder_hidden_states: Any = None) -> Any:
        border = torch.zeros_like(sample)
        border[..., 0, :] = border[..., 0] = 1
        return (border,)

    pipe.unet.forward = edge
    x = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
    for seed, told in ((0, 900.0), (0, 900.0), (0, 500.0), (1, 900.0)):
        with fastdiff.accelerate(pipe, TiledInference(4, seed=seed)):
            edges.append(pipe.unet(x, told)[0])
    assert torch.equal(edges[0], edges[1])
    assert not torch.equal(edges[0], edges[2])
    assert not torch.equal(edges[0], edges[3])
    # a stream's rows stand at different timesteps: each has the grid it would have alone
    with fastdiff.accelerate(pipe, TiledInference(4)):
        both = pipe.unet(x, torch.tensor([900.0, 500.0], dtype=torch.float64))[0]
    assert torch.equal(both[0], edges[0][0])
    assert torch.equal(both[1], edges[2][1])


def test_no_place_is_a_border_for_long():
    """Over many steps borders fall everywhere alike: each line of cells is one in 1 / 4 of the steps."""
    counts = torch.zeros(16)
    for told in range(1000):
        for start in tile_starts(TiledInference(), 4, 16, float(told), "rows"):
            counts[start] += 1
    assert counts.sum() == 4000
    assert (counts - 250).abs().max() < 5 * (1000 * 0.25 * 0.75) ** 0.5


def test_residuals_of_a_controlnet_are_refused():
    pipe: Any = family("sd")
    denoiser, args, kwargs = capture(pipe, 64, 64)
    refused = pytest.raises(fastdiff.Unsupported, match="mid_block_additional_residual")
    with fastdiff.accelerate(pipe, TiledInference(8)), torch.no_grad(), refused:
        denoiser(*args, **{**kwargs, "mid_block_additional_residual": torch.zeros(1)})


@pytest.mark.parametrize("wrong", [{"tile": -1}, {"tile": 1.5}, {"grid": "none"}, {"seed": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="TiledInference"):
        TiledInference(**wrong)


def test_it_says_where_it_cannot_act():
    verdict = TiledInference().supports(family("flux"))
    assert not verdict
    assert "tokens" in verdict.reason
    from fastdiff.attention.sparse import SparseAttention

    with pytest.raises(ValueError, match="another place"):
        fastdiff.Plan((SparseAttention(), TiledInference()))
    fastdiff.Plan((TiledInference(), GuidanceInterval()))
