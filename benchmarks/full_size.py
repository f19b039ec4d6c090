"""Pipelines of published shapes with random weights, and the same shapes shrunken for tests on a CPU."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Architecture:
    """One pipeline to build.

    Attributes:
        size: pixels a side of its pictures.
        unet: arguments of `UNet2DConditionModel`.
        text: width of each text encoder; two make it a Stable Diffusion XL.
        autoencoder: arguments of `AutoencoderTiny`.
    """

    name: str
    size: int
    unet: dict[str, Any]
    text: tuple[int, ...]
    autoencoder: dict[str, Any]


_TINY_VAE = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
             "num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}  # fmt: skip

# https://huggingface.co/stabilityai/sd-turbo/blob/main/unet/config.json
SD_TURBO = Architecture(
    "sd-turbo",
    512,
    {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    (1024,),
    {},
)

# https://huggingface.co/stabilityai/sdxl-turbo/blob/main/unet/config.json
SDXL_TURBO = Architecture(
    "sdxl-turbo",
    1024,
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    (768, 1280),
    {},
)

SD_SHRUNKEN = Architecture(
    "sd-turbo shrunken",
    64,
    SD_TURBO.unet
    | {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": (2, 2, 4, 4),
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    (16,),
    _TINY_VAE,
)

SDXL_SHRUNKEN = Architecture(
    "sdxl-turbo shrunken",
    64,
    SDXL_TURBO.unet
    | {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    (16, 32),
    _TINY_VAE,
)

FULL = (SD_TURBO, SDXL_TURBO)
SHRUNKEN = (SD_SHRUNKEN, SDXL_SHRUNKEN)


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Any:
    """An image-to-image pipeline with random weights, made on the device it will run on."""
    import diffusers
    from diffusers import AutoencoderTiny, LCMScheduler, UNet2DConditionModel

    from fastdiff.miniature import tokenizer

    words = tokenizer.build()
    # weights are drawn by the device itself, where a CPU would take minutes
    with torch.device(device):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderTiny(**architecture.autoencoder)
        encoders = [_text_encoder(width, number, words) for number, width in enumerate(architecture.text)]
    models: list[torch.nn.Module] = [unet, vae, *encoders]
    for model in models:
        model.to(dtype).eval().requires_grad_(False)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    common: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": words}
    if len(encoders) == 2:
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
            text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer_2=words, **common
        )
    else:
        pipe = diffusers.StableDiffusionImg2ImgPipeline(
            text_encoder=encoders[0],
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
            **common,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(width: int, number: int, words: Any) -> Any:
    """Of the right width but two layers: a prompt is encoded once, outside what is timed."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if number else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
