"""Strips and the arithmetic on them, against the same layer on the whole picture."""

import itertools

import pytest
import torch
from torch import nn

from fastdiff.parallel import layers
from fastdiff.parallel.strips import Kernel, Strips

CUTS = {"even": (0, 8, 16, 24, 32), "uneven": (0, 4, 20, 24, 32), "two": (0, 24, 32), "odd": (0, 8, 16, 27)}


def _assemble(x: torch.Tensor, strips: Strips, needs: list[tuple[int, int]], rank: int) -> tuple[torch.Tensor, int]:
    """What a rank would hold after the exchange: its rows, and those it was sent."""
    _, receives = strips.transfers(needs, rank)
    ranges = sorted([strips.own(rank), *receives.values()])
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    return torch.cat([x[..., low:high, :] for low, high in ranges], dim=-2), ranges[0][0]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("size", "stride", "padding"), [*itertools.product((1, 3, 5), (1, 2), (0, 1, 2))])
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_convolution_of_strips_is_that_of_the_whole(
    cut: str, size: int, stride: int, padding: int, groups: int, dilation: int
):
    strips = Strips(CUTS[cut])
    conv = nn.Conv2d(4, 6, size, stride, padding, dilation, groups).double()
    x = torch.randn(2, 4, strips.rows, 9, dtype=torch.float64)
    with torch.no_grad():
        whole = conv(x)
        kernel = layers.kernel_of(conv)
        output = strips.strided(stride, whole.shape[-2]) if whole.shape[-2] > -(-strips.bounds[-2] // stride) else None
        if output is None:
            pytest.skip("the last strip is too low to have an output of its own")
        needs = [kernel.needs(output.own(rank)) for rank in range(strips.ranks)]
        parts = []
        for rank in range(strips.ranks):
            mine, first = _assemble(x, strips, needs, rank)
            parts.append(layers.convolve(conv, mine, first, strips.rows, kernel, output.own(rank)))
    assert kernel.output(strips.rows) == whole.shape[-2]
    torch.testing.assert_close(torch.cat(parts, dim=-2), whole, rtol=0, atol=1e-12)


def test_group_norm_of_strips_is_that_of_the_whole():
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64) * 3 + 100
    for cut in ((0, 7), (0, 1, 7), (0, 3, 4, 7)):
        strips = [x[..., a:b, :] for a, b in itertools.pairwise(cut)]
        counts = [strip[0].numel() // 4 for strip in strips]
        mean, variance = layers.merge([layers.statistics(strip, 4) for strip in strips], counts)
        parts = [layers.normalize(strip, mean, variance, norm) for strip in strips]
        torch.testing.assert_close(torch.cat(parts, dim=-2), norm(x).detach(), rtol=0, atol=1e-12)
        # guard: the divisor N - 1, which DistriFusion's release uses with the strip's own N, is not this
        smallest = counts[0]
        wrong = layers.normalize(x, mean, variance * smallest / (smallest - 1), norm)
        assert (wrong - norm(x)).abs().max() > 1e-4


def test_statistics_neither_overflow_in_half_precision_nor_cancel():
    x = (torch.randn(1, 4, 6, 6) * 1e-3 + 300).half()  # its squares overflow
    strips = [x[..., :2, :], x[..., 2:, :]]
    mean, variance = layers.merge([layers.statistics(strip, 1) for strip in strips], [48, 96])
    truth = x.double()
    torch.testing.assert_close(mean.double().squeeze(), truth.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double().squeeze(), truth.var(correction=0), rtol=1e-3, atol=1e-9)


def test_following_unchanged_statistics_changes_nothing_and_never_goes_negative():
    then, own = torch.rand(2, 4, 2), torch.rand(2, 4, 2)
    assert torch.equal(layers.follow(then, own, own), then)
    empty = torch.zeros_like(own)
    for moved in (
        layers.follow(then, own, 1e6 * own),
        layers.follow(then, empty, own),
        layers.follow(then, own, empty),
    ):
        assert moved.isfinite().all()
        assert (moved[..., 1] >= 0).all()


def test_strips_in_proportion():
    assert Strips.share(32, (1, 1)).bounds == (0, 16, 32)
    assert Strips.share(32, (3, 1)).bounds == (0, 24, 32)
    assert Strips.share(36, (1, 1, 1), 8).bounds == (0, 16, 24, 36)
    assert Strips.share(32, (100, 1), 8).bounds == (0, 24, 32)
    with pytest.raises(ValueError, match="at most 2 ranks"):
        Strips.share(16, (1, 1, 1), 8)


def test_levels_are_cut_at_the_same_place():
    strips = Strips((0, 8, 24, 29))
    assert strips.level(15).bounds == (0, 4, 12, 15)
    assert strips.level(8).bounds == (0, 2, 6, 8)
    assert strips.level(58).bounds == (0, 16, 48, 58)
    with pytest.raises(ValueError, match="no level"):
        strips.level(11)


def test_a_kernel_that_fits_its_stride_needs_no_neighbour():
    assert Kernel(2, 2).local
    assert not Kernel(3, 2, 1, 1).local
    # even strips, three wide, stride two: only the row above
    assert Kernel(3, 2, 1, 1).needs((4, 8)) == (7, 16)
