"""The miniature video model `mini-wan`, as ordinary diffusers parts: architecture here, weights beside it.

A small Wan: a causal video autoencoder (`AutoencoderKLWan`, 4 frames and 8 x 8 pixels to a latent cell), a T5 text
encoder (the pipeline pads prompts to 512 tokens, which only an encoder without a table of positions takes), and a
`WanTransformer3DModel` over one token a latent cell. The transformer is trained twice over in one: with full attention
and one noise level a clip, as diffusers' pipeline calls it, and block-causally with one noise level a frame, for
rollouts without end.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from . import tokenizer

SIZE = 32
FRAMES = 17
CHANNELS = 16
TEXT_WIDTH = 128
WIDTH = 192
SHIFT = 3.0
PER_LATENT = 4  # frames of video to a latent frame, after the first one


def autoencoder() -> AutoencoderKLWan:
    """``[B, 3, 1 + 4 k, 32, 32]`` in -1..1 to ``[B, 16, 1 + k, 4, 4]``; causal in time."""
    kind: Any = AutoencoderKLWan
    return kind(
        base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=PER_LATENT,
        scale_factor_spatial=8,
    )


def text_encoder() -> UMT5EncoderModel:
    """Two T5 layers of width 128."""
    size = len(tokenizer.build())
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=size,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=size - 1,
            eos_token_id=size - 1,
            decoder_start_token_id=size - 2,
        )
    )


def transformer() -> WanTransformer3DModel:
    """Six blocks of width 192, one token a latent cell; 4 million parameters."""
    kind: Any = WanTransformer3DModel
    return kind(
        patch_size=(1, 1, 1),
        num_attention_heads=WIDTH // 48,
        attention_head_dim=48,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * WIDTH,
        num_layers=6,
        cross_attn_norm=True,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching, timesteps 0..1000 for sigmas 0..1, shifted towards noise."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def pipeline(vae: Any, text: UMT5EncoderModel, denoiser: WanTransformer3DModel) -> WanPipeline:
    """The parts as a plain `WanPipeline`."""
    kind: Any = WanPipeline
    return kind(
        tokenizer=tokenizer.build(),
        text_encoder=text.eval(),
        vae=vae.eval(),
        transformer=denoiser.eval(),
        scheduler=scheduler(),
    )


def untrained(seed: int = 0) -> WanPipeline:
    """The same architecture with random weights drawn from `seed`, for tests of mechanics rather than of pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pipeline(autoencoder(), text_encoder(), transformer())
