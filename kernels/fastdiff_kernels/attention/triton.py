"""The kernel family: exact or 8-bit, dense or by look-up table, with the log-sum-exp out and a far field merged in.

One program takes one block of queries through its key blocks with a running maximum, in powers of two (scale times
log2 e is folded in). Eight-bit products of probabilities and values go to a fresh tile each and are then added in
float32: on Hopper the e4m3 unit keeps too few bits to sum over many blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels.quantise import Quantised

from .blocks import Selection, blocks_in

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# log2 of 448, the largest e4m3 number: probabilities use the whole range
LIFT = tl.constexpr(8.807354922057604)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    v_mean_ptr,
    shift_ptr,
    blocks_ptr,
    counts_ptr,
    lengths_ptr,
    far_ptr,
    far_lse_ptr,
    scale,
    skip,
    queries,
    keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    v_channel,
    heads,
    groups,
    width,
    q_scales,
    k_scales,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    SPARSE: tl.constexpr,
    INT8: tl.constexpr,
    FP8: tl.constexpr,
    FAR: tl.constexpr,
    LENGTHS: tl.constexpr,
    SKIP: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)  # batch times heads
    b = row // heads
    n = row % heads
    m = n // groups
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    q_at = q_ptr + b * q_batch + n * q_head + rows[:, None] * q_token + channels[None, :]
    q = tl.load(q_at, mask=(rows[:, None] < queries) & inside[None, :], other=0)
    q_scale = tl.full([BLOCK_Q], 1.0, tl.float32)
    if INT8:
        q_scale = tl.load(q_scale_ptr + row * q_scales + rows // Q_GROUP, mask=rows < queries, other=0.0)
    k_base = k_ptr + b * k_batch + m * k_head
    v_base = v_ptr + b * v_batch + m * v_head
    k_row = b * (heads // groups) + m
    limit = keys
    if LENGTHS:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))
    list_at = (row * tl.num_programs(0) + block).to(tl.int64)
    count = tl.cdiv(keys, BLOCK_K)
    if SPARSE:
        count = tl.load(counts_ptr + list_at)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    for j in range(count):
        number = j
        if SPARSE:
            number = tl.load(blocks_ptr + list_at * width + j)
        columns = number * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = columns < limit
        k_at = k_base + columns[None, :] * k_token + channels[:, None]
        k = tl.load(k_at, mask=seen[None, :] & inside[:, None], other=0)
        if INT8:
            k_scale = tl.load(k_scale_ptr + k_row * k_scales + columns // K_GROUP, mask=seen, other=0.0)
            scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
        else:
            scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest = tl.max(scores, 1)
        worth = True
        if SKIP:
            # a row that has seen nothing yet cannot do without
            gain = tl.where(top == float("-inf"), float("inf"), highest - top)
            worth = tl.max(gain, 0) > -skip
        if worth:
            higher = tl.maximum(top, highest)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None] + LIFT) if FP8 else tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            v_at = v_base + columns[:, None] * v_token + channels[None, :] * v_channel
            v = tl.load(v_at, mask=seen[:, None] & inside[None, :], other=0.0)
            fresh = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            sums = sums * shrink[:, None] + fresh
            top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    output = sums / safe[:, None]
    lse = tl.where(total == 0.0, float("-inf"), LN2 * (top + tl.log2(safe)))
    if FP8:
        v_scale = tl.load(v_scale_ptr + k_row * HEAD + channels, mask=inside, other=0.0)
        v_mean = tl.load(v_mean_ptr + k_row * HEAD + channels, mask=inside, other=0.0)
        output = tl.where(total[:, None] == 0.0, 0.0, output * v_scale[None, :] + v_mean[None, :])
        lse = lse - LN2 * LIFT
    if INT8:
        lse = lse + tl.load(shift_ptr + row * queries + rows, mask=rows < queries, other=0.0)
    written = (rows[:, None] < queries) & inside[None, :]
    at = (row * queries + rows)[:, None] * HEAD + channels[None, :]
    if FAR:
        far = tl.load(far_ptr + at, mask=written, other=0.0).to(tl.float32)
        far_lse = tl.load(far_lse_ptr + row * queries + rows, mask=rows < queries, other=float("-inf"))
        most = tl.maximum(lse, far_lse)
        most = tl.where(most == float("-inf"), 0.0, most)
        near_weight = tl.exp(lse - most)
        far_weight = tl.exp(far_lse - most)
        both = near_weight + far_weight
        far = tl.where(far_weight[:, None] > 0.0, far_weight[:, None] * far, 0.0)
        joined = near_weight[:, None] * output + far
        safe = tl.where(both == 0.0, 1.0, both)
        output = joined / safe[:, None]
        lse = tl.where(both == 0.0, float("-inf"), most + tl.log(safe))
    tl.store(out_ptr + at, output.to(out_ptr.dtype.element_ty), mask=written)
    tl.store(lse_ptr + row * queries + rows, lse, mask=rows < queries)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    selection: Selection | None,
    quantised: Quantised | None,
    lengths: Tensor | None,
    far: tuple[Tensor, Tensor] | None,
    skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see `fastdiff_kernels.attention.attention` for arguments and results."""
    batch, heads, queries, head = q.shape
    fp8 = quantised is not None and quantised.v is not None
    limit = shared_bytes(q.device)
    bytes_each = q.element_size() if quantised is None else 1
    block_q, block_k = dense_blocks(head, quantised is not None, limit, bytes_each, v.element_size())
    if selection is not None:
        block_q, block_k = selection.query_block, selection.key_block
        check_blocks(block_q, block_k, fp8)
    output = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    left, right, values = q, k, v
    if quantised is not None:
        left, right = quantised.q, quantised.k
        values = quantised.v.mT if quantised.v is not None else v
    left, right = (one if one.stride(-1) == 1 else one.contiguous() for one in (left, right))
    nothing = lse  # a pointer that is never read
    many = quantised
    kernel: Any = _attention_kernel
    far_output, far_lse = (far[0].contiguous(), far[1].contiguous()) if far else (nothing, nothing)
    kernel[(blocks_in(queries, block_q), batch * heads)](
        left,
        right,
        values,
        output,
        lse,
        many.q_scale if many else nothing,
        many.k_scale if many else nothing,
        many.v_scale if many else nothing,
        many.v_mean if many else nothing,
        many.shift if many else nothing,
        selection.blocks.contiguous() if selection else nothing,
        selection.counts.contiguous() if selection else nothing,
        lengths if lengths is not None else nothing,
        far_output,
        far_lse,
        scale,
        0.0 if skip is None else skip,
        queries,
        k.shape[2],
        *left.stride()[:3],
        *right.stride()[:3],
        *values.stride(),
        heads,
        heads // k.shape[1],
        selection.blocks.shape[-1] if selection else 0,
        many.q_scale.shape[-1] if many else 0,
        many.k_scale.shape[-1] if many else 0,
        HEAD=head,
        PADDED=max(16 if not many else 32, triton.next_power_of_2(head)),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        Q_GROUP=many.q_group if many else 1,
        K_GROUP=many.k_group if many else 1,
        SPARSE=selection is not None,
        INT8=many is not None,
        FP8=fp8,
        FAR=far is not None,
        LENGTHS=lengths is not None,
        SKIP=skip is not None,
        num_warps=warps_of(block_q, head),
        num_stages=stages_of(head, block_q, block_k, left.element_size(), values.element_size(), limit),
    )
    return output, lse


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block of threads may have; that of Hopper where kernels are interpreted."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def dense_blocks(head: int, quantised: bool, limit: int, key_bytes: int = 2, value_bytes: int = 2) -> tuple[int, int]:
    """Tokens in a query and key block where no selection says so: the largest that fit in registers and `limit`."""
    hopper = limit > 200_000
    padded = triton.next_power_of_2(head)
    if padded > 128:
        block_q, block_k = (128, 64) if hopper else (64, 32)
    else:
        block_q, block_k = 128, 128 if quantised or (head > 64 and hopper) else 64
    # float32 takes twice the shared memory of the dtypes that the sizes above are for
    while padded * (block_q * key_bytes + block_k * (key_bytes + value_bytes)) > limit and block_q > 16:
        block_q, block_k = block_q // 2, max(16, block_k // 2)
    return block_q, block_k


def stages_of(head: int, block_q: int, block_k: int, key_bytes: int, value_bytes: int, limit: int) -> int:
    """How many key blocks are in flight, 1 to 3, so that they fit in `limit` bytes beside the queries.

    Raises:
        ValueError: not even one does.
    """
    padded = triton.next_power_of_2(head)
    fixed, each = block_q * padded * key_bytes, block_k * padded * (key_bytes + value_bytes)
    if fixed + each > limit:
        raise ValueError(
            f"blocks of {block_q} queries and {block_k} keys with {head} channels need {fixed + each} bytes of shared "
            f"memory, and this GPU has {limit}; choose smaller blocks"
        )
    return min(3, (limit - fixed) // each)


def warps_of(query_block: int, head: int) -> int:
    """Warps that hold a tile of sums in registers without spilling."""
    return 8 if query_block * triton.next_power_of_2(head) > 64 * 64 else 4


def check_blocks(query_block: int, key_block: int, fp8: bool = False) -> None:
    """Raise a `ValueError` for blocks that matrix units cannot take."""
    least = 32 if fp8 else 16
    for name, size, low in (("query_block", query_block, 16), ("key_block", key_block, least)):
        if size < low or size > 256 or size & (size - 1):
            raise ValueError(f"{name}={size}: Triton takes powers of two from {low} to 256; use path='reference'")
