"""Bad input, nothing at all, rows that see nothing, and what is not finite: one answer, or one error, on every path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.attention import Selection, attention
from fastdiff_kernels.attention.gradient import BlockSparse
from fastdiff_kernels.attention.reference import attention_backward_reference
from fastdiff_kernels.quantise import quantise
from fastdiff_kernels.selection import antidiagonal_scores, block_mass, pooled_scores, top_k
from fastdiff_kernels.sparse_linear import FEATURES, route, sparse_linear
from fastdiff_kernels.sparse_linear.reference import sparse_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAD = (float("nan"), float("inf"), float("-inf"))


def tensors(queries: int = 20, keys: int = 30, head: int = 16, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, 2, queries, head, device=DEVICE)
    k, v = torch.randn(2, 1, 2, keys, head, device=DEVICE)
    return q.to(**kind), k.to(**kind), v.to(**kind)


def some(queries: int, keys: int, share: float = 0.6) -> Selection:
    mask = torch.rand(1, 2, -(-queries // 16), -(-keys // 16), device=DEVICE) < share
    mask[..., :1, :1] = True
    return Selection.from_mask(mask, 16, 16)


def mass(q: Tensor, k: Tensor, v: Tensor, path: str) -> Tensor:
    lse = torch.zeros(q.shape[:3], device=q.device)
    return block_mass(q, k, lse, 16, 16, path=path)


def linear(q: Tensor, k: Tensor, v: Tensor, path: str) -> Tensor:
    zero = torch.zeros(q.shape[-1], q.shape[-1], device=q.device)
    chosen = Selection.from_mask(torch.ones(1, 2, 2, 2, dtype=torch.bool, device=q.device), 16, 16)
    return sparse_linear(q, k, v, zero, selection=chosen, path="triton" if path == "triton" else "gather")


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Any]] = {
    "attention": lambda q, k, v, path: attention(q, k, v, path=path),
    "int8": lambda q, k, v, path: attention(q, k, v, precision="int8", path=path),
    "quantise": lambda q, k, v, path: quantise(q, k, v, path=path),
    "block_mass": mass,
    "sparse_linear": linear,
    "pooled": lambda q, k, v, path: pooled_scores(q, k, 16, 16),
    "antidiagonal": lambda q, k, v, path: antidiagonal_scores(q, k, 16, 16),
}
WITHOUT_VALUES = ("block_mass", "pooled", "antidiagonal")
everywhere = pytest.mark.parametrize("path", ["reference", "triton"])


def test_memory_that_nobody_wrote_to_shows():
    q = torch.zeros(3, 4)
    for made in (torch.empty(5), torch.empty_like(q), q.new_empty(7), torch.empty(9, dtype=torch.float8_e4m3fn)):
        assert made.float().isnan().all()
    assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()


@everywhere
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_does_not_go_together_is_refused(name: str, path: str):
    q, k, v = tensors()
    work = OPERATIONS[name]
    elsewhere = torch.empty(k.shape, device="meta")
    cases: list[tuple[tuple[Tensor, Tensor, Tensor], str]] = [
        ((q, elsewhere, elsewhere), "move them to one device"),
        ((q.half(), k, v), "one floating dtype"),
        ((q.long(), k.long(), v.long()), "one floating dtype"),
        ((q[0], k, v), "takes q"),
        ((q[..., :8], k, v), "differ in batch or head size"),
        ((torch.cat([q, q[:, :1]], 1), k, v), "no multiple"),
    ]
    if name not in WITHOUT_VALUES:
        cases += [((q, k, v[:, :, :5]), "takes q"), ((q, k, v.double()), "one floating dtype")]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            work(*given, path)


def test_what_comes_along_is_on_the_same_device():
    q, k, v = tensors()
    chosen = some(20, 30)
    away = torch.device("meta")
    lse = torch.zeros(1, 2, 20, device=DEVICE)
    moved = Selection(chosen.blocks.to(away), chosen.counts.to(away), 16, 16)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(lengths=torch.ones(1, dtype=torch.int32, device=away)), "lengths lie on meta"),
        (dict(far=(q, lse.to(away))), "log-sum-exp of q"),
        (dict(far=(q.to(away), lse)), "far field lies on meta"),
        (dict(selection=moved), "selection lies on meta"),
        (dict(selection=Selection(chosen.blocks.long(), chosen.counts, 16, 16)), "int32"),
    ]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, **given)
    with pytest.raises(ValueError, match="log-sum-exp of q"):
        block_mass(q, k, lse[..., :5], 16, 16)
    with pytest.raises(ValueError, match="projection lies on meta"):
        sparse_linear(q, k, v, torch.zeros(16, 16, device=away), selection=chosen)


def test_a_gradient_that_the_kernel_does_not_have_is_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="no gradient here"):
        attention(q, k, v.requires_grad_(), path="triton")
    with torch.no_grad():
        assert attention(q, k, v, path="triton")[0].isfinite().all()


@everywhere
def test_nothing_gives_nothing(path: str):
    for queries, keys in ((0, 30), (20, 0), (0, 0)):
        q, k, v = tensors(queries, keys)
        chosen = Selection.from_mask(torch.ones(1, 2, -(-queries // 16), -(-keys // 16), dtype=torch.bool), 16, 16)
        chosen = Selection(chosen.blocks.to(DEVICE), chosen.counts.to(DEVICE), 16, 16)
        for precision in ("exact", "int8", "int8_fp8"):
            for selection in (None, chosen):
                output, lse = attention(q, k, v, selection=selection, precision=precision, path=path)
                assert output.shape == q.shape
                assert not output.any()
                assert (lse == float("-inf")).all()
        lse = torch.zeros(1, 2, queries, device=DEVICE)
        shape = (1, 2, -(-queries // 16), -(-keys // 16))
        assert block_mass(q, k, lse, 16, 16, path=path).shape == shape
        assert pooled_scores(q, k, 16, 16)[0].shape == shape
        assert antidiagonal_scores(q, k, 16, 16).shape == shape
        with pytest.raises(ValueError, match="at least one query and one key"):
            quantise(q, k, v, path=path)
        by = torch.ones(16, 16, device=DEVICE)
        leaves = [one.requires_grad_() for one in (q, k, v, by)]
        output = sparse_linear(q, k, v, by, selection=chosen, path="triton" if path == "triton" else "gather")
        assert output.shape == q.shape
        assert not output.any()
        assert not any(one.any() for one in torch.autograd.grad(output.sum(), leaves))
    with pytest.raises(ValueError, match="count=1 must be from 1 to the 0"):
        top_k(torch.zeros(1, 1, 3, 0), 1, 16, 16, path=path)
    assert top_k(torch.zeros(1, 1, 0, 3, device=DEVICE), 2, 16, 16, path=path).blocks.shape == (1, 1, 0, 2)


@everywhere
def test_rows_without_keys_add_nothing_to_the_mass(path: str):
    q, k, _ = tensors(32, 40)
    _, lse = attention(q, k, k, path="reference")
    lse[0, 0, 3] = lse[0, 1, 16:] = float("-inf")
    found = block_mass(q, k, lse, 16, 16, path=path)
    expected = torch.tensor([[15 / 16, 1.0], [1.0, 0.0]], device=DEVICE)
    torch.testing.assert_close(found.sum(-1)[0], expected, rtol=0, atol=1e-5)


@everywhere
def test_keys_that_do_not_count_have_no_mass(path: str):
    q, k, v = tensors(32, 40)
    lengths = torch.tensor([21], dtype=torch.int32, device=DEVICE)
    _, lse = attention(q, k, v, lengths=lengths, path="reference")
    found = block_mass(q, k, lse, 16, 16, path=path, lengths=lengths)
    expected = block_mass(q, k[:, :, :21], lse, 16, 16, path="reference")
    torch.testing.assert_close(found[..., :2], expected, rtol=0, atol=1e-6)
    assert not found[..., 2].any()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="lengths are int32"):
        block_mass(q, k, lse, 16, 16, lengths=lengths.long())


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_eight_bits_agree_on_what_is_not_finite(which: str, bad: float, precision: str):
    given: dict[str, Any] = dict(zip("qkv", tensors(40, 70, 32), strict=True))
    given[which][0, 1, 5, 3] = bad
    expected, expected_lse = attention(**given, precision=precision, path="reference")
    found, lse = attention(**given, precision=precision, path="triton")
    assert not expected.isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    # the other head does not notice
    assert expected[0, 0].isfinite().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_pre_pass_agrees_on_what_is_not_finite(which: int, bad: float):
    given = tensors(40, 70, 32)
    given[which][0, 1, 5, 3] = bad
    expected, found = (quantise(*given, fp8=True, path=path) for path in ("reference", "triton"))
    shown = 0
    for name in ("q_scale", "k_scale", "v_scale", "v_mean", "shift"):
        finite = getattr(expected, name).isfinite()
        shown += int((~finite).sum())
        assert torch.equal(getattr(found, name).isfinite(), finite), name
    assert shown > 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1])
def test_the_mass_agrees_on_what_is_not_finite(which: int, bad: float):
    q, k, v = tensors(40, 70)
    (q, k)[which][0, 1, 5, 3] = bad
    _, lse = attention(q, k, v, path="reference")
    expected, found = (block_mass(q, k, lse, 16, 16, path=path) for path in ("reference", "triton"))
    finite = expected.isfinite()
    assert not finite.all()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite], expected[finite], rtol=0, atol=1e-6)


def test_what_is_not_a_number_is_chosen_first_of_either_sign():
    scores = torch.randn(1, 1, 4, 11, device=DEVICE)
    nan = torch.tensor(float("nan"), device=DEVICE)
    scores[0, 0, 0, 3], scores[0, 0, 1, 4] = nan, -nan
    scores[0, 0, 2, 1], scores[0, 0, 2, 6] = float("inf"), -nan
    scores[0, 0, 3, 2:5] = -nan
    expected = top_k(scores, 2, 16, 16, path="reference")
    assert 3 in expected.blocks[0, 0, 0]
    assert expected.blocks[0, 0, 2].tolist() == [1, 6]
    assert expected.blocks[0, 0, 3].tolist() == [2, 3]
    assert torch.equal(top_k(scores, 2, 16, 16, path="triton").blocks, expected.blocks)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_agree_on_what_is_not_finite(which: int, bad: float):
    given = tensors(40, 45)
    given[which][0, 1, 5, 3] = bad
    chosen, up = some(40, 45), torch.randn(1, 2, 40, 16, device=DEVICE)
    leaves = [one.clone().requires_grad_() for one in given]
    output: Tensor = BlockSparse.apply(*leaves, 0.25, chosen, "triton")  # type: ignore[assignment]
    found = torch.autograd.grad(output, leaves, up)
    expected = attention_backward_reference(up, *given, 0.25, chosen)
    assert not all(one.isfinite().all() for one in expected)
    for one, right in zip(found, expected, strict=True):
        # the reference knows which keys a row has seen, the kernel which blocks: it may show more, within them
        assert not (one.isfinite() & ~right.isfinite()).any()
        both = one.isfinite()
        torch.testing.assert_close(one[both], right[both], rtol=1e-4, atol=1e-5)
    assert all(one[0, 0].isfinite().all() for one in found)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_sparse_linear_attention_agrees_on_what_is_not_finite(which: int, bad: float, features: str):
    given = tensors(40, 45)
    chosen = route(*given[:2], 0.5, 16, 16)
    given[which][0, 1, 5, 3] = bad
    projection = torch.randn(16, 16, device=DEVICE)
    expected = sparse_linear_reference(*given, projection, chosen, 0.25, features)
    found = sparse_linear(*given, projection, selection=chosen, scale=0.25, features=features, path="triton")
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-4)
    assert finite[0, 0].all()
    q, k, v = leaves = [one.clone().requires_grad_() for one in given]
    output = sparse_linear(q, k, v, projection, selection=chosen, scale=0.25, features=features, path="triton")
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert not all(one.isfinite().all() for one in (output, *gradients))
    assert all(one[0, 0].isfinite().all() for one in gradients)


@pytest.mark.parametrize("features", FEATURES)
def test_the_reference_of_sparse_linear_attention_has_the_kernels_gradients(features: str):
    given = tensors(37, 50)
    projection = 0.3 * torch.randn(2, 16, 16, device=DEVICE)
    chosen, up = some(37, 50), torch.randn(1, 2, 37, 16, device=DEVICE)
    results = []
    for path in ("reference", "triton"):
        q, k, v, by = leaves = [one.clone().requires_grad_() for one in (*given, projection)]
        if path == "reference":
            output = sparse_linear_reference(q, k, v, by, chosen, 0.25, features)
        else:
            output = sparse_linear(q, k, v, by, selection=chosen, scale=0.25, features=features, path=path)
        results.append([output, *torch.autograd.grad(output, leaves, up)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@everywhere
@pytest.mark.parametrize("name", ["quantise", "block_mass", "sparse_linear"])
def test_strides_do_not_matter(name: str, path: str):
    given = tensors()
    odd = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in given]
    swapped = [one.mT.contiguous().mT for one in given]
    expected = OPERATIONS[name](*given, path)
    for q, k, v in (odd, swapped):
        found: Any = OPERATIONS[name](q, k, v, path)
        for one in ("q", "k", "q_scale", "k_scale") if name == "quantise" else (None,):
            left, right = (getattr(x, one) if one else x for x in (found, expected))
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "int8", "int8_fp8"])
def test_five_runs_give_the_same_bits(precision: str):
    q, k, v = torch.randn(3, 1, 4, 3000, 64, device="cuda", dtype=torch.bfloat16)
    chosen = route(q, k, 0.3, 128, 64)
    first = attention(q, k, v, selection=chosen, precision=precision, path="triton")
    for _ in range(4):
        again = attention(q, k, v, selection=chosen, precision=precision, path="triton")
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
