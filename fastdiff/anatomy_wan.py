"""What a `WanTransformer3DModel` is made of, for those who run it chunk by chunk.

As `anatomy` for whole pipelines: the one place that knows these private names.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THETA = 10000.0
"""Base of the rotary frequencies; diffusers keeps the finished tables only."""


@dataclass(frozen=True)
class WanShape:
    """Sizes of a Wan transformer.

    Attributes:
        layers: blocks, each with one self- and one cross-attention.
        heads, head: attention heads and channels of each.
        patch: latent frames, rows and columns of one token.
        channels: of the latents that go in.
        rotary: channels of a head that turn by frame, row and column.
    """

    layers: int
    heads: int
    head: int
    patch: tuple[int, int, int]
    channels: int
    rotary: tuple[int, int, int]

    def tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame of this many rows and columns of cells."""
        return (height // self.patch[1]) * (width // self.patch[2])


def wan_problem(transformer: Any) -> str:
    """Why a denoiser cannot run chunk by chunk; empty when it can."""
    if not all(hasattr(transformer, name) for name in ("rope", "condition_embedder", "blocks", "patch_embedding")):
        return f"{type(transformer).__name__} is no WanTransformer3DModel"
    if not all(hasattr(block, "attn1") and hasattr(block, "attn2") for block in transformer.blocks):
        return f"the blocks of {type(transformer).__name__} are not those of Wan"
    if transformer.blocks[0].attn2.add_k_proj is not None:
        return "it attends to image embeddings beside the prompt (an image-to-video model)"
    if transformer.config.patch_size[0] != 1:
        return "its tokens span several latent frames"
    rope = transformer.rope
    expected = torch.cos(rotary_angles(torch.ones(1), rope.t_dim)).repeat_interleave(2, -1)
    if not torch.allclose(rope.freqs_cos[1:2, : rope.t_dim].double().cpu(), expected, atol=1e-5):
        return f"its rotary frequencies are not those of base {THETA:g}"
    return ""


def wan_shape(transformer: Any) -> WanShape:
    """Sizes of a transformer without a `wan_problem`."""
    config, rope = transformer.config, transformer.rope
    return WanShape(
        layers=len(transformer.blocks),
        heads=config.num_attention_heads,
        head=config.attention_head_dim,
        patch=tuple(config.patch_size),
        channels=config.in_channels,
        rotary=(rope.t_dim, rope.h_dim, rope.w_dim),
    )


def rotary_angles(positions: Tensor, channels: int) -> Tensor:
    """Angles by which pairs of channels turn at ``positions`` ``[...]``: float64 ``[..., channels / 2]``."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    return positions.to(torch.float64)[..., None] * THETA**-exponents


def wan_projected(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both normalised) and values of a self-attention, each ``[B, S, N, D]``."""
    if attention.fused_projections:
        query, key, value = attention.to_qkv(hidden).chunk(3, dim=-1)
    else:
        query, key, value = attention.to_q(hidden), attention.to_k(hidden), attention.to_v(hidden)
    query, key = attention.norm_q(query), attention.norm_k(key)
    return tuple(part.unflatten(2, (attention.heads, -1)) for part in (query, key, value))  # type: ignore[return-value]


def wan_query(attention: Any, hidden: Tensor) -> Tensor:
    """Queries of a cross-attention ``[B, S, N, D]``."""
    return attention.norm_q(attention.to_q(hidden)).unflatten(2, (attention.heads, -1))


def wan_text_keys(attention: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a cross-attention ``[B, L, N, D]`` from embedded text ``[B, L, C]``."""
    if attention.fused_projections:
        key, value = attention.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attention.to_k(text), attention.to_v(text)
    return attention.norm_k(key).unflatten(2, (attention.heads, -1)), value.unflatten(2, (attention.heads, -1))


def wan_output(attention: Any, mixed: Tensor) -> Tensor:
    """What an attention gives for mixed values ``[B, S, N, D]``: ``[B, S, C]``."""
    return attention.to_out[1](attention.to_out[0](mixed.flatten(2, 3)))
