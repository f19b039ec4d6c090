"""Eight bits: bounds, smoothing identities, error bands on known data, and the two-launch pre-pass."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.quantise import K_GROUP, Q_GROUP, quantise
from fastdiff_kernels.quantise.reference import (
    dequantised,
    int4_scores_reference,
    integers,
    microscaled,
    microscaled_attention_reference,
    pooled,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().sum() / b.double().abs().sum())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("queries", "keys", "head", "groups"), [(130, 200, 40, 1), (5, 64, 24, 2)])
def test_two_launches_give_what_the_reference_gives(fp8: bool, queries: int, keys: int, head: int, groups: int):
    q = torch.randn(2, 4, queries, head, device=DEVICE)
    k, v = torch.randn(2, 2, 4 // groups, keys, head, device=DEVICE) + 3
    expected = quantise(q, k, v, scale=0.2, fp8=fp8, path="reference")
    found = quantise(q, k, v, scale=0.2, fp8=fp8, path="triton")
    for name in ("q_scale", "k_scale", "v_scale", "v_mean", "shift", "q_pool", "k_pool"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name)
    # another order of summing moves a value across the middle between two integers now and then
    for name in ("q", "k"):
        difference = (getattr(found, name).int() - getattr(expected, name).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-3
    if fp8:
        assert found.v is not None and expected.v is not None
        # Triton's interpreter loses the carry when it rounds to e4m3
        error = relative(found.v.float(), expected.v.float())
        assert error < (1e-3 if torch.cuda.is_available() else 0.06)


def test_pooled_means_leave_the_tail_its_own_mean():
    x = torch.randn(2, 70, 8)
    expected = torch.stack([part.mean(1) for part in x.split(32, 1)], 1)
    torch.testing.assert_close(pooled(x, 32), expected)


def test_integers_keep_within_half_a_step_and_zeros_divide_by_one():
    x = torch.randn(3, 50, 16)
    whole, scale = integers(x, 16)
    error = (dequantised(whole, scale, 16) - x).abs().amax(-1)
    assert (error <= scale.repeat_interleave(16, -1)[:, :50] / 2 * (1 + 1e-5)).all()
    whole, scale = integers(torch.zeros(1, 4, 4), 4)
    assert not whole.any()
    assert (scale == 1).all()


def test_scores_stay_within_their_bound():
    q, k, v = torch.randn(3, 1, 4, 1024, 64)
    k[..., :6] += 20  # as trained models have
    scale = 1 / 8
    made = quantise(q, k, v, scale=scale, path="reference")
    smooth = k - k.mean(2, keepdim=True)
    steps = made.q_scale * math.log(2) / scale
    left = dequantised(made.q, steps, Q_GROUP)
    right = dequantised(made.k, made.k_scale, K_GROUP)
    error = (left.double() @ right.double().mT - q.double() @ smooth.double().mT).abs() * scale
    q_step = steps.repeat_interleave(Q_GROUP, -1)[:, :, :, None]
    k_step = made.k_scale.repeat_interleave(K_GROUP, -1)[:, :, None]
    bound = (
        q_step / 2 * right.abs().sum(-1)[:, :, None] + k_step / 2 * q.abs().sum(-1)[..., None]
    ) * scale  # fmt: skip
    assert (error <= bound * (1 + 1e-4)).all()


def test_nothing_is_left_of_four_bits_of_zeros():
    assert not int4_scores_reference(torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 9, 8), 1.0).any()


def test_microscaling_holds_its_grid_and_its_error():
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -6, -4, -3, -2, -1.5, -1, -0.5, 0.5])
    assert torch.equal(microscaled(levels), levels)
    assert not microscaled(torch.zeros(2, 16)).any()
    with pytest.raises(ValueError, match="groups of 16"):
        microscaled(torch.zeros(2, 20))
    q, k, v = torch.randn(3, 1, 2, 128, 64)
    expected = (q @ k.mT / 8).softmax(-1) @ v
    assert relative(microscaled_attention_reference(q, k, v, 1 / 8), expected) < 0.35
    assert relative(microscaled_attention_reference(q, k, torch.ones_like(v), 1 / 8), torch.ones_like(v)) < 0.08


def test_unknown_path_is_refused():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="path 'cuda'"):
        quantise(q, q, q, path="cuda")
