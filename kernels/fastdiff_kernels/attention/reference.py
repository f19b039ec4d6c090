"""Attention written out: one query block at a time, its keys gathered, softmax, product. Slow on purpose.

Computed in float32, or float64 where the inputs are. The quantised one walks the key blocks with a running maximum as
the kernel does, since e4m3 rounds what that maximum was when a block was met.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiff_kernels.quantise import FP8_MAX, Quantised

from .blocks import Selection, blocks_in

DENSE_KEY_BLOCK = 64
DENSE_QUERY_BLOCK = 128


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    selection: Selection | None = None,
    lengths: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
    skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashAttention's result (https://arxiv.org/abs/2307.08691) over selected blocks; see `attention` for shapes."""
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_zeros(q.shape, dtype=wide)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    groups = q.shape[1] // k.shape[1]
    for b, n, rows, keys in walk(q, k, selection, lengths):
        if len(keys) == 0:
            continue
        m = n // groups
        scores = q[b, n, rows].to(wide) @ k[b, m, keys].to(wide).mT * scale  # [rows, keys]
        if skip is not None:
            kept = worth(scores, keys // (selection.key_block if selection else DENSE_KEY_BLOCK), skip * math.log(2))
            scores, keys = scores[:, kept], keys[kept]
        lse[b, n, rows] = scores.logsumexp(-1)
        output[b, n, rows] = scores.softmax(-1) @ v[b, m, keys].to(wide)
    return _finish(q, output, lse, far)


def worth(scores: Tensor, blocks: Tensor, skip: float) -> Tensor:
    """Bool [keys]: False in blocks of which no score comes within `skip` of its row's maximum over earlier ones."""
    kept = torch.ones_like(blocks, dtype=torch.bool)
    top = scores.new_full(scores.shape[:1], float("-inf"))
    for block in blocks.unique_consecutive().tolist():
        some = blocks == block
        highest = scores[:, some].amax(-1)
        gain = torch.where(top == float("-inf"), float("inf"), highest - top)
        kept[some] = bool(gain.amax() > -skip)
        top = torch.maximum(top, highest)
    return kept


def walk(
    q: Tensor, k: Tensor, selection: Selection | None, lengths: Tensor | None
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Batch, head, rows of a query block, and the numbers of the keys it attends to, block by block in its order."""
    query_block = selection.query_block if selection else DENSE_QUERY_BLOCK
    key_block = selection.key_block if selection else DENSE_KEY_BLOCK
    for b in range(q.shape[0]):
        limit = min(k.shape[2], int(lengths[b])) if lengths is not None else k.shape[2]
        for n in range(q.shape[1]):
            for i in range(blocks_in(q.shape[2], query_block)):
                rows = slice(i * query_block, min((i + 1) * query_block, q.shape[2]))
                chosen = range(blocks_in(k.shape[2], key_block))
                if selection is not None:
                    chosen = selection.blocks[b, n, i, : int(selection.counts[b, n, i])].tolist()
                starts = torch.tensor(list(chosen), dtype=torch.int64)[:, None] * key_block
                keys = (starts + torch.arange(key_block)).flatten()
                yield b, n, rows, keys[keys < limit].to(q.device)


def quantised_attention_reference(
    q: Tensor,
    quantised: Quantised,
    v: Tensor,
    selection: Selection | None = None,
    lengths: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
    skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What the 8-bit kernels compute: int32 scores, probabilities in v's dtype or e4m3, two-level sums."""
    output = q.new_zeros(q.shape, dtype=torch.float32)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    groups = q.shape[1] // quantised.k.shape[1]
    key_block = selection.key_block if selection else DENSE_KEY_BLOCK
    for b, n, rows, keys in walk(q, quantised.k, selection, lengths):
        m = n // groups
        top = q.new_full((rows.stop - rows.start,), float("-inf"), dtype=torch.float32)
        total = torch.zeros_like(top)
        sums = q.new_zeros((len(top), q.shape[3]), dtype=torch.float32)
        order = keys // key_block
        for block in order.unique_consecutive().tolist():
            some = keys[order == block]
            scores = _scores(quantised, b, n, m, rows, some)  # [rows, keys], in powers of two
            highest = scores.amax(-1)
            gain = torch.where(top == float("-inf"), float("inf"), highest - top)
            if skip is not None and not bool(gain.amax() > -skip):
                continue
            higher = torch.maximum(top, highest)
            base = torch.where(higher == float("-inf"), 0, higher)
            lift = math.log2(FP8_MAX) if quantised.fp8 else 0.0
            weights = torch.exp2(scores - base[:, None] + lift)
            shrink = torch.exp2(top - base)
            total = total * shrink + weights.sum(-1)
            sums = sums * shrink[:, None] + _product(quantised, weights, v, b, m, some)
            top = higher
        if len(keys) == 0:
            continue
        values = sums / total[:, None]
        if quantised.v is not None:
            values = values * quantised.v_scale[b, m] + quantised.v_mean[b, m]
            total = total / FP8_MAX
        output[b, n, rows] = values
        lse[b, n, rows] = math.log(2) * (top + total.log2()) + quantised.shift[b, n, rows]
    return _finish(q, output, lse, far)


def _scores(quantised: Quantised, b: int, n: int, m: int, rows: slice, keys: Tensor) -> Tensor:
    left = quantised.q[b, n, rows].double() @ quantised.k[b, m, keys].double().mT
    numbers = torch.arange(rows.start, rows.stop, device=keys.device)
    q_scale = quantised.q_scale[b, n, numbers // quantised.q_group]
    k_scale = quantised.k_scale[b, m, keys // quantised.k_group]
    return left.float() * q_scale[:, None] * k_scale


def _product(quantised: Quantised, weights: Tensor, v: Tensor, b: int, m: int, keys: Tensor) -> Tensor:
    if quantised.v is None:
        return weights.to(v.dtype).float() @ v[b, m, keys].float()
    return weights.to(torch.float8_e4m3fn).float() @ quantised.v[b, m][:, keys].float().mT


def _finish(q: Tensor, output: Tensor, lse: Tensor, far: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    from . import merge

    if far is not None:
        output, lse = merge(output, lse, *far)
    return output.to(q.dtype), lse


def attention_backward_reference(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the gradient [B, N, S, D] of the output, by FlashAttention's formulas."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(one, dtype=wide) for one in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for b, n, rows, keys in walk(q, k, selection, None):
        if len(keys) == 0:
            continue
        m = n // groups
        query, key, value = q[b, n, rows].to(wide), k[b, m, keys].to(wide), v[b, m, keys].to(wide)
        upstream = gradient[b, n, rows].to(wide)
        weights = (query @ key.mT * scale).softmax(-1)
        share = upstream @ value.mT
        inner = weights * (share - (weights * share).sum(-1, keepdim=True)) * scale
        dq[b, n, rows] = inner @ key
        dk[b, m].index_add_(0, keys, inner.mT @ query)
        dv[b, m].index_add_(0, keys, weights.mT @ upstream)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
