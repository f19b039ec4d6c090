"""Small random-weight pipelines of the families people run, for tests and trials of mechanics rather than pictures.

Each is the real diffusers pipeline class around the real model classes, built from config: no download, forwards of a
few milliseconds. What a pipeline class does differently (packed latents, guidance in one call or two, embedded
guidance, several text encoders) is what these are for.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from . import tokenizer
from .models import untrained

WIDTH = 32
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart")


def family(name: str, seed: int = 0) -> Any:
    """Return a tiny random pipeline of a family: "sd" (the miniature itself), "sdxl", "sd3", "flux" or "pixart"."""
    if name not in FAMILIES:
        raise ValueError(f"no family is called {name!r}; there are {', '.join(FAMILIES)}")
    if name == "sd":
        return untrained(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "pixart": _pixart}[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            _awake(part)
    return pipe


def _awake(module: torch.nn.Module) -> None:
    """Fill parameters that are born zero (modulations, last layers), or half of the model would have no effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(0, 0.05, generator=generator)


def _end() -> int:
    """The id of the last token, which is the highest."""
    return len(tokenizer.build()) - 1


def _text(projection: bool, layers: int = 2) -> Any:
    end = _end()
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.LENGTH,
        projection_dim=WIDTH,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5() -> T5EncoderModel:
    end = _end()
    config = T5Config(vocab_size=end + 1, d_model=WIDTH, d_ff=2 * WIDTH, d_kv=8, num_layers=2, num_heads=4)
    return T5EncoderModel(config)


def _autoencoder(channels: int, scaling: float, shift: float | None = None) -> AutoencoderKL:
    kind: Any = AutoencoderKL  # its annotations know one block only
    return kind(
        latent_channels=channels,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    kind: Any = UNet2DConditionModel
    unet = kind(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    pipeline: Any = StableDiffusionXLPipeline
    return pipeline(
        vae=_autoencoder(4, 0.13025),
        text_encoder=_text(projection=False),
        text_encoder_2=_text(projection=True),
        tokenizer=tokenizer.build(),
        tokenizer_2=tokenizer.build(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
        add_watermarker=False,
    )


def _sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        vae=_autoencoder(16, 1.5305, 0.0609),
        text_encoder=_text(projection=True),
        text_encoder_2=_text(projection=True),
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer=tokenizer.build(),
        tokenizer_2=tokenizer.build(),
        tokenizer_3=None,  # type: ignore[arg-type]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        vae=_autoencoder(4, 0.3611, 0.1159),
        text_encoder=_text(projection=False),
        text_encoder_2=_t5(),
        tokenizer=tokenizer.build(),
        tokenizer_2=tokenizer.build(),  # type: ignore[arg-type]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer.build(),  # type: ignore[arg-type]
        text_encoder=_t5(),
        vae=_autoencoder(4, 0.18215),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
