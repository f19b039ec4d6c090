"""Small random-weight video pipelines of the families people run; as `families`, for mechanics rather than pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)

from . import tokenizer
from .families import WIDTH, _autoencoder, _awake, _end, _t5, _text

SIZE = 32
FRAMES = 9
HUNYUAN_TEMPLATE = {"template": "{}", "crop_start": 1}


def wan() -> Any:
    """`WanPipeline` in Wan 2.1's form."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    kind: Any = WanPipeline
    return kind(
        tokenizer=tokenizer.build(),
        text_encoder=_umt5(),
        vae=_wan_autoencoder(),
        transformer=_wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


_WAN: dict[str, Any] = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=WIDTH,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
)


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    kind: Any = WanTransformer3DModel
    return kind(
        **_WAN,
        cross_attn_norm=True,
    )


def _wan_autoencoder() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _umt5() -> UMT5EncoderModel:
    end = _end()
    config = UMT5Config(vocab_size=end + 1, d_model=WIDTH, d_ff=2 * WIDTH, d_kv=8, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config)


def helios() -> Any:
    """`HeliosPipeline`: chunk after chunk, each from the history of those before it."""
    from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

    transformer: Any = HeliosTransformer3DModel
    kind: Any = HeliosPipeline
    return kind(
        tokenizer=tokenizer.build(),
        text_encoder=_umt5(),
        vae=_wan_autoencoder(),
        scheduler=HeliosScheduler(stage_range=[0, 1], stages=1),
        transformer=transformer(
            **_WAN,
            rope_dim=(4, 4, 4),
        ),
    )


def ltx() -> Any:
    """`LTXPipeline`: latents travel as tokens."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae: Any = AutoencoderKLLTXVideo
    kind: Any = LTXPipeline
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=_t5(),
        tokenizer=tokenizer.build(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )


def cogvideox() -> Any:
    """`CogVideoXPipeline`, frames before channels."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    vae: Any = AutoencoderKLCogVideoX
    kind: Any = CogVideoXPipeline
    return kind(
        tokenizer=tokenizer.build(),
        text_encoder=_t5(),
        vae=vae(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=FRAMES,
            max_text_seq_length=tokenizer.LENGTH,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=CogVideoXDDIMScheduler(),
    )


def hunyuan() -> Any:
    """`HunyuanVideoPipeline`; call it with `prompt_template=HUNYUAN_TEMPLATE`, its own being longer than a caption."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    end = _end()
    config = LlamaConfig(
        vocab_size=end + 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    vae: Any = AutoencoderKLHunyuanVideo
    kind: Any = HunyuanVideoPipeline
    return kind(
        text_encoder=LlamaModel(config),
        tokenizer=tokenizer.build(),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=vae(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_long_text(),
        tokenizer_2=tokenizer.build(),
    )


def _long_text() -> CLIPTextModel:
    """A CLIP of 77 positions: the pipeline pads to as many."""
    config = _text(projection=False).config
    config.max_position_embeddings = 77
    return CLIPTextModel(config)


def animatediff() -> Any:
    """`AnimateDiffPipeline`: an image model with motion modules."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNet2DConditionModel

    unet: Any = UNet2DConditionModel
    kind: Any = AnimateDiffPipeline
    return kind(
        vae=_autoencoder(4, 0.18215),
        text_encoder=_text(projection=False),
        tokenizer=tokenizer.build(),
        unet=unet(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=2,
        ),
        motion_adapter=MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        ),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def svd() -> Any:
    """`StableVideoDiffusionPipeline`: a picture goes in and no prompt."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=224,
        patch_size=56,
    )
    vae: Any = AutoencoderKLTemporalDecoder
    unet: Any = UNetSpatioTemporalConditionModel
    kind: Any = StableVideoDiffusionPipeline
    return kind(
        vae=vae(down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32), latent_channels=4),
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=WIDTH,
            num_attention_heads=4,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        feature_extractor=CLIPImageProcessor(),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan": hunyuan,
    "animatediff": animatediff,
    "svd": svd,
    "helios": helios,
}


def video_family(name: str, seed: int = 0) -> Any:
    """Return a tiny random video pipeline: one of `BUILDERS`, with no parameter left at zero."""
    if name not in BUILDERS:
        raise ValueError(f"no video family is called {name!r}; there are {', '.join(BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            _awake(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(name: str, frames: int = FRAMES, size: int = SIZE) -> dict[str, Any]:
    """What a call of that family needs for a clip of this length, beside steps, generator and output type."""
    if name == "svd":
        from PIL import Image

        picture = Image.new("RGB", (size, size), (200, 40, 40))
        return {"image": picture, "height": size, "width": size, "num_frames": frames, "decode_chunk_size": 4}
    given: dict[str, Any] = {"prompt": "a red circle", "height": size, "width": size, "num_frames": frames}
    if name != "animatediff":
        given["max_sequence_length"] = tokenizer.LENGTH
    if name == "hunyuan":
        given["prompt_template"] = HUNYUAN_TEMPLATE
    if name == "helios":  # its handling of prompts needs a package that fastdiff does not
        words = torch.randn(2, 1, tokenizer.LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
        given |= {"prompt": None, "prompt_embeds": words[0], "negative_prompt_embeds": words[1]}
        given |= {"num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1]}
    return given
