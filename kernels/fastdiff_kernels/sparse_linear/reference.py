"""Sparse-linear attention written out with all pairs of tokens."""

from torch import Tensor

from fastdiff_kernels.attention.blocks import Selection
from fastdiff_kernels.attention.reference import attention_reference

from . import _features


def sparse_linear_reference(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, selection: Selection, scale: float, features: str = "softmax"
) -> Tensor:
    """See `sparse_linear`; forms S by T weights of the linear branch as well."""
    sparse, _ = attention_reference(q, k, v, scale, selection)
    groups = q.shape[1] // k.shape[1]
    keys, values = k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
    weights = _features(q.float(), features) @ _features(keys, features).mT
    linear = weights @ values / (weights.sum(-1, keepdim=True) + 1e-5)
    return sparse + (linear @ projection.float()).to(q.dtype)
