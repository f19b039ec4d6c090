"""Random Wan transformers of a few thousand parameters, and what goes into them."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

CHANNELS, TEXT = 4, 8


def wan(layers: int = 2, patch: tuple[int, int, int] = (1, 1, 1), seed: int = 0) -> Any:
    kind: Any = WanTransformer3DModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(
            patch_size=patch,
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
        )
        for parameter in net.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def latents(batch: int = 1, frames: int = 5, size: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, CHANNELS, frames, size, size, generator=torch.Generator().manual_seed(seed))


def prompts(batch: int = 1, length: int = 6, padding: int = 0, seed: int = 0) -> Tensor:
    embeds = torch.randn(batch, length, TEXT, generator=torch.Generator().manual_seed(seed + 100))
    return torch.nn.functional.pad(embeds, (0, 0, 0, padding))
