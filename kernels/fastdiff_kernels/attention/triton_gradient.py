"""Backward kernels: one over query blocks for q, one over key blocks, by the transposed table, for k and v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Selection
from .gradient import shape_of
from .triton import check_blocks


@triton.jit
def _tile(ptr, row, tokens, limit, channels, HEAD: tl.constexpr):
    """Rows `tokens` of a contiguous [rows, limit, HEAD]."""
    at = ptr + (row * limit + tokens)[:, None] * HEAD + channels[None, :]
    return tl.load(at, mask=(tokens[:, None] < limit) & (channels[None, :] < HEAD), other=0.0)


@triton.jit
def _query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    up_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    blocks_ptr,
    counts_ptr,
    scale,
    queries,
    keys,
    width,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, PADDED)
    q = _tile(q_ptr, row, rows, queries, channels, HEAD)
    up = _tile(up_ptr, row, rows, queries, channels, HEAD)
    # exp of minus infinity is the nothing that rows beyond the end and rows without keys contribute
    lse = tl.load(lse_ptr + row * queries + rows, mask=rows < queries, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + row * queries + rows, mask=rows < queries, other=0.0)
    sums = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    list_at = row * tl.num_programs(0) + block
    count = tl.cdiv(keys, BLOCK_K)
    if SPARSE:
        count = tl.load(counts_ptr + list_at)
    for j in range(count):
        number = j
        if SPARSE:
            number = tl.load(blocks_ptr + list_at * width + j)
        columns = number * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, row, columns, keys, channels, HEAD)
        v = _tile(v_ptr, row, columns, keys, channels, HEAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.where(columns[None, :] < keys, tl.exp(scores - lse[:, None]), 0.0)
        share = tl.dot(up, tl.trans(v), input_precision="ieee")
        inner = weights * (share - delta[:, None]) * scale
        sums += tl.dot(inner.to(k.dtype), k, input_precision="ieee")
    at = dq_ptr + (row * queries + rows)[:, None] * HEAD + channels[None, :]
    tl.store(at, sums.to(dq_ptr.dtype.element_ty), mask=(rows[:, None] < queries) & (channels[None, :] < HEAD))


@triton.jit
def _key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    up_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    blocks_ptr,
    counts_ptr,
    scale,
    queries,
    keys,
    width,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    channels = tl.arange(0, PADDED)
    k = _tile(k_ptr, row, columns, keys, channels, HEAD)
    v = _tile(v_ptr, row, columns, keys, channels, HEAD)
    dk = tl.zeros([BLOCK_K, PADDED], tl.float32)
    dv = tl.zeros([BLOCK_K, PADDED], tl.float32)
    list_at = row * tl.num_programs(0) + block
    count = tl.cdiv(queries, BLOCK_Q)
    if SPARSE:
        count = tl.load(counts_ptr + list_at)
    for j in range(count):
        number = j
        if SPARSE:
            number = tl.load(blocks_ptr + list_at * width + j)
        rows = number * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = _tile(q_ptr, row, rows, queries, channels, HEAD)
        up = _tile(up_ptr, row, rows, queries, channels, HEAD)
        lse = tl.load(lse_ptr + row * queries + rows, mask=rows < queries, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + row * queries + rows, mask=rows < queries, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [keys, queries]
        weights = tl.where(columns[:, None] < keys, tl.exp(scores - lse[None, :]), 0.0)
        dv += tl.dot(weights.to(up.dtype), up, input_precision="ieee")
        share = tl.dot(v, tl.trans(up), input_precision="ieee")
        inner = weights * (share - delta[None, :]) * scale
        dk += tl.dot(inner.to(q.dtype), q, input_precision="ieee")
    written = (columns[:, None] < keys) & (channels[None, :] < HEAD)
    at = (row * keys + columns)[:, None] * HEAD + channels[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=written)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=written)


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    selection: Selection | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, N, S, D] and k, v [B, M, T, D] in their dtypes."""
    groups = q.shape[1] // k.shape[1]
    query_block, key_block, _, columns = shape_of(q, k, selection)
    check_blocks(query_block, key_block)
    rows_of_keys = selection.transposed(columns) if selection else None
    key, value = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, key, value, up = (one.contiguous() for one in (q, key, value, gradient))
    delta = (up.float() * output.float()).sum(-1)  # [B, N, S]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(key), torch.empty_like(value)
    head = q.shape[3]
    sizes = dict(
        HEAD=head, PADDED=max(16, triton.next_power_of_2(head)), BLOCK_Q=query_block, BLOCK_K=key_block,
        SPARSE=selection is not None, num_warps=8, num_stages=2,
    )  # fmt: skip
    ends = (scale, q.shape[2], k.shape[2])
    heads = q.shape[0] * q.shape[1]
    table = _table(selection, lse)
    _query_gradient_kernel[(triton.cdiv(q.shape[2], query_block), heads)](
        q, key, value, up, lse, delta, dq, *table[:2], *ends, table[2], **sizes
    )
    table = _table(rows_of_keys, lse)
    _key_gradient_kernel[(columns, heads)](q, key, value, up, lse, delta, dk, dv, *table[:2], *ends, table[2], **sizes)
    dk, dv = (one.unflatten(1, (-1, groups)).sum(2) for one in (dk, dv))
    return dq, dk, dv


def _table(selection: Selection | None, nothing: Tensor) -> tuple[Tensor, Tensor, int]:
    if selection is None:
        return nothing, nothing, 0
    return selection.blocks.contiguous(), selection.counts.contiguous(), selection.blocks.shape[-1]
