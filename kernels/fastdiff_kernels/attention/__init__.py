"""Attention over chosen key blocks, exact or 8-bit, with the log-sum-exp out and a far field merged in.

One signature for every path: "reference" (plain torch, slow and obvious), "triton" (one kernel family, Ampere to
Hopper), and on CPUs "gather" and "masked" (see `cpu`). `path=None` takes Triton on CUDA, where exact dense attention
goes to what measures fastest (see `dense`), and "gather" elsewhere.
"""

import torch
from torch import Tensor

from fastdiff_kernels.inputs import check_inputs, check_lengths, check_lse
from fastdiff_kernels.quantise import K_GROUP, Q_GROUP, Quantised, quantise

from .blocks import Selection, blocks_in

__all__ = ["PATHS", "PRECISIONS", "Selection", "attention", "blocks_in", "merge"]

PATHS = ("reference", "triton", "gather", "masked")
PRECISIONS = ("exact", "int8", "int8_fp8")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    selection: Selection | None = None,
    precision: str = "exact",
    lengths: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
    skip: float | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v over the selected blocks.

    Args:
        q: [B, N, S, D] float16, bfloat16 or float32 (references also float64); any strides.
        k, v: [B, M, T, D] of q's dtype and device; N is a multiple of M (grouped queries).
        scale: 1/√D where None.
        selection: key blocks of each query block; all where None.
        precision: "exact"; "int8" quantises q and the smoothed k (SageAttention, https://arxiv.org/abs/2410.02367);
            "int8_fp8" also takes probabilities and values in e4m3 (SageAttention2, https://arxiv.org/abs/2411.10958).
        lengths: int32 [B], how many keys count, from the first; all where None.
        far: (output [B, N, S, D], log-sum-exp float32 [B, N, S]) of the other keys, merged in before writing.
        skip: leave out blocks of which no score comes within `skip` powers of two of its row's maximum so far
            (SpargeAttn's λ, https://arxiv.org/abs/2502.18137), for finite inputs on "reference" and "triton"; what is
            lost weighs at most key_block times 2 to the -skip beside the row's largest.
        path: one of `PATHS`.

    Returns:
        Output [B, N, S, D] in q's dtype, and the natural log-sum-exp [B, N, S] in float32 (float64 for float64). A row
        without keys gives 0 and -inf. A NaN or infinity reaches the rows that attend to it and no others: with 8 bits,
        all rows and keys that share its scale, and with smoothed keys its whole head.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, or a gradient is wanted from "triton".
    """
    plain = path is None and precision == "exact" and selection is None and lengths is None
    path = path or ("triton" if q.is_cuda else "gather")
    _check(q, k, v, precision, path)
    _check_extras(q, k, selection, lengths, far)
    if skip is not None and (path in ("gather", "masked") or not skip >= 0):
        raise ValueError(f"skip={skip} must be at least 0, on path 'reference' or 'triton', not {path!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if 0 in (q.shape[0], q.shape[1], q.shape[2], k.shape[2]):
        near = q.new_zeros(q.shape), q.new_full(q.shape[:3], float("-inf"), dtype=_accumulator(q))
        return near if far is None else (merge(*near, *far))
    if plain and q.is_cuda:
        from . import dense

        near = dense.attention(q, k, v, scale)
        return near if far is None else merge(*near, *far)
    if path in ("gather", "masked"):
        from . import cpu

        return cpu.attention(q, k, v, scale, selection, precision, lengths, far, masked=path == "masked")
    quantised: Quantised | None = None
    if precision != "exact":
        quantised = quantise(q, k, v, scale=scale, fp8=precision == "int8_fp8", path=path, **groups_of(selection))
    if path == "triton":
        from . import triton as fast

        return fast.attention(q, k, v, scale, selection, quantised, lengths, far, skip)
    from . import reference

    if quantised is not None:
        return reference.quantised_attention_reference(q, quantised, v, selection, lengths, far, skip)
    return reference.attention_reference(q, k, v, scale, selection, lengths, far, skip)


def merge(output: Tensor, lse: Tensor, far_output: Tensor, far_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys: outputs [B, N, S, D], natural log-sum-exps [B, N, S]."""
    top = torch.maximum(lse, far_lse)
    top = torch.where(top == float("-inf"), 0, top)
    near, far = (lse - top).exp()[..., None], (far_lse - top).exp()[..., None]
    total = near + far
    # a far field of a whole row of nothing may hold anything
    joined = near * output.to(near.dtype) + torch.where(far > 0, far * far_output.to(near.dtype), 0)
    joined = torch.where(total == 0, 0, joined / total)
    return joined.to(output.dtype), top + total[..., 0].log()


def groups_of(selection: Selection | None) -> dict[str, int]:
    """Tokens that share an 8-bit scale: those of a block, so that one tile is the unit of both (FPSAttention)."""
    if selection is None:
        return {}
    return {"q_group": min(Q_GROUP, selection.query_block), "k_group": min(K_GROUP, selection.key_block)}


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, precision: str, path: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    if path not in PATHS:
        raise ValueError(f"path {path!r} is not known; use one of {', '.join(PATHS)}")
    check_inputs("attention", q, k, v, wide=path != "triton")
    if path == "triton" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "Triton's attention has no gradient here; call it under torch.no_grad(), or train with "
            "fastdiff_kernels.attention.gradient.BlockSparse"
        )


def _check_extras(
    q: Tensor, k: Tensor, selection: Selection | None, lengths: Tensor | None, far: tuple[Tensor, Tensor] | None
) -> None:
    if selection is not None:
        selection.check(q, k)
    check_lengths(lengths, q)
    if far is not None and (far[0].shape != q.shape or far[1].shape != q.shape[:3]):
        raise ValueError(
            f"a far field for q {list(q.shape)} has that shape and a log-sum-exp {list(q.shape[:3])}, "
            f"not {list(far[0].shape)} and {list(far[1].shape)}"
        )
    if far is not None:
        check_lse(far[1], q)
        if far[0].device != q.device:
            raise ValueError(f"the far field lies on {far[0].device} and q on {q.device}; move it")
