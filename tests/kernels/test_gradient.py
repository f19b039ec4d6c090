"""Gradients of sparse and sparse-linear attention against autograd in float64."""

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.attention import Selection
from fastdiff_kernels.attention.gradient import BlockSparse
from fastdiff_kernels.attention.reference import attention_backward_reference
from fastdiff_kernels.sparse_linear import FEATURES, linear_attention, route, sparse_linear, triton
from fastdiff_kernels.sparse_linear.reference import sparse_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, up = torch.randn(2, 1, 4, 37, 24, device=DEVICE)
    k, v = torch.randn(2, 1, 2, 50, 24, device=DEVICE)
    return q, k, v, up


def selection() -> Selection:
    mask = torch.rand(1, 4, 3, 4, device=DEVICE) < 0.5
    mask[0, 0, 1] = False  # a row of nothing has no gradient
    return Selection.from_mask(mask, 16, 16)


def truth(q: Tensor, k: Tensor, v: Tensor, up: Tensor, chosen: Selection | None) -> list[Tensor]:
    q, k, v = (one.double().requires_grad_() for one in (q, k, v))
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ keys.mT * 0.3
    if chosen is not None:
        seen = chosen.mask(4).repeat_interleave(16, 2)[:, :, :37].repeat_interleave(16, 3)[..., :50]
        scores = scores.masked_fill(~seen, -1e30)
        values = values[:, :, None] * seen[..., None]
        output = (scores.softmax(-1)[..., None] * values).sum(3)
    else:
        output = scores.softmax(-1) @ values
    return list(torch.autograd.grad(output, (q, k, v), up.double()))


@pytest.mark.parametrize("path", ["triton", "masked", "gather"])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_equal_autograd(path: str, sparse: bool):
    q, k, v, up = inputs()
    chosen = selection() if sparse else None
    expected = truth(q, k, v, up, chosen)
    q, k, v = (one.requires_grad_() for one in (q, k, v))
    output: Tensor = BlockSparse.apply(q, k, v, 0.3, chosen, path)  # type: ignore[assignment]
    for found, right in zip(torch.autograd.grad(output, (q, k, v), up), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=5e-6)
    with torch.no_grad():
        reference = attention_backward_reference(up, q, k, v, 0.3, chosen)
    for found, right in zip(reference, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=5e-6)


@pytest.mark.parametrize("features", FEATURES)
def test_linear_branch_equals_all_pairs(features: str):
    q, k, v, _ = inputs()
    projection = torch.randn(4, 24, 24, device=DEVICE)
    chosen = route(q, k, 0.5, 16, 16)
    expected = sparse_linear_reference(q, k, v, projection, chosen, 0.3, features)
    found = sparse_linear(q, k, v, projection, selection=chosen, scale=0.3, features=features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["triton", "masked", "gather"])
def test_without_a_projection_it_is_top_k_and_the_projection_learns(path: str):
    q, k, v, up = inputs()
    chosen = route(q, k, 0.5, 16, 16)
    assert (chosen.counts == 2).all()
    zero = torch.zeros(4, 24, 24, device=DEVICE, requires_grad=True)
    found = sparse_linear(q, k, v, zero, selection=chosen, scale=0.3, path=path)
    output: Tensor = BlockSparse.apply(q, k, v, 0.3, chosen, path)  # type: ignore[assignment]
    assert torch.equal(found, output)
    (gradient,) = torch.autograd.grad(found, zero, up)
    assert gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="projection ends in"):
        sparse_linear(q, k, v, zero[:, :5], selection=chosen)
    with pytest.raises(ValueError, match="features 'cosine'"):
        sparse_linear(q, k, v, zero, selection=chosen, features="cosine")


@pytest.mark.parametrize("features", FEATURES)
def test_the_linear_branch_and_its_gradients_equal_autograd(features: str):
    q, k, v, up = inputs()
    found_of = [one.clone().requires_grad_() for one in (q, k, v)]
    true_of = [one.double().requires_grad_() for one in (q, k, v)]
    keys, values = (one.repeat_interleave(2, 1) for one in true_of[1:])
    expected = linear_attention(true_of[0], keys, values, features)
    found = triton.Linear.apply(found_of[0], *(one.repeat_interleave(2, 1) for one in found_of[1:]), features)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(found, found_of, up)
    for one, right in zip(gradients, torch.autograd.grad(expected, true_of, up.to(expected)), strict=True):
        torch.testing.assert_close(one.double(), right.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", FEATURES)
def test_sparse_linear_kernels_equal_the_reference(features: str):
    q, k, v, up = inputs()
    projection = torch.randn(4, 24, 24, device=DEVICE) * 0.2
    chosen = route(q, k, 0.5, 16, 16)
    results = []
    for path in ("triton", "gather"):
        leaves = [one.clone().requires_grad_() for one in (q, k, v, projection)]
        output = sparse_linear(*leaves, selection=chosen, scale=0.3, features=features, path=path)
        results.append([output, *torch.autograd.grad(output, leaves, up)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
