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
        """[B, N, S, D], by "triton" or "masked" (torch)."""
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
            backward = masked_backward
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
    seen = token_mask(selection, q.shape[2], k.shape[2], None)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0)
    inner = weights * (upstream @ value.mT - (upstream * output.to(wide)).sum(-1, keepdim=True)) * scale
    dk, dv = (one.unflatten(1, (-1, groups)).sum(2) for one in (inner.mT @ query, weights.mT @ upstream))
    return (inner @ key).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def shape_of(q: Tensor, k: Tensor, selection: Selection | None) -> tuple[int, int, int, int]:
    """Tokens in a query and key block, and how many blocks there are of each."""
    query_block, key_block = (selection.query_block, selection.key_block) if selection else (64, 64)
    return query_block, key_block, blocks_in(q.shape[2], query_block), blocks_in(k.shape[2], key_block)
