"""Tiny networks of every family that is cut, their inputs, and the smallest pipeline around a denoiser."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

import fastdiff
from fastdiff.parallel.simulator import Run, Simulator, replica


class Denoise(DiffusionPipeline):
    """Calls its denoiser `steps` times, each time with `rate` of the last output added to the input."""

    def __init__(self, unet: Any, controlnet: Any, vae: Any):
        super().__init__()
        self.register_modules(unet=unet, controlnet=controlnet, vae=vae)

    @torch.no_grad()
    def __call__(self, steps: int = 1, rate: float = 0.0, fail: Any = None, **arguments: Any) -> torch.Tensor:
        self._num_timesteps = steps
        name = next(iter(arguments))
        control = arguments.pop("controlnet_cond", None)
        output = torch.zeros(())
        for step in range(steps):
            if fail is not None:
                fail(step)
            extra = {}
            if control is not None:
                down, middle = self.controlnet(**arguments, controlnet_cond=control, return_dict=False)
                extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            output = self.unet(**arguments, **extra).sample
            if rate:
                arguments[name] = arguments[name] + rate * output
        return output


def pipeline(unet: Any, controlnet: Any = None, vae: Any = None) -> Denoise:
    return Denoise(unet, controlnet, vae)


def awake(module: torch.nn.Module) -> Any:
    """Fill parameters that are born zero, or half of the model would have no effect."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def sd(levels: int = 2) -> Any:
    torch.manual_seed(0)
    down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1)
    return awake(
        UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32, 32)[:levels],
            layers_per_block=1,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def sdxl() -> Any:
    torch.manual_seed(0)
    return awake(
        UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),  # type: ignore[arg-type]
            cross_attention_dim=16,
            attention_head_dim=(2, 4),  # type: ignore[arg-type]
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        )
    )


def svd() -> Any:
    torch.manual_seed(0)
    return awake(
        UNetSpatioTemporalConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16,
            num_attention_heads=(2, 4),
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        )
    )


def motion() -> Any:
    torch.manual_seed(0)
    return awake(
        UNetMotionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=16,
            num_attention_heads=2,
            norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            use_motion_mid_block=True,
        )
    )


def dit(layers: int = 3) -> Any:
    torch.manual_seed(0)
    return awake(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            cross_attention_dim=16,
            sample_size=16,
            patch_size=2,
            caption_channels=12,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
    )


def controlnet(unet: Any) -> Any:
    torch.manual_seed(1)
    return awake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)))


def vae() -> Any:
    torch.manual_seed(0)
    return awake(
        AutoencoderKL(
            block_out_channels=(16, 32),  # type: ignore[arg-type]
            down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=16,
        )
    )


NETS = {"sd": sd, "sdxl": sdxl, "svd": svd, "motion": motion, "dit": dit}


def inputs(name: str, rows: int = 16, batch: int = 1, frames: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """Arguments of one forward, the sample first."""
    torch.manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    if name == "svd":
        return {
            "sample": normal(batch, frames, 8, rows, 16),
            "timestep": 10.0,
            "encoder_hidden_states": normal(batch, 1, 16),
            "added_time_ids": normal(batch, 3),
        }
    if name == "motion":
        sample, prompt = normal(batch, 4, frames, rows, 16), normal(batch * frames, 5, 16)
        return {"sample": sample, "timestep": 10, "encoder_hidden_states": prompt}
    if name == "dit":
        return {
            "hidden_states": normal(batch, 4, rows, 16),
            "encoder_hidden_states": normal(batch, 5, 12),
            "timestep": torch.full((batch,), 10),
        }
    arguments = {"sample": normal(batch, 4, rows, 16), "timestep": 10, "encoder_hidden_states": normal(batch, 5, 16)}
    if name == "sdxl":
        arguments["added_cond_kwargs"] = {"text_embeds": normal(batch, 8), "time_ids": normal(batch, 6)}
    return arguments


def simulate(pipe: Any, plan: Any, ranks: int, **arguments: Any) -> Run:
    """Run a pipeline under a plan on virtual ranks, each with a replica of its own."""

    def one(communicator: Any) -> torch.Tensor:
        twin = replica(pipe)
        with fastdiff.accelerate(twin, plan):
            return twin(**arguments)

    return Simulator(ranks).run(one)


def largest(run: Run, truth: torch.Tensor) -> float:
    """Largest absolute difference of any rank's result."""
    return max(float((result - truth).abs().max()) for result in run.results)
