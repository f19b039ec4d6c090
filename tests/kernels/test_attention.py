"""Attention kernels and references against float64, and the identities they must keep."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels.attention import PRECISIONS, Selection, attention, blocks_in, merge
from fastdiff_kernels.attention.cpu import flex

PATHS = ("reference", "triton", "gather", "masked")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter loses the carry when it rounds to e4m3
E4M3_ERROR = 0.02 if torch.cuda.is_available() else 0.08


def tensors(queries: int, keys: int, head: int = 24, heads: int = 2, groups: int = 1, dtype: Any = torch.float32):
    shapes = ((2, heads, queries, head), (2, heads // groups, keys, head), (2, heads // groups, keys, head))
    return tuple(torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)


def random_selection(q: Tensor, k: Tensor, share: float = 0.5, block: int = 16) -> Selection:
    shape = (*q.shape[:2], blocks_in(q.shape[2], block), blocks_in(k.shape[2], block))
    return Selection.from_mask(torch.rand(shape, device=q.device) < share, block, block)


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, scale: float | None = None):
    """Output and log-sum-exp in float64 by the formula; rows that see nothing give 0 and -inf."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v, scores.logsumexp(-1)


def tokens(selection: Selection, queries: int, keys: int) -> Tensor:
    mask = selection.mask(blocks_in(keys, selection.key_block))
    rows = mask.repeat_interleave(selection.query_block, 2)[:, :, :queries]
    return rows.repeat_interleave(selection.key_block, 3)[..., :keys]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().sum() / b.double().abs().sum())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("queries", "keys", "head", "groups"), [(37, 53, 24, 1), (64, 33, 40, 2), (1, 1, 16, 1)])
def test_dense_and_sparse_equal_the_formula(path: str, queries: int, keys: int, head: int, groups: int):
    q, k, v = tensors(queries, keys, head, groups=groups)
    for selection in (None, random_selection(q, k)):
        seen = None if selection is None else tokens(selection, queries, keys)
        expected = truth(q, k, v, seen, 0.3)
        output, lse = attention(q, k, v, scale=0.3, selection=selection, path=path)
        torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=2e-6)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 20), st.integers(0, 10**6), st.floats(0, 1))
def test_references_hold_in_float64(queries: int, keys: int, head: int, seed: int, share: float):
    torch.manual_seed(seed)
    q, k, v = tensors(queries, keys, head, dtype=torch.float64)
    selection = random_selection(q, k, share)
    expected = truth(q, k, v, tokens(selection, queries, keys))
    for path in ("reference", "masked"):
        output, lse = attention(q, k, v, selection=selection, path=path)
        torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_a_selection_and_its_complement_merge_to_dense(path: str):
    q, k, v = tensors(50, 71)
    near = random_selection(q, k)
    far = near.complement(blocks_in(71, 16))
    dense = truth(q, k, v)
    parts = [attention(q, k, v, selection=one, path=path) for one in (near, far)]
    output, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(output.double(), dense[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), dense[1], rtol=0, atol=2e-6)
    fused, fused_lse = attention(q, k, v, selection=near, far=parts[1], path=path)
    torch.testing.assert_close(fused, output, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused_lse, lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", PATHS)
def test_rows_without_keys_give_nothing(path: str, precision: str):
    q, k, v = tensors(40, 64, 32)
    mask = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    mask[1, :, 0] = False
    chosen = Selection.from_mask(mask.to(DEVICE), 32, 32)
    lengths = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    output, lse = attention(q, k, v, selection=chosen, lengths=lengths, precision=precision, path=path)
    for part in (output[0], output[1, :, :32]):
        assert not part.any()
    assert (lse[0] == float("-inf")).all()
    assert (lse[1, :, :32] == float("-inf")).all()
    assert output[1, :, 32:].isfinite().all()
    assert lse[1, :, 32:].isfinite().all()
    far = truth(q, k, v)
    output, lse = attention(
        q, k, v, selection=chosen, lengths=lengths, far=(far[0].float(), far[1].float()), precision=precision, path=path
    )
    torch.testing.assert_close(output[0].double(), far[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse[0].double(), far[1][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_only_the_first_keys_count_where_lengths_say_so(path: str):
    q, k, v = tensors(20, 45)
    lengths = torch.tensor([45, 17], dtype=torch.int32, device=DEVICE)
    seen = (torch.arange(45, device=DEVICE) < lengths.view(-1, 1, 1, 1)).expand(2, 2, 20, 45)
    for selection in (None, random_selection(q, k, 1.0)):
        output, lse = attention(q, k, v, lengths=lengths, selection=selection, path=path)
        expected = truth(q, k, v, seen)
        torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_everything_selected_is_dense_and_order_does_not_matter(path: str):
    q, k, v = tensors(33, 80, 16)
    every = Selection.from_mask(torch.ones(2, 2, 3, 5, dtype=torch.bool, device=DEVICE), 16, 16)
    backwards = Selection(every.blocks.flip(-1), every.counts, 16, 16)
    dense = attention(q, k, v, path=path)
    for selection in (every, backwards):
        for one, other in zip(attention(q, k, v, selection=selection, path=path), dense, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["reference", "triton", "masked"])
def test_known_answers(path: str, precision: str):
    q, k, v = tensors(33, 70, 32)
    ask: dict[str, Any] = dict(precision=precision, path=path)
    ones, _ = attention(q, k, torch.ones_like(v), **ask)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=4e-3)
    mean, lse = attention(torch.zeros_like(q), k, v, **ask)
    error = E4M3_ERROR if precision == "int8_fp8" else 1e-5
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(mean), rtol=0, atol=error)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(70)), rtol=0, atol=1e-5)
    # a vector added to every key moves the log-sum-exp and nothing else
    base, base_lse = attention(q, k, v, **ask)
    offset = torch.randn(2, 2, 1, 32, device=DEVICE)
    moved, moved_lse = attention(q, k + offset, v, **ask)
    assert relative(moved, base) < (1e-4 if precision != "int8_fp8" else E4M3_ERROR)
    change = (q * offset).sum(-1) / math.sqrt(32)
    torch.testing.assert_close(moved_lse - base_lse, change, rtol=0, atol=2e-3)
    # and one added to every value comes out again
    lifted, _ = attention(q, k, v + offset, **ask)
    torch.testing.assert_close(lifted - offset, base, rtol=0, atol=E4M3_ERROR if precision == "int8_fp8" else 1e-5)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("sparse", [False, True])
def test_eight_bit_kernels_equal_their_reference(precision: str, sparse: bool):
    q, k, v = tensors(45, 90, 40, heads=4, groups=2)
    selection = random_selection(q, k, 0.6, 32) if sparse else None
    expected = attention(q, k, v, selection=selection, precision=precision, path="reference")
    found = attention(q, k, v, selection=selection, precision=precision, path="triton")
    assert relative(found[0], expected[0]) < (E4M3_ERROR if precision == "int8_fp8" else 1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_rows_that_attend_to_it(path: str, bad: float):
    q, k, v = tensors(32, 48, 16)
    mask = torch.zeros(2, 2, 2, 3, dtype=torch.bool, device=DEVICE)
    mask[:, :, 0, 0] = mask[:, :, 1, 2] = True
    chosen = Selection.from_mask(mask, 16, 16)
    v[0, 0, 3, 5] = bad
    output, _ = attention(q, k, v, selection=chosen, path=path)
    assert not output[0, 0, :16, 5].isfinite().any()
    rest = output.clone()
    rest[0, 0, :16, 5] = 0
    assert rest.isfinite().all()
    q[0, 1, 20, 1] = bad
    output, _ = attention(q, k, v, selection=chosen, path=path)
    assert output[0, 1, 20].isnan().all()
    for precision in ("int8", "int8_fp8"):
        output, _ = attention(q, k, v, precision=precision, path=path)
        assert not output[0].isfinite().all()
        assert output[1].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_empty_sides_and_odd_strides(path: str):
    q, k, v = tensors(20, 30)
    output, lse = attention(q[:, :, :0], k, v, path=path)
    assert output.shape == (2, 2, 0, 24)
    output, lse = attention(q, k[:, :, :0], v[:, :, :0], path=path)
    assert not output.any()
    assert (lse == float("-inf")).all()
    strided = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (q, k, v)]
    expected = attention(q, k, v, path=path)[0]
    torch.testing.assert_close(attention(*strided, path=path)[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(attention(q.mT.contiguous().mT, k, v, path=path)[0], expected, rtol=0, atol=1e-6)


def test_wrong_input_is_refused_with_a_reason():
    q, k, v = tensors(20, 30)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(q=q.half()), "one floating dtype"),
        (dict(q=q.long(), k=k.long(), v=v.long()), "one floating dtype"),
        (dict(v=v[:, :, :5]), "attention takes q"),
        (dict(q=q[:, :1], k=torch.cat([k, k], 1), v=torch.cat([v, v], 1)), "no multiple"),
        (dict(precision="int3"), "int3"),
        (dict(path="flash"), "flash"),
        (dict(lengths=torch.ones(2)), "lengths are int32"),
        (dict(far=(q, k)), "far field"),
        (dict(selection=random_selection(q[:, :, :10], k)), "make it anew"),
    ]
    for changed, words in cases:
        with pytest.raises(ValueError, match=words):
            attention(**{"q": q, "k": k, "v": v, **changed})
    with pytest.raises(ValueError, match="powers of two"):
        attention(q, k, v, selection=random_selection(q, k, 1.0, 8), path="triton")


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_block_far_below_the_maximum_is_left_out_within_its_bound(path: str, precision: str):
    q, k, v = tensors(32, 96, 32)
    k[:, :, 64:] -= 40 * q.mean((1, 2), keepdim=True) / q.mean((1, 2), keepdim=True).norm(dim=-1, keepdim=True)
    q = q + 3 * q.mean((1, 2), keepdim=True)
    ask: dict[str, Any] = dict(path=path, precision=precision, selection=random_selection(q, k, 1.1, 32))
    whole = attention(q, k, v, **ask)
    for never in (float("inf"), 1e4):
        same = attention(q, k, v, skip=never, **ask)
        assert all(torch.equal(*pair) for pair in zip(same, whole, strict=True))
    for skip in (0.0, 4.0, 12.0):
        output, lse = attention(q, k, v, skip=skip, **ask)
        # what is left out adds at most 32 keys a block, each 2 ** -skip beside a key that was there
        lost = whole[1] - lse
        assert (lost >= -1e-4).all()
        assert (lost <= math.log1p(2 * 32 * 2.0**-skip) + 1e-4).all()
        assert output.isfinite().all()
    other = attention(q, k, v, skip=4.0, **{**ask, "path": "reference"})
    torch.testing.assert_close(attention(q, k, v, skip=4.0, **ask)[1], other[1], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="at least 0, on path"):
        attention(q, k, v, skip=4.0, path="gather")
    with pytest.raises(ValueError, match="skip=-1"):
        attention(q, k, v, skip=-1, path=path)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="the compiled flex path is for CPUs")
def test_compiled_flex_attention_equals_the_formula():
    q, k, v = tensors(64, 64, 16)
    selection = random_selection(q, k, 0.7)
    everywhere = Selection.from_mask(selection.mask(4) | torch.eye(4, dtype=torch.bool), 16, 16)
    output = flex(q, k, v, 0.25, everywhere)
    torch.testing.assert_close(output.double(), truth(q, k, v, tokens(everywhere, 64, 64))[0], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="whole blocks"):
        flex(q[:, :, :60], k, v, 0.25, random_selection(q[:, :, :60], k))
