"""Sparse-linear attention: the blocks that matter exactly, everything by a linear branch (SLA,
https://arxiv.org/abs/2509.24006, as its code does it).

The sparse branch runs the block-sparse kernels, forward and backward. The linear branch has kernels of its own on GPUs,
up to 128 channels, and is torch's matrix products elsewhere.
"""

import torch
from torch import Tensor

from fastdiff_kernels.attention.blocks import Selection
from fastdiff_kernels.attention.gradient import BlockSparse
from fastdiff_kernels.inputs import check_inputs
from fastdiff_kernels.selection import count_of, pooled_scores, top_k

__all__ = ["FEATURES", "linear_attention", "route", "sparse_linear"]

FEATURES = ("softmax", "elu", "relu")


def route(q: Tensor, k: Tensor, density: float, query_block: int, key_block: int) -> Selection:
    """The key blocks whose means agree best with each query block's mean."""
    scores, _ = pooled_scores(q.detach(), k.detach(), query_block, key_block)
    return top_k(scores, count_of(density, k.shape[2], key_block), query_block, key_block)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, features: str = "softmax") -> Tensor:
    """φ(q)(φ(k)ᵀv) / φ(q)(φ(k)ᵀ1) over all keys: [B, N, S, D] in float32, costs S D² and not S²."""
    if features not in FEATURES:
        raise ValueError(f"features {features!r} are not known; use one of {', '.join(FEATURES)}")
    groups = q.shape[1] // k.shape[1]
    keys, values = k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
    left, right = _features(q.float(), features), _features(keys, features)
    state = right.mT @ values  # [B, N, D, D]
    total = left @ right.sum(2)[..., None]  # [B, N, S, 1]
    return left @ state / (total + 1e-5)


def _features(x: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if kind == "elu" else x.relu()


def sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    selection: Selection,
    scale: float | None = None,
    features: str = "softmax",
    path: str | None = None,
) -> Tensor:
    """The sparse branch plus the projected linear one: [B, N, S, D] in q's dtype, differentiable in all four tensors.

    Args:
        projection: [N, D, D] or [D, D]; zeros leave top-k block-sparse attention, which is what untrained SLA is.
        path: "triton", or in torch "gather" or "masked"; None takes Triton on CUDA and "gather" elsewhere.

    A row whose selection holds no key has the linear branch alone; without any key at all the output is 0.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit.
    """
    if projection.shape[-2:] != (q.shape[-1], q.shape[-1]):
        raise ValueError(f"projection ends in {[q.shape[-1]] * 2}, not {list(projection.shape)}")
    if projection.device != q.device:
        raise ValueError(f"the projection lies on {projection.device} and q on {q.device}; move it")
    if features not in FEATURES:
        raise ValueError(f"features {features!r} are not known; use one of {', '.join(FEATURES)}")
    path = path or ("triton" if q.is_cuda else "gather")
    check_inputs("sparse_linear", q, k, v, wide=path != "triton")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if 0 in (*q.shape[:3], k.shape[2]):
        path = "masked"  # no kernel is launched on nothing
    sparse: Tensor = BlockSparse.apply(q, k, v, scale, selection, path)  # type: ignore[assignment]
    linear = _fused if path == "triton" and q.shape[-1] <= 128 else linear_attention
    return sparse + (linear(q, k, v, features) @ projection.float()).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, features: str) -> Tensor:
    from . import triton

    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return triton.Linear.apply(q, keys, values, features)  # type: ignore[return-value]
