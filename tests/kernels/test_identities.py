"""Answers known beforehand, for random shapes: what attention must not notice, and what it must follow exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels.attention import Selection, attention, blocks_in, merge
from fastdiff_kernels.attention import triton as launched
from fastdiff_kernels.quantise.reference import pooled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (path, dtype, tolerance): the reference and the masked path in float64, the kernel and the gathered path in float32
EXACT = {"reference": (torch.float64, 1e-11), "masked": (torch.float64, 1e-11)}
FAST = {"gather": (torch.float32, 5e-6), "triton": (torch.float32, 5e-6)}
WAYS = {**EXACT, **FAST}
shapes = st.tuples(st.integers(1, 50), st.integers(2, 70), st.integers(1, 40), st.integers(0, 10**6))


def each_path(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check of (shape, path, dtype, tolerance) on every path, with shapes that hypothesis draws."""

    @pytest.mark.parametrize("path", WAYS)
    @settings(max_examples=6, deadline=None)
    @given(shape=shapes)
    def checked(path: str, shape: tuple[int, int, int, int]) -> None:
        check(shape, path, *WAYS[path])

    checked.__name__ = check.__name__
    checked.__doc__ = check.__doc__
    return checked


def drawn(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, head, seed = shape
    torch.manual_seed(seed)
    q = torch.randn(1, 2, queries, head, dtype=dtype, device=DEVICE)
    k, v = torch.randn(2, 1, 2, keys, head, dtype=dtype, device=DEVICE)
    return q, k, v


@each_path
def test_keys_and_values_in_another_order_change_nothing(shape: Any, path: str, dtype: Any, tolerance: float):
    q, k, v = drawn(shape, dtype)
    order = torch.randperm(k.shape[2], device=DEVICE)
    for found, expected in zip(
        attention(q, k[:, :, order], v[:, :, order], path=path), attention(q, k, v, path=path), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@each_path
def test_queries_in_another_order_give_rows_in_that_order(shape: Any, path: str, dtype: Any, tolerance: float):
    q, k, v = drawn(shape, dtype)
    order = torch.randperm(q.shape[2], device=DEVICE)
    found, _ = attention(q[:, :, order], k, v, path=path)
    torch.testing.assert_close(found, attention(q, k, v, path=path)[0][:, :, order], rtol=0, atol=tolerance)


@each_path
def test_channels_of_zeros_change_nothing(shape: Any, path: str, dtype: Any, tolerance: float):
    q, k, v = drawn(shape, dtype)
    wide = (torch.nn.functional.pad(one, (0, 5)) for one in (q, k, v))
    found, lse = attention(*wide, scale=0.3, path=path)
    expected, expected_lse = attention(q, k, v, scale=0.3, path=path)
    torch.testing.assert_close(found[..., : q.shape[-1]], expected, rtol=0, atol=tolerance)
    assert not found[..., q.shape[-1] :].any()
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=tolerance)


@each_path
def test_one_overwhelming_key_gives_its_value(shape: Any, path: str, dtype: Any, tolerance: float):
    q, k, v = drawn(shape, dtype)
    q = torch.where(q >= 0, q + 1, q - 1)
    place = k.shape[2] // 2
    # every row meets this key with 200 per channel and all others with 0
    k = torch.zeros_like(k)
    k[:, :, place] = 200.0
    found, _ = attention(q.abs(), k, v, scale=1.0, path=path)
    torch.testing.assert_close(found, v[:, :, place : place + 1].expand_as(found), rtol=0, atol=tolerance)


@each_path
def test_grouped_queries_equal_repeated_keys(shape: Any, path: str, dtype: Any, tolerance: float):
    q, k, v = drawn(shape, dtype)
    q = torch.cat([q, 2 * q], 1)
    found = attention(q, k, v, path=path)
    expected = attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), path=path)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@each_path
def test_keys_in_chunks_merge_to_all_of_them(shape: Any, path: str, dtype: Any, tolerance: float):
    """What a ring of devices does, each with some of the keys."""
    q, k, v = drawn(shape, dtype)
    expected = attention(q, k, v, path=path)
    parts = [attention(q, *pair, path=path) for pair in zip(k.split(17, 2), v.split(17, 2), strict=True)]
    found = parts[0]
    for part in parts[1:]:
        found = merge(*found, *part)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@each_path
def test_the_share_of_the_near_keys_is_a_sigmoid(shape: Any, path: str, dtype: Any, tolerance: float):
    """Re-ttention's ratio, from the two log-sum-exps."""
    q, k, v = drawn(shape, dtype)
    mask = torch.rand(1, 2, blocks_in(q.shape[2], 16), blocks_in(k.shape[2], 16), device=DEVICE) < 0.5
    mask[..., 0] = True
    near = Selection.from_mask(mask, 16, 16)
    far = near.complement(mask.shape[-1])
    (_, whole), (_, some), (_, rest) = (attention(q, k, v, selection=one, path=path) for one in (None, near, far))
    share = (some - whole).exp()
    torch.testing.assert_close(share, torch.sigmoid(some - rest), rtol=0, atol=4 * tolerance)
    assert ((share > 0) & (share <= 1 + 4 * tolerance)).all()


@settings(max_examples=20, deadline=None)
@given(shape=shapes, group=st.integers(1, 20))
def test_scores_are_put_together_again_after_smoothing(shape: Any, group: int):
    """q kᵀ of smoothed queries and keys, plus the block means' own part, is q kᵀ up to a constant of each row."""
    q, k, _ = drawn(shape, torch.float64)
    smooth = k - k.mean(2, keepdim=True)
    means = pooled(q, group).repeat_interleave(group, 2)[:, :, : q.shape[2]]
    found = (q - means) @ smooth.mT + means @ smooth.mT
    constant = q @ k.mean(2, keepdim=True).mT
    torch.testing.assert_close(found + constant, q @ k.mT, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", [32, 72, 88, 160])
def test_every_head_size_in_use_is_taken(head: int):
    torch.manual_seed(head)
    q, k, v = torch.randn(3, 1, 1, 40, head, device=DEVICE)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for path in ("reference", "triton", "gather"):
        found, _ = attention(q, k, v, path=path)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_kernel_and_reference_agree_on_what_is_not_finite(which: str, bad: float):
    torch.manual_seed(0)
    given_: dict[str, Any] = dict(zip("qkv", torch.randn(3, 1, 2, 40, 16, device=DEVICE), strict=True))
    given_[which][0, 1, 5, 3] = bad
    mask = torch.rand(1, 2, 3, 3, device=DEVICE) < 0.7
    for selection in (None, Selection.from_mask(mask, 16, 16)):
        expected, expected_lse = attention(**given_, selection=selection, path="reference")
        found, lse = attention(**given_, selection=selection, path="triton")
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
        torch.testing.assert_close(found[finite], expected[finite], rtol=0, atol=2e-6)


@pytest.mark.parametrize("limit", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("head", [32, 64, 72, 96, 128, 160])
def test_blocks_fit_the_shared_memory_of_every_dtype(head: int, limit: int):
    # 160 channels of float32 once found no place in Hopper's blocks
    for key_bytes, value_bytes, quantised in ((4, 4, False), (2, 2, False), (1, 4, True), (1, 2, True), (1, 1, True)):
        blocks = launched.dense_blocks(head, quantised, limit, key_bytes, value_bytes)
        assert launched.stages_of(head, *blocks, key_bytes, value_bytes, limit) >= 1
