"""The linear branch in Triton, forward and backward: nothing of the features is ever written to memory.

With A = φ(q), B = φ(k): the state is BᵀV and Bᵀ1, the output A BᵀV over A Bᵀ1. Gradients need the same three products:
tokens into a state, a state onto tokens, and a state's gradient pulled back through φ. Operands of products have the
dtype of q, sums are float32. Partial states are added up in a fixed order, so that runs repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {"softmax": 0, "elu": 1, "relu": 2}
EPSILON = tl.constexpr(1e-5)
CHUNKS = 32
STEP = 64


@triton.jit
def _tile(ptr, row, tokens, limit, channels, HEAD: tl.constexpr):
    at = ptr + (row * limit + tokens)[:, None] * HEAD + channels[None, :]
    return tl.load(at, mask=(tokens[:, None] < limit) & (channels[None, :] < HEAD), other=0.0)


@triton.jit
def _features(x, seen, KIND: tl.constexpr):
    """Float32 φ of a tile, 0 where not seen."""
    x = x.to(tl.float32)
    if KIND == 0:
        x = tl.where(seen, x, float("-inf"))
        top = tl.max(x, 1)
        e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(e, 1)
        f = e / tl.where(total == 0.0, 1.0, total)[:, None]
    elif KIND == 1:
        # a minimum or maximum would take the other side of a NaN
        f = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        f = tl.where(x < 0, 0.0, x)
    return tl.where(seen, f, 0.0)


@triton.jit
def _state_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    state_ptr,
    sums_ptr,
    tokens_,
    chunk_tokens,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Partial φ(x)ᵀy [D, D] and φ(x)ᵀw [D] of one chunk of tokens."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, PADDED)
    state = tl.zeros([PADDED, PADDED], tl.float32)
    sums = tl.zeros([PADDED], tl.float32)
    for part in range(chunk_tokens // STEP):
        tokens = chunk * chunk_tokens + part * STEP + tl.arange(0, STEP)
        seen = (tokens[:, None] < tokens_) & (channels[None, :] < HEAD)
        f = _features(_tile(x_ptr, row, tokens, tokens_, channels, HEAD), seen, KIND)
        y = _tile(y_ptr, row, tokens, tokens_, channels, HEAD)
        state += tl.dot(tl.trans(f.to(x_ptr.dtype.element_ty)), y.to(x_ptr.dtype.element_ty), input_precision="ieee")
        w = tl.full([STEP], 1.0, tl.float32)
        if WEIGHTED:
            w = tl.load(w_ptr + row * tokens_ + tokens, mask=tokens < tokens_, other=0.0)
        sums += tl.sum(f * w[:, None], 0)
    at = row * tl.num_programs(0) + chunk
    inside = (channels[:, None] < HEAD) & (channels[None, :] < HEAD)
    tl.store(state_ptr + at * HEAD * HEAD + channels[:, None] * HEAD + channels[None, :], state, mask=inside)
    tl.store(sums_ptr + at * HEAD + channels, sums, mask=channels < HEAD)


@triton.jit
def _apply_kernel(
    x_ptr,
    state_ptr,
    sums_ptr,
    out_ptr,
    total_ptr,
    tokens_,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
):
    """φ(x) state over φ(x)·sums, and the latter."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * STEP + tl.arange(0, STEP)
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    seen = (tokens[:, None] < tokens_) & inside[None, :]
    f = _features(_tile(x_ptr, row, tokens, tokens_, channels, HEAD), seen, KIND)
    state = _tile(state_ptr, row, channels, HEAD, channels, HEAD)
    sums = tl.load(sums_ptr + row * HEAD + channels, mask=inside, other=0.0)
    total = tl.sum(f * sums[None, :], 1) + EPSILON
    output = tl.dot(f.to(state.dtype), state, input_precision="ieee") / total[:, None]
    at = (row * tokens_ + tokens)[:, None] * HEAD + channels[None, :]
    tl.store(out_ptr + at, output, mask=seen)
    tl.store(total_ptr + row * tokens_ + tokens, total, mask=tokens < tokens_)


@triton.jit
def _pull_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    state_ptr,
    sums_ptr,
    dx_ptr,
    product_ptr,
    tokens_,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The gradient y stateᵀ + w ⊗ sums of φ(x), pulled back to x; with PRODUCT also φ(x) state."""
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * STEP + tl.arange(0, STEP)
    channels = tl.arange(0, PADDED)
    inside = channels < HEAD
    seen = (tokens[:, None] < tokens_) & inside[None, :]
    x = _tile(x_ptr, row, tokens, tokens_, channels, HEAD)
    f = _features(x, seen, KIND)
    state = _tile(state_ptr, row, channels, HEAD, channels, HEAD)
    sums = tl.load(sums_ptr + row * HEAD + channels, mask=inside, other=0.0)
    y = _tile(y_ptr, row, tokens, tokens_, channels, HEAD)
    w = tl.full([STEP], 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(w_ptr + row * tokens_ + tokens, mask=tokens < tokens_, other=0.0)
    df = tl.dot(y.to(state.dtype), tl.trans(state), input_precision="ieee") + w[:, None] * sums[None, :]
    if KIND == 0:
        dx = f * (df - tl.sum(df * f, 1)[:, None])
    elif KIND == 1:
        dx = df * tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        dx = tl.where(x > 0, df, 0.0)
    at = (row * tokens_ + tokens)[:, None] * HEAD + channels[None, :]
    tl.store(dx_ptr + at, dx, mask=seen)
    if PRODUCT:
        tl.store(product_ptr + at, tl.dot(f.to(state.dtype), state, input_precision="ieee"), mask=seen)


def state(x: Tensor, y: Tensor, w: Tensor | None, features: str) -> tuple[Tensor, Tensor]:
    """φ(x)ᵀy [B, N, D, D] in x's dtype and float32 φ(x)ᵀw [B, N, D].

    x and y [B, N, S, D] and w [B, N, S] are contiguous; where w is None it is ones.
    """
    *rows, tokens, head = x.shape
    chunk = STEP * triton.cdiv(tokens, STEP * CHUNKS)
    chunks = triton.cdiv(tokens, chunk)
    parts = torch.empty((*rows, chunks, head, head), dtype=torch.float32, device=x.device)
    sums = torch.empty((*rows, chunks, head), dtype=torch.float32, device=x.device)
    _state_kernel[(chunks, x.shape[:-2].numel())](
        x, y, x if w is None else w, parts, sums, tokens, chunk, **_sizes(head, features), WEIGHTED=w is not None
    )
    return parts.sum(-3).to(x.dtype), sums.sum(-2)


def apply(x: Tensor, into: Tensor, sums: Tensor, features: str) -> tuple[Tensor, Tensor]:
    """Float32 φ(x) state over φ(x)·sums [B, N, S, D], and the denominator [B, N, S]."""
    output = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _apply_kernel[_grid(x)](x, into, sums, output, total, x.shape[-2], **_sizes(x.shape[-1], features))
    return output, total


def pull(
    x: Tensor, y: Tensor, w: Tensor | None, into: Tensor, sums: Tensor, features: str, product: bool = False
) -> tuple[Tensor, Tensor]:
    """Float32 gradient [B, N, S, D] of x from that of φ(x), and φ(x) state where `product` asks for it."""
    dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out = torch.empty_like(dx) if product else dx
    flags = dict(WEIGHTED=w is not None, PRODUCT=product)
    _pull_kernel[_grid(x)](
        x, y, x if w is None else w, into, sums, dx, out, x.shape[-2], **_sizes(x.shape[-1], features), **flags
    )
    return dx, out


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[-2], STEP), x.shape[:-2].numel()


def _sizes(head: int, features: str) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(head))
    return dict(HEAD=head, PADDED=padded, KIND=KINDS[features], STEP=STEP, num_warps=8, num_stages=1)


class Linear(torch.autograd.Function):
    """`apply(q, k, v, features)`: see `linear_attention`; q, k and v [B, N, S or T, D] with as many heads each."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, features: str) -> Tensor:
        """Float32 [B, N, S, D]."""
        q, k, v = (one.contiguous() for one in (q, k, v))
        into, sums = state(k, v, None, features)
        output, total = apply(q, into, sums, features)
        context.save_for_backward(q, k, v, into, sums, output, total)
        context.features = features
        return output

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of q, k and v."""
        q, k, v, into, sums, output, total = context.saved_tensors
        up = gradients[0].float() / total[..., None]
        w = -(up * output).sum(-1)
        dq, _ = pull(q, up.contiguous(), w, into, sums, context.features)
        d_into, d_sums = state(q, up.contiguous(), w, context.features)
        dk, dv = pull(k, v, None, d_into, d_sums, context.features, product=True)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
