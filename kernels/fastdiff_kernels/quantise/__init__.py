"""Eight-bit inputs of attention, made in two launches, with the block means that selections are predicted from.

Keys lose their mean over tokens first, which softmax does not notice (SageAttention, https://arxiv.org/abs/2410.02367);
the log-sum-exp does, so its correction comes along. Values lose theirs before e4m3 and get it back after the product,
as rows of probabilities sum to one (SageAttention2, https://arxiv.org/abs/2411.10958).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff_kernels.inputs import check_inputs

__all__ = ["FP8_MAX", "K_GROUP", "Q_GROUP", "Quantised", "quantise"]

FP8_MAX = 448.0
Q_GROUP = 128
K_GROUP = 64


@dataclass(frozen=True)
class Quantised:
    """What the 8-bit kernels read.

    Attributes:
        q, k: int8 [B, N, S, D] and [B, M, T, D].
        q_scale: float32 [B, N, ceil(S / q_group)], times scale and log2 e; k_scale: [B, M, ceil(T / k_group)].
        v: e4m3 [B, M, D, T], tokens last as the matrix units want it; None where values keep their dtype.
        v_scale, v_mean: float32 [B, M, D].
        shift: float32 [B, N, S], what smoothing took from the natural log-sum-exp.
        q_pool, k_pool: float32 means [B, N, I, D] and [B, M, J, D] of each group of q and of the smoothed k.
        q_group, k_group: tokens that share a scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    v_mean: Tensor
    shift: Tensor
    q_pool: Tensor
    k_pool: Tensor
    q_group: int = Q_GROUP
    k_group: int = K_GROUP

    @property
    def fp8(self) -> bool:
        """True when values, and therefore probabilities, are e4m3."""
        return self.v is not None


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    fp8: bool = False,
    smooth: bool = True,
    q_group: int = Q_GROUP,
    k_group: int = K_GROUP,
    path: str | None = None,
) -> Quantised:
    """Quantise q [B, N, S, D] and k, v [B, M, T, D] (float16, bfloat16 or float32) by absolute maximum of each group.

    Args:
        scale: of the scores; 1/√D where None.
        fp8: values too, per channel.
        smooth: take the mean off the keys first.
        q_group, k_group: tokens that share a scale; powers of two from 16 for Triton.
        path: "reference" or "triton"; None takes Triton on CUDA.

    A NaN or infinity makes every scale of its group NaN, so that it shows in the result and is never clamped away.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, or no query or no key at all.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    path = path or ("triton" if q.is_cuda else "reference")
    if path not in ("reference", "triton"):
        raise ValueError(f"path {path!r} is not known; use 'reference' or 'triton'")
    check_inputs("quantise", q, k, v, wide=path != "triton")
    if 0 in (*q.shape[:3], k.shape[2]):
        raise ValueError(f"quantise takes at least one query and one key, not {list(q.shape)} and {list(k.shape)}")
    if path == "triton":
        from . import triton as fast

        return fast.quantise(q, k, v, scale, fp8, smooth, q_group, k_group)
    from .reference import quantise_reference

    return quantise_reference(q, k, v, scale, fp8, smooth, q_group, k_group)


def empty(q: Tensor, k: Tensor, fp8: bool, q_group: int = Q_GROUP, k_group: int = K_GROUP) -> Quantised:
    """A `Quantised` of the right shapes, not yet filled."""
    batch, heads, queries, head = q.shape
    groups, keys = k.shape[1:3]
    rows, columns = -(-queries // q_group), -(-keys // k_group)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    return Quantised(
        q=torch.empty(q.shape, dtype=torch.int8, device=q.device),
        k=torch.empty(k.shape, dtype=torch.int8, device=q.device),
        v=torch.empty((batch, groups, head, keys), dtype=torch.float8_e4m3fn, device=q.device) if fp8 else None,
        q_scale=floats(batch, heads, rows),
        k_scale=floats(batch, groups, columns),
        v_scale=floats(batch, groups, head),
        v_mean=floats(batch, groups, head),
        shift=floats(batch, heads, queries),
        q_pool=floats(batch, heads, rows, head),
        k_pool=floats(batch, groups, columns, head),
        q_group=q_group,
        k_group=k_group,
    )
