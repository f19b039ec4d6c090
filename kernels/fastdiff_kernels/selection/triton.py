"""Block mass with a known log-sum-exp, and the best blocks of a row by bisection on the bits of its scores."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels.attention.triton import warps_of


@triton.jit
def _block_mass_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    mass_ptr,
    lengths_ptr,
    scale,
    queries,
    keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    heads,
    groups,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    n = row % heads
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    q_at = q_ptr + b * q_batch + n * q_head + rows[:, None] * q_token + channels[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < queries) & inside[None, :], other=0)
    lse = tl.load(lse_ptr + row * queries + rows, mask=rows < queries, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows without keys
    count = tl.minimum(BLOCK_Q, queries - block * BLOCK_Q)
    blocks = tl.cdiv(keys, BLOCK_K)
    limit = keys
    if LENGTHS:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))
    for j in range(blocks):
        columns = j * BLOCK_K + tl.arange(0, BLOCK_K)
        k_at = k_ptr + b * k_batch + (n // groups) * k_head + columns[None, :] * k_token + channels[:, None]
        k = tl.load(k_at, mask=(columns[None, :] < limit) & inside[:, None], other=0)
        scores = tl.dot(q, k, input_precision="ieee") * scale - lse[:, None]
        weights = tl.where(columns[None, :] < limit, tl.exp(scores), 0.0)
        at = (row * tl.num_programs(0) + block) * blocks + j
        tl.store(mass_ptr + at, tl.sum(weights) / count)


@triton.jit
def _top_k_kernel(scores_ptr, blocks_ptr, width, count, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = places < width
    scores = tl.load(scores_ptr + row * width + places, mask=inside, other=0.0)
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    # an order-preserving map of floats to integers; padding lies below all of them
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    # NaN of either sign above everything
    keys = tl.where(scores == scores, keys, 2**31 - 1)
    low = tl.full([], -(2**31), tl.int64)
    high = tl.full([], 2**31, tl.int64)
    # the largest key that at least `count` entries reach
    for _ in range(32):
        middle = (low + high) // 2
        enough = tl.sum((inside & (keys >= middle)).to(tl.int32)) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = inside & (keys > low)
    equal = inside & (keys == low)
    room = count - tl.sum(above.to(tl.int32))
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    at = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + row * count + at, places, mask=taken)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, query_block: int, key_block: int, scale: float, lengths: Tensor | None
) -> Tensor:
    """See `fastdiff_kernels.selection.block_mass`."""
    q, k = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k))
    batch, heads, queries, head = q.shape
    keys = k.shape[2]
    rows = triton.cdiv(queries, query_block)
    mass = torch.empty((batch, heads, rows, triton.cdiv(keys, key_block)), dtype=torch.float32, device=q.device)
    kernel: Any = _block_mass_kernel
    kernel[(rows, batch * heads)](
        q,
        k,
        lse.contiguous(),
        mass,
        mass if lengths is None else lengths,
        scale,
        queries,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        heads,
        heads // k.shape[1],
        HEAD=head,
        PADDED=max(16, triton.next_power_of_2(head)),
        BLOCK_Q=query_block,
        BLOCK_K=key_block,
        LENGTHS=lengths is not None,
        num_warps=warps_of(query_block, head),
        num_stages=2,
    )
    return mass


def top_k(scores: Tensor, count: int) -> Tensor:
    """int32 [B, N, I, count]; see `fastdiff_kernels.selection.top_k`."""
    flat = scores.float().contiguous()
    width = scores.shape[-1]
    blocks = torch.empty((*scores.shape[:-1], count), dtype=torch.int32, device=scores.device)
    _top_k_kernel[(flat.numel() // width,)](flat, blocks, width, count, WIDTH=triton.next_power_of_2(width))
    return blocks
