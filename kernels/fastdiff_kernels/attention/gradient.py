"""Gradients of attention over chosen key blocks, for training under a fixed selection."""

from typing import Any

import torch
from torch import Tensor

from .blocks import Selection, blocks_in


class BlockSparse(torch.autograd.Function):
    """`apply(q, k, v, scale, selection, path)`: the output of `attention`, differentiable in q, k and v."""

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection | None, path: str
    ) -> Tensor:
        """[B, N, S, D], by "triton", or in torch by "gather" or "masked"."""
        from . import attention

        output, lse = attention(q, k, v, scale=scale, selection=selection, path=path)
        context.save_for_backward(q, k, v, output, lse)
        context.settings = scale, selection, path
        return output

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of q, k, v; None for the rest."""
        q, k, v, output, lse = context.saved_tensors
        scale, selection, path = context.settings
        if path == "triton":
            from .triton_gradient import backward
        else:
            backward = gathered_backward if path == "gather" and selection is not None else masked_backward
        return (*backward(gradients[0], q, k, v, output, lse, scale, selection), None, None, None)


def masked_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    selection: Selection | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's backward with all scores formed and those left out masked."""
    from .cpu import token_mask

    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value, upstream = (one.to(wide) for one in (q, k, v, gradient))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.mT * scale - lse[..., None]).exp()
    seen = token_mask(selection, slice(0, q.shape[2]), k.shape[2], None)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0)
    inner = weights * (upstream @ value.mT - (upstream * output.to(wide)).sum(-1, keepdim=True)) * scale
    dk, dv = (one.unflatten(1, (-1, groups)).sum(2) for one in (inner.mT @ query, weights.mT @ upstream))
    return (inner @ key).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def gathered_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the chosen key blocks gathered beside each query block: costs what the selection keeps."""
    from .cpu import in_blocks, in_tiles, repeated, tail_bias

    size, width = selection.key_block, selection.blocks.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    key, value = repeated(q, k, v)
    batch, heads, queries, head = q.shape
    offsets = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * blocks_in(k.shape[2], size)
    chosen = (selection.blocks + offsets).flatten()
    key, value = (in_blocks(one.to(wide), size) for one in (key, value))  # [B * N * J, size, D]
    near, their = (one.index_select(0, chosen).view(-1, width * size, head) for one in (key, value))
    tiles = (in_tiles(one.to(wide), selection.query_block).flatten(0, 2) for one in (q, gradient, output))
    query, upstream, out = tiles  # [B * N * I, query_block, D]
    # rows beyond the end and rows without keys weigh nothing
    sums = torch.where(lse == float("-inf"), float("inf"), lse).to(wide)
    sums = torch.nn.functional.pad(sums, (0, -queries % selection.query_block), value=float("inf"))
    weights = (query @ near.mT * scale - sums.view(len(query), -1, 1)).exp()
    bias = tail_bias(selection, k.shape[2], None, wide)
    if bias is not None:
        weights = weights.masked_fill(bias.view(len(query), 1, -1) != 0, 0)
    inner = weights * (upstream @ their.mT - (upstream * out).sum(-1, keepdim=True)) * scale
    dq = (inner @ near).view(batch, heads, -1, head)[:, :, :queries]
    ends = []
    for whole, some in ((key, inner.mT @ query), (value, weights.mT @ upstream)):
        total = torch.zeros_like(whole).index_add_(0, chosen, some.reshape(-1, size, head))
        total = total.view(batch, heads, -1, head)[:, :, : k.shape[2]]
        ends.append(total.unflatten(1, (k.shape[1], -1)).sum(2))
    return dq.to(q.dtype), ends[0].to(k.dtype), ends[1].to(v.dtype)


def shape_of(q: Tensor, k: Tensor, selection: Selection | None) -> tuple[int, int, int, int]:
    """Tokens in a query and key block, and how many blocks there are of each."""
    query_block, key_block = (selection.query_block, selection.key_block) if selection else (64, 64)
    return query_block, key_block, blocks_in(q.shape[2], query_block), blocks_in(k.shape[2], key_block)
