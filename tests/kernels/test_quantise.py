"""Eight bits: bounds, smoothing identities, error bands on known data, and the two-launch pre-pass."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.attention import attention
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


def biased(head: int, value_bias: float = 0.0, query_bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with ±20 on a tenth of their channels, as trained models have."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 1024, head, generator=generator)
    channels = torch.randperm(head, generator=generator)[: head // 10]
    sign = torch.randint(0, 2, (len(channels),), generator=generator) * 2.0 - 1
    k[..., channels] += 20 * sign
    q[..., channels.flip(0)] += query_bias * sign
    return q, k, v + value_bias


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
    q, k, v = biased(64)
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


CASES: dict[str, Any] = {
    # data: int8 with values exact, int8 with e4m3, as relative L1 of the output
    "plain": (lambda: tuple(torch.randn(3, 1, 4, 2048, 64)), 0.0127, 0.039),
    "sharp": (lambda: tuple(torch.randn(1, 4, 2048, 128) * sd for sd in (2.0, 2.0, 1.0)), 0.0285, 0.040),
    "biased": (lambda: biased(128), 0.0128, 0.038),
}  # fmt: skip


@pytest.mark.parametrize("data", CASES)
def test_errors_lie_in_their_bands(data: str):
    make, int8, int8_fp8 = CASES[data]
    q, k, v = make()
    expected, _ = attention(q.double(), k.double(), v.double(), path="masked")
    for precision, band in (("int8", int8), ("int8_fp8", int8_fp8)):
        found, _ = attention(q, k, v, precision=precision, path="masked")
        assert relative(found, expected) == pytest.approx(band, rel=0.2), precision


def test_smoothing_is_what_keeps_biased_keys_right():
    q, k, v = biased(128)
    expected = (q.double() @ k.double().mT / 128**0.5).softmax(-1) @ v.double()

    def error(smooth: bool) -> float:
        made = quantise(q, k, v, scale=1.0, smooth=smooth, path="reference")
        left = dequantised(made.q, made.q_scale * math.log(2), Q_GROUP)
        scores = left @ dequantised(made.k, made.k_scale, K_GROUP).mT / 128**0.5
        return relative(scores.softmax(-1) @ v, expected)

    assert error(smooth=False) > 3 * error(smooth=True)


def test_four_bits_need_smooth_queries_where_those_are_biased():
    q, k, v = biased(128, query_bias=20.0)
    expected = (q.double() @ k.double().mT / 128**0.5).softmax(-1) @ v.double()
    errors = [
        relative(int4_scores_reference(q, k, 128**-0.5, smooth_q).softmax(-1) @ v, expected)
        for smooth_q in (False, True)
    ]
    assert errors[1] < 0.9 * errors[0]
    exact = int4_scores_reference(torch.zeros(1, 1, 4, 8), k[:, :1, :, :8], 1.0)
    assert not exact.any()


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
