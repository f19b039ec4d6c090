"""Choosing key blocks: scores of block pairs, and the best of each row without a full sort.

Every function takes q [B, N, S, D] and k [B, M, T, D] and gives float32 scores [B, N, I, J] that are probabilities of
a row of blocks: they sum to one over J.
"""

import torch
from torch import Tensor

from fastdiff_kernels.attention.blocks import Selection, blocks_in
from fastdiff_kernels.inputs import check_inputs, check_lengths, check_lse

from .reference import antidiagonal_scores, block_mass_reference, pooled_scores, self_similarity, top_k_reference, top_p

__all__ = ["antidiagonal_scores", "block_mass", "pooled_scores", "self_similarity", "top_k", "top_p"]


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    query_block: int,
    key_block: int,
    scale: float | None = None,
    path: str | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Exact share of attention that each key block gets from each query block, given the rows' log-sum-exp [B, N, S].

    One more pass of q kᵀ; nothing of size S by T is kept. `path` is "triton" or "reference"; `lengths`, int32 [B], is
    how many keys count, as in `attention`. A row without keys, whose log-sum-exp is minus infinity, adds nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    path = path or ("triton" if q.is_cuda else "reference")
    check_inputs("block_mass", q, k, wide=path != "triton")
    check_lse(lse, q)
    check_lengths(lengths, q)
    if 0 in (*q.shape[:3], k.shape[2]):
        shape = *q.shape[:2], blocks_in(q.shape[2], query_block), blocks_in(k.shape[2], key_block)
        return q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    if path == "triton":
        from . import triton as fast

        return fast.block_mass(q, k, lse, query_block, key_block, scale, lengths)
    return block_mass_reference(q, k, lse, query_block, key_block, scale, lengths)


def top_k(scores: Tensor, count: int, query_block: int, key_block: int, path: str | None = None) -> Selection:
    """The `count` best key blocks of every row of scores [B, N, I, J]; of equal ones the first; in ascending order.

    A NaN counts as more than anything, so that what is wrong is computed and shows.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count={count} must be from 1 to the {scores.shape[-1]} key blocks there are")
    if (path or ("triton" if scores.is_cuda else "reference")) == "triton" and scores.numel():
        from . import triton as fast

        blocks = fast.top_k(scores, count)
    else:
        blocks = top_k_reference(scores, count)
    counts = torch.full(scores.shape[:3], count, dtype=torch.int32, device=scores.device)
    return Selection(blocks, counts, query_block, key_block)


def count_of(density: float, tokens: int, key_block: int) -> int:
    """Key blocks that a density of 0..1 stands for, at least one."""
    return max(1, round(density * blocks_in(tokens, key_block)))
