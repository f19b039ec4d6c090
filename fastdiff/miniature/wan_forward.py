"""`WanTransformer3DModel` for training: one timestep a frame, block-causal if asked, text padding counted and not held.

The same function as the model's own forward (given a timestep for each token and the mask), written so that a CPU has
less to do: modulations once a frame instead of once a token, everything in the weights' dtype except attention. The
zeros that the pipeline appends to a prompt are all alike, so one of them stands for all with the logarithm of their
number added to its score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor


def block_causal(frames: int, tokens: int) -> Tensor:
    """Boolean ``[F S, F S]``: a token sees the tokens of its own frame and of those before it."""
    frame = torch.arange(frames).repeat_interleave(tokens)
    return frame[:, None] >= frame[None, :]


def text_bias(width: int, padding: int) -> Tensor:
    """Scores added to ``width`` text tokens and to the one that stands for ``padding`` more of zeros.

    Returns:
        float32 ``[1, 1, 1, width + 1]``.
    """
    bias = torch.zeros(1, 1, 1, width + 1)
    bias[..., -1] = math.log(padding) if padding else -math.inf
    return bias


def forward(
    net: Any, x: Tensor, timestep: Tensor, text: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Velocity ``[B, C, F, h, w]``.

    Args:
        net: a `WanTransformer3DModel` with patches of one cell.
        x: noisy latents ``[B, C, F, h, w]``.
        timestep: 0..1000, one a frame ``[B, F]``.
        text: ``[B, L, E]``; with a ``bias`` of `text_bias` one more token of zeros is added to it.
        mask: boolean ``[F S, F S]`` of `block_causal`; full attention where None.
    """
    batch, _, frames, height, width = x.shape
    rotation = net.rope(x)
    hidden = net.patch_embedding(x).flatten(3).permute(0, 2, 3, 1)  # [B, F, S, C]
    embedder = net.condition_embedder
    steps = embedder.timesteps_proj(timestep.flatten()).to(hidden.dtype)
    embedded = embedder.time_embedder(steps)
    modulation = embedder.time_proj(embedder.act_fn(embedded)).view(batch, frames, 6, 1, -1)
    if bias is not None:
        text = functional.pad(text, (0, 0, 0, 1))
    context = embedder.text_embedder(text)
    for block in net.blocks:
        hidden = _block(block, hidden, context, modulation, rotation, bias, mask)
    shift, scale = (net.scale_shift_table[:, :, None] + embedded.view(batch, frames, 1, 1, -1)).unbind(2)
    hidden = net.proj_out(_normed(net.norm_out, hidden) * (1 + scale) + shift)
    return hidden.view(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


def _normed(norm: Any, x: Tensor) -> Tensor:
    weight, bias = norm.weight, norm.bias
    return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _block(block: Any, hidden: Tensor, context: Tensor, modulation: Tensor, rotation, bias, mask) -> Tensor:
    shift, scale, gate, shift_ff, scale_ff, gate_ff = (block.scale_shift_table[..., None, :] + modulation).unbind(2)
    normed = _normed(block.norm1, hidden) * (1 + scale) + shift
    flat = normed.flatten(1, 2)
    hidden = hidden + gate * _attention(block.attn1, flat, flat, rotation, mask).view_as(hidden)
    normed = _normed(block.norm2, hidden).flatten(1, 2)
    hidden = hidden + _attention(block.attn2, normed, context, None, bias).view_as(hidden)
    normed = _normed(block.norm3, hidden) * (1 + scale_ff) + shift_ff
    return hidden + gate_ff * block.ffn(normed)


def _attention(attn: Any, x: Tensor, context: Tensor, rotation: Any, mask: Tensor | None) -> Tensor:
    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()  # [B, N, S, D]

    q, k, v = heads(attn.norm_q(attn.to_q(x))), heads(attn.norm_k(attn.to_k(context))), heads(attn.to_v(context))
    if rotation is not None:
        q, k = _rotated(q, rotation), _rotated(k, rotation)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(x.dtype))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.squeeze(0).transpose(0, 1)[None].float() for part in rotation)  # [1, 1, S, D]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin
