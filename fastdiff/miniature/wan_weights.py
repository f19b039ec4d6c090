"""The shipped weights of `mini-wan`: a diffusers folder like that of the other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import moving, wan
from .weights import FOLDER, save

NAME = "mini-wan"
STUDENT = FOLDER / "students" / NAME / "rollout"
BUFFER_STUDENT = FOLDER / "students" / NAME / "buffer"
_CLIPS = 128  # clips from which the latents' mean and deviation are measured
_CERTAIN = -20.0  # the logarithm of the variance the encoder reports: its latents are points


def load_autoencoder() -> AutoencoderKLWan:
    """The trained video autoencoder in float32."""
    return AutoencoderKLWan.from_pretrained(FOLDER / NAME / "vae", dtype=torch.float32).eval()


def load_into(name: str, module: nn.Module) -> bool:
    """Fills a module being trained from the shipped weights; False where there are none."""
    if name in ("wan-autoencoder", "wan-long"):
        return _fill(module, FOLDER / NAME / "vae")
    if name in _students():
        return _fill(module, _students()[name])
    parts = ("text_encoder", "transformer")
    return all(_fill(getattr(module, part), FOLDER / NAME / part) for part in parts)


def _fill(module: nn.Module, folder: Path) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        module.load_state_dict({key: value.float() for key, value in load_file(files[0]).items()}, strict=False)
    return bool(files)


def export(name: str, state: dict[str, Tensor]) -> None:
    """Writes trained weights as float16 into the shipped folder."""
    if name in _students():
        _export_student(state, _students()[name])
    elif name == "wan-autoencoder":
        _export_autoencoder(state)
    elif name == "wan-long":
        _export_long(state)
    else:
        _export_model(state)


def _students() -> dict[str, Path]:
    return {"mini-wan-student": STUDENT, "mini-wan-buffer": BUFFER_STUDENT}


def _export_student(state: dict[str, Tensor], folder: Path) -> None:
    from diffusers import WanPipeline

    # peft's names in a model hold the adapter's, which files do not
    lora: Any = {
        key.removeprefix("transformer.").replace(".default.", "."): value.half()
        for key, value in state.items()
        if "lora_" in key
    }
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=lora)


@torch.inference_mode()
def _export_autoencoder(state: dict[str, Tensor]) -> None:
    vae: Any = wan.autoencoder()
    vae.load_state_dict(state)
    half = wan.CHANNELS
    vae.quant_conv.weight[half:] = 0
    vae.quant_conv.bias[half:] = _CERTAIN
    rng = np.random.default_rng(2024)
    clips = np.stack([moving.render(moving.scene(rng), 33, wan.SIZE) for _ in range(_CLIPS)])
    x = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in x.split(16)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(float(v), 5) for v in mean], latents_std=[round(float(v), 5) for v in std]
    )
    vae.half().save_pretrained(FOLDER / NAME / "vae")


def _export_long(state: dict[str, Tensor]) -> None:
    """What the autoencoder says of its latents' mean and deviation stays: a transformer counts on it."""
    (file,) = (FOLDER / NAME / "vae").glob("*.safetensors")
    kept = load_file(file)
    half = wan.CHANNELS
    learned = {key: state[key].half() for key in kept}
    learned["quant_conv.weight"][half:] = 0
    learned["quant_conv.bias"][half:] = _CERTAIN
    save_file(learned, file, {"format": "pt"})


def _export_model(state: dict[str, Tensor]) -> None:
    text, denoiser = wan.text_encoder(), wan.transformer()
    text.load_state_dict({k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_")})
    denoiser.load_state_dict({k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transf")})
    save(wan.pipeline(load_autoencoder(), text, denoiser), FOLDER / NAME)
