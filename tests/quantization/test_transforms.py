"""Changes of basis: orthogonal, invisible in the product, and they do flatten outliers."""

import pytest
import torch
from torch import Tensor

from fastdiff.quantization.transforms import (
    Rotation,
    best_rotation,
    block_of,
    fold_rotation,
    hadamard,
    hadamard_rotation,
    outlier_rotation,
    peak_ratio,
    smoothing,
)


def spiky(columns: int = 64, tokens: int = 80) -> Tensor:
    """Inputs of which a few channels stand out, as those of diffusion transformers do."""
    made = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    made[:, 5::16] *= 25
    return made


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(size: int):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.mT)


def test_hadamard_exists_for_powers_of_two_only():
    with pytest.raises(ValueError, match="12"):
        hadamard(12)
    assert [block_of(channels) for channels in (1536, 640, 72, 7)] == [128, 128, 8, 1]


@pytest.mark.parametrize("make", [lambda x: hadamard_rotation(x.shape[1]), lambda x: outlier_rotation(x, 16)])
def test_rotating_both_sides_leaves_the_product(make):
    x, weight = spiky().double(), torch.randn(12, 64).double()
    found = make(x.float())
    exact = Rotation(found.first.double(), found.order, None if found.second is None else found.second.double())
    for block in (exact.first, exact.second):
        if block is not None:
            torch.testing.assert_close(
                block @ block.mT, torch.eye(block.shape[-1]).double().expand_as(block), atol=1e-5, rtol=0
            )
    product = exact.apply(x) @ exact.apply(weight).mT
    torch.testing.assert_close(product, x @ weight.mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(exact.undo(exact.apply(weight)), weight, rtol=1e-5, atol=1e-5)


def test_outliers_are_flattened_and_the_found_rotation_does_it_best():
    x = spiky()
    plain, regular, found = (
        peak_ratio(one) for one in (x, hadamard_rotation(64).apply(x), outlier_rotation(x).apply(x))
    )
    assert regular < 0.8 * plain
    assert found < 0.8 * plain
    # a few channels that share their outliers are what greedy rotation is for
    alike = torch.randn(80, 1) * torch.ones(1, 64) * 10 + torch.randn(80, 64)
    chosen = best_rotation(alike)
    assert chosen is None or peak_ratio(chosen.apply(alike)) < peak_ratio(alike)


def test_flat_inputs_are_left_alone():
    assert best_rotation(torch.randn(200, 64, generator=torch.Generator().manual_seed(3)).sign()) is None


def test_smoothing_balances_peaks_at_one_half():
    x, weight = spiky(), torch.randn(12, 64)
    scale = smoothing(x.abs().amax(0), weight, 0.5)
    left, right = (x * scale).abs().amax(0), (weight / scale).abs().amax(0)
    torch.testing.assert_close(left, right)
    torch.testing.assert_close((x * scale) @ (weight / scale).mT, x @ weight.mT, rtol=1e-4, atol=1e-3)


def test_a_folded_rotation_is_invisible_through_attention():
    """Mixing tokens head by head leaves channels alone, so a head's rotation passes from values to the output."""
    generator = torch.Generator().manual_seed(0)
    value, bias, out = (torch.randn(*shape, generator=generator).double() for shape in ((32, 20), (32,), (12, 32)))
    x = torch.randn(6, 20, generator=generator).double()
    mix = torch.rand(4, 6, 6, generator=generator).double().softmax(-1)  # 4 heads of 8 channels

    def attend(value: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        values = (x @ value.mT + bias).view(6, 4, 8).transpose(0, 1)
        return (mix @ values).transpose(0, 1).reshape(6, 32) @ out.mT

    folded_value, folded_bias, folded_out = fold_rotation(value, bias, out, 8)
    assert folded_bias is not None
    assert not torch.allclose(folded_value, value)
    found = attend(folded_value, folded_bias, folded_out)
    torch.testing.assert_close(found, attend(value, bias, out), rtol=1e-6, atol=1e-5)
