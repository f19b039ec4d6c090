"""Scores of block pairs and the choice among them, in plain torch."""

import torch
from torch import Tensor

from fastdiff_kernels.attention.blocks import blocks_in
from fastdiff_kernels.inputs import check_inputs
from fastdiff_kernels.quantise.reference import pooled

# scores that are read again before they leave the cache
MASS_BYTES = 1 << 22


def block_mass_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """See `block_mass`; a stretch of queries at a time, so that memory stays bounded."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    lse = torch.where(lse == float("-inf"), float("inf"), lse)  # rows without keys
    step = query_block * max(1, MASS_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2] * query_block))
    parts = []
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        weights = ((q[:, :, rows] @ keys.mT).to(wide) * scale - lse[:, :, rows, None]).exp_()
        if lengths is not None:
            weights = weights.masked_fill(torch.arange(k.shape[2], device=k.device) >= lengths.view(-1, 1, 1, 1), 0)
        across = _sums(weights, key_block, -1)  # [B, N, rows, J]
        parts.append(pooled(across, query_block))
    return torch.cat(parts, 2)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    query_block: int,
    key_block: int,
    scale: float | None = None,
    similar: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax of products of block means (SpargeAttn, https://arxiv.org/abs/2502.18137), and which pairs are forced.

    Args:
        similar: least mean cosine within a block for its mean to speak for it; None trusts every block.

    Returns:
        Scores [B, N, I, J], and bool [B, N, I, J]: pairs of a block whose mean says nothing, always to be computed.
    """
    check_inputs("pooled_scores", q, k)
    by = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    keys = keys - keys.mean(2, keepdim=True)
    queries = q.float()
    scores = pooled(queries, query_block) @ pooled(keys, key_block).mT * by
    if similar is None:
        return scores.softmax(-1), torch.zeros_like(scores, dtype=torch.bool)
    odd_rows = self_similarity(queries, query_block) <= similar
    odd_columns = self_similarity(keys, key_block) <= similar
    forced = odd_rows[..., :, None] | odd_columns[..., None, :]
    kept = scores.masked_fill(odd_columns[..., None, :], float("-inf"))
    # a row in which no block is similar is computed whole anyway
    return torch.nan_to_num(kept.softmax(-1)), forced


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Mean cosine of all pairs within each block of [B, N, S, D]: [B, N, blocks], 1 where all rows point one way."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return pooled(unit, block).square().sum(-1)


def antidiagonal_scores(
    q: Tensor, k: Tensor, query_block: int, key_block: int, stride: int = 8, scale: float | None = None
) -> Tensor:
    """Attention between groups of `stride` tokens by the sums of their antidiagonals (XAttention,
    https://arxiv.org/abs/2503.16428), summed over block pairs. With `stride=1` this is the exact block mass.
    """
    for name, block in (("query_block", query_block), ("key_block", key_block)):
        if block % stride:
            raise ValueError(f"{name}={block} must be a multiple of stride={stride}")
    check_inputs("antidiagonal_scores", q, k)
    by = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    left = _folded(q, stride, reverse=True)  # [B, N, S / stride, stride * D]
    right = _folded(keys, stride, reverse=False)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (left @ right.mT).to(wide) * (by / stride)
    across = _sums(scores.softmax(-1), key_block // stride, -1)
    return pooled(across, query_block // stride)


def top_k_reference(scores: Tensor, count: int) -> Tensor:
    """int32 [B, N, I, count], ascending; of equal scores the first win."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return order.sort(-1).values.to(torch.int32)


def top_p(scores: Tensor, share: float) -> Tensor:
    """Bool [B, N, I, J]: the fewest blocks of each row that together hold `share` of its sum, at least one."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # what rounding leaves of a sum must not call for one more block
    keep = before < share * ordered.sum(-1, keepdim=True) * (1 - 1e-6)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _sums(x: Tensor, size: int, dim: int) -> Tensor:
    groups = blocks_in(x.shape[dim], size)
    spare = groups * size - x.shape[dim]
    return torch.nn.functional.pad(x, (0, spare)).unflatten(dim, (groups, size)).sum(-1)


def _folded(x: Tensor, stride: int, reverse: bool) -> Tensor:
    groups = blocks_in(x.shape[2], stride)
    spare = groups * stride - x.shape[2]
    # the last token again and not zeros, which would attract attention of their own
    x = torch.cat([x, x[:, :, -1:].expand(-1, -1, spare, -1)], 2) if spare else x
    parts = x.unflatten(2, (groups, stride))
    return (parts.flip(3) if reverse else parts).flatten(3)
