"""The pre-pass in two launches: sums and ranges of keys and values, then everything that is quantised.

Partial sums are written and added up again in a fixed order, with no atomics, so that runs repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Quantised, empty

# every program of the second launch reads all partial sums, so there are few of them
CHUNKS = 16
STEP = 64
FP8_MAX = tl.constexpr(448.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _statistics_kernel(
    k_ptr,
    v_ptr,
    parts_ptr,
    keys,
    groups,
    chunk_tokens,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // groups
    m = row % groups
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    k_sum = tl.zeros([PADDED], tl.float32)
    v_sum = tl.zeros([PADDED], tl.float32)
    v_low = tl.full([PADDED], float("inf"), tl.float32)
    v_high = tl.full([PADDED], float("-inf"), tl.float32)
    for part in range(chunk_tokens // STEP):
        tokens = chunk * chunk_tokens + part * STEP + tl.arange(0, STEP)
        seen = (tokens[:, None] < keys) & inside[None, :]
        k = tl.load(
            k_ptr + b * k_batch + m * k_head + tokens[:, None] * k_token + channels[None, :], mask=seen, other=0
        )
        v = tl.load(
            v_ptr + b * v_batch + m * v_head + tokens[:, None] * v_token + channels[None, :], mask=seen, other=0
        )
        v = v.to(tl.float32)
        k_sum += tl.sum(k.to(tl.float32), 0)
        v_sum += tl.sum(v, 0)
        v_low = tl.minimum(v_low, tl.min(tl.where(seen, v, float("inf")), 0))
        v_high = tl.maximum(v_high, tl.max(tl.where(seen, v, float("-inf")), 0))
    at = parts_ptr + (row * tl.num_programs(0) + chunk) * 4 * HEAD + channels
    tl.store(at, k_sum, mask=inside)
    tl.store(at + HEAD, v_sum, mask=inside)
    tl.store(at + 2 * HEAD, v_low, mask=inside)
    tl.store(at + 3 * HEAD, v_high, mask=inside)


@triton.jit
def _round(x):
    return tl.where(x >= 0, tl.floor(x + 0.5), tl.ceil(x - 0.5))


@triton.jit
def _integers(x, HIGH: tl.constexpr):
    """int8 values of a tile and its scale; NaN where anything in it is not finite."""
    scale = (tl.max(tl.abs(x)) + tl.sum(x) * 0.0) / HIGH  # type: ignore[operator]
    scale = tl.where(scale == 0.0, 1.0, scale)
    whole = tl.minimum(tl.maximum(_round(x / scale), -HIGH), HIGH)
    return tl.where(scale == scale, whole, 0.0).to(tl.int8), scale


@triton.jit
def _quantise_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    parts_ptr,
    q8_ptr,
    k8_ptr,
    v8_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    v_mean_ptr,
    shift_ptr,
    q_pool_ptr,
    k_pool_ptr,
    scale,
    queries,
    keys,
    heads,
    groups,
    chunks,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    SMOOTH: tl.constexpr,
    FP8: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b = row // heads
    n = row % heads
    ratio = heads // groups
    m = n // ratio
    k_row = b * groups + m
    q_blocks = tl.cdiv(queries, Q_GROUP)
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    k_mean = tl.zeros([PADDED], tl.float32)
    v_mean = tl.zeros([PADDED], tl.float32)
    v_low = tl.full([PADDED], float("inf"), tl.float32)
    v_high = tl.full([PADDED], float("-inf"), tl.float32)
    for chunk in range(chunks):
        at = parts_ptr + (k_row * chunks + chunk) * 4 * HEAD + channels
        if SMOOTH:
            k_mean += tl.load(at, mask=inside, other=0.0) / keys
        v_mean += tl.load(at + HEAD, mask=inside, other=0.0) / keys
        v_low = tl.minimum(v_low, tl.load(at + 2 * HEAD, mask=inside, other=0.0))
        v_high = tl.maximum(v_high, tl.load(at + 3 * HEAD, mask=inside, other=0.0))
    if part < q_blocks:
        tokens = part * Q_GROUP + tl.arange(0, Q_GROUP)
        seen = (tokens[:, None] < queries) & inside[None, :]
        at = q_ptr + b * q_batch + n * q_head + tokens[:, None] * q_token + channels[None, :]
        q = tl.load(at, mask=seen, other=0).to(tl.float32)
        whole, step = _integers(q, 127.0)
        tl.store(q8_ptr + (row * queries + tokens)[:, None] * HEAD + channels[None, :], whole, mask=seen)
        tl.store(q_scale_ptr + row * q_blocks + part, step * (scale * LOG2E))
        tl.store(shift_ptr + row * queries + tokens, tl.sum(q * k_mean[None, :], 1) * scale, mask=tokens < queries)
        count = tl.minimum(Q_GROUP, queries - part * Q_GROUP)
        tl.store(q_pool_ptr + (row * q_blocks + part) * HEAD + channels, tl.sum(q, 0) / count, mask=inside)
    elif n % ratio == 0:
        place = part - q_blocks
        k_blocks = tl.cdiv(keys, K_GROUP)
        tokens = place * K_GROUP + tl.arange(0, K_GROUP)
        seen = (tokens[:, None] < keys) & inside[None, :]
        at = k_ptr + b * k_batch + m * k_head + tokens[:, None] * k_token + channels[None, :]
        k = tl.load(at, mask=seen, other=0).to(tl.float32)
        k = tl.where(seen, k - k_mean[None, :], 0.0)
        whole, step = _integers(k, 127.0)
        tl.store(k8_ptr + (k_row * keys + tokens)[:, None] * HEAD + channels[None, :], whole, mask=seen)
        tl.store(k_scale_ptr + k_row * k_blocks + place, step)
        count = tl.minimum(K_GROUP, keys - place * K_GROUP)
        tl.store(k_pool_ptr + (k_row * k_blocks + place) * HEAD + channels, tl.sum(k, 0) / count, mask=inside)
        v_scale = (tl.maximum(v_high - v_mean, v_mean - v_low) + v_mean * 0.0) / FP8_MAX
        v_scale = tl.where(v_scale == 0.0, 1.0, v_scale)
        if place == 0:
            tl.store(v_scale_ptr + k_row * HEAD + channels, v_scale, mask=inside)
            tl.store(v_mean_ptr + k_row * HEAD + channels, v_mean, mask=inside)
        if FP8:
            at = v_ptr + b * v_batch + m * v_head + tokens[:, None] * v_token + channels[None, :]
            v = (tl.load(at, mask=seen, other=0).to(tl.float32) - v_mean[None, :]) / v_scale[None, :]
            v = tl.minimum(tl.maximum(v, -FP8_MAX), FP8_MAX).to(v8_ptr.dtype.element_ty)
            tl.store(v8_ptr + (k_row * HEAD + channels)[None, :] * keys + tokens[:, None], v, mask=seen)


def quantise(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fp8: bool, smooth: bool, q_group: int, k_group: int
) -> Quantised:
    """Launch both kernels; see `fastdiff_kernels.quantise.quantise`."""
    for name, size in (("q_group", q_group), ("k_group", k_group)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}={size}: Triton takes powers of two from 16; use path='reference'")
    q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
    batch, heads, queries, head = q.shape
    groups, keys = k.shape[1:3]
    made = empty(q, k, fp8, q_group, k_group)
    chunk = STEP * triton.cdiv(keys, STEP * CHUNKS)
    chunks = triton.cdiv(keys, chunk)
    padded = triton.next_power_of_2(head)
    parts = torch.empty((batch * groups, chunks, 4, head), dtype=torch.float32, device=q.device)
    strides = (*k.stride()[:3], *v.stride()[:3])
    _statistics_kernel[(chunks, batch * groups)](
        k, v, parts, keys, groups, chunk, *strides, HEAD=head, PADDED=padded, STEP=STEP
    )
    _quantise_kernel[(made.q_scale.shape[-1] + made.k_scale.shape[-1], batch * heads)](
        q,
        k,
        v,
        parts,
        made.q,
        made.k,
        made.v if made.v is not None else made.q,
        made.q_scale,
        made.k_scale,
        made.v_scale,
        made.v_mean,
        made.shift,
        made.q_pool,
        made.k_pool,
        scale,
        queries,
        keys,
        heads,
        groups,
        chunks,
        *q.stride()[:3],
        *strides,
        HEAD=head,
        PADDED=padded,
        Q_GROUP=q_group,
        K_GROUP=k_group,
        SMOOTH=smooth,
        FP8=fp8,
    )
    return made
