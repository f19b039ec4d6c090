"""Two launches: rows to bytes, then the integer product with both scales and the bias in its epilogue."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
BAND = 8


@triton.jit
def _rows_kernel(x_ptr, smooth_ptr, whole_ptr, token_ptr, inputs, x_row, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < inputs
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        x *= tl.load(smooth_ptr + columns, mask=inside, other=0.0)
    # the sum poisons the scale where anything is not finite; a maximum would pass over NaN
    scale = (tl.max(tl.abs(x)) + tl.sum(x) * 0.0) / 127.0  # type: ignore[operator]
    scale = tl.where(scale == 0.0, 1.0, scale)
    ratio = x / scale
    whole = tl.where(ratio >= 0, tl.floor(ratio + 0.5), tl.ceil(ratio - 0.5))
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    whole = tl.where(scale == scale, whole, 0.0).to(tl.int8)
    tl.store(whole_ptr + row * inputs + columns, whole, mask=inside)
    tl.store(token_ptr + row, scale)


@triton.jit
def _product_kernel(
    whole_ptr,
    weight_ptr,
    token_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # bands of rows share their weights in the second-level cache
    across = tl.cdiv(outputs, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    place = tl.program_id(0)
    band = place // (BAND * across)
    height = tl.minimum(BAND, down - band * BAND)
    inner = place % (BAND * across)
    m = (band * BAND + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inner // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    left = whole_ptr + m.to(tl.int64)[:, None] * inputs
    right = weight_ptr + n.to(tl.int64)[None, :] * inputs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(left + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < inputs), other=0)
        b = tl.load(right + k[:, None], mask=(n[None, :] < outputs) & (k[:, None] < inputs), other=0)
        total += tl.dot(a, b, out_dtype=tl.int32)
    token = tl.load(token_ptr + m, mask=m < rows, other=0.0)
    scale = tl.load(scale_ptr + n, mask=n < outputs, other=0.0)
    y = total.to(tl.float32) * token[:, None] * scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    seen = (m[:, None] < rows) & (n[None, :] < outputs)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * outputs + n[None, :], y.to(y_ptr.dtype.element_ty), mask=seen)


def product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None) -> Tensor:
    """[M, N] of x [M, K]; see `fastdiff_kernels.w8a8.linear`."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    (count, inputs), outputs = rows.shape, len(weight)
    whole = torch.empty((count, inputs), dtype=torch.int8, device=rows.device)
    token = torch.empty(count, dtype=torch.float32, device=rows.device)
    y = torch.empty((count, outputs), dtype=rows.dtype, device=rows.device)
    padded = triton.next_power_of_2(inputs)
    launch: Any = {"num_warps": min(max(padded // 1024, 1), 16)}
    _rows_kernel[(count,)](
        rows, smooth, whole, token, inputs, rows.stride(0), SMOOTH=smooth is not None, BLOCK=padded, **launch
    )
    launch = {"num_warps": 8}
    grid = (triton.cdiv(count, BLOCK_M) * triton.cdiv(outputs, BLOCK_N),)
    _product_kernel[grid](
        whole,
        weight.contiguous(),
        token,
        scale,
        bias,
        y,
        count,
        outputs,
        inputs,
        BIAS=bias is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        BAND=BAND,
        **launch,
    )
    return y
