"""The miniature text-to-image model, as ordinary diffusers parts: architecture here, weights beside it."""

import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from . import tokenizer

SIZE = 64
LATENT_CHANNELS = 4
TEXT_WIDTH = 128


def autoencoder() -> AutoencoderTiny:
    """Four times smaller in each direction: [B, 3, 64, 64] in [-1, 1] to [B, 4, 16, 16]."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 2, 3),
        num_decoder_blocks=(3, 3, 0),
    )


def text_encoder() -> CLIPTextModel:
    """Two CLIP layers of width 128 over 24 tokens."""
    size = len(tokenizer.build())
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )


def unet() -> UNet2DConditionModel:
    """Cross-attention at every resolution, the latent's own 16 x 16 included, and the text beside the timestep.

    Without the first, shapes stay blobs; without the second (one vector pooled from the text, added to the timestep's
    embedding and so to every residual block), place and shape are learned several times more slowly.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 6, 9),  # type: ignore[arg-type]  # diffusers' name for the number of heads
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's schedule with v-prediction."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


def pipeline(vae: AutoencoderTiny, text: CLIPTextModel, denoiser: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The parts as a plain `StableDiffusionPipeline`."""
    return StableDiffusionPipeline(
        vae=vae.eval(),  # type: ignore[arg-type]
        text_encoder=text.eval(),
        tokenizer=tokenizer.build(),
        unet=denoiser.eval(),
        scheduler=scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        image_encoder=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def untrained(seed: int = 0) -> StableDiffusionPipeline:
    """The same architecture with random weights drawn from `seed`, for tests of mechanics rather than of pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pipeline(autoencoder(), text_encoder(), unet())
