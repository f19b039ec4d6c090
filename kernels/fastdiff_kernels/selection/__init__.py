"""Choosing key blocks: scores of block pairs, and the best of each row without a full sort.

Every function takes q [B, N, S, D] and k [B, M, T, D] and gives float32 scores [B, N, I, J] that are probabilities of
a row of blocks: they sum to one over J.
"""

import torch
from torch import Tensor

from fastdiff_kernels.attention.blocks import Selection, blocks_in

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
) -> Tensor:
    """Exact share of attention that each key block gets from each query block, given the rows' log-sum-exp [B, N, S].

    One more pass of q kᵀ; nothing of size S by T is kept. `path` is "triton" or "reference".
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (path or ("triton" if q.is_cuda else "reference")) == "triton":
        from . import triton as fast

        return fast.block_mass(q, k, lse, query_block, key_block, scale)
    return block_mass_reference(q, k, lse, query_block, key_block, scale)


def top_k(scores: Tensor, count: int, query_block: int, key_block: int, path: str | None = None) -> Selection:
    """The `count` best key blocks of every row of scores [B, N, I, J]; of equal ones the first; in ascending order."""
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count={count} must be from 1 to the {scores.shape[-1]} key blocks there are")
    if (path or ("triton" if scores.is_cuda else "reference")) == "triton":
        from . import triton as fast

        blocks = fast.top_k(scores, count)
    else:
        blocks = top_k_reference(scores, count)
    counts = torch.full(scores.shape[:3], count, dtype=torch.int32, device=scores.device)
    return Selection(blocks, counts, query_block, key_block)


def count_of(density: float, tokens: int, key_block: int) -> int:
    """Key blocks that a density of 0..1 stands for, at least one."""
    return max(1, round(density * blocks_in(tokens, key_block)))
