"""Networks of a diffusers pipeline as losses call them: the teacher as it is, the student with a LoRA or in full."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import anatomy, forward_names
from fastdiff.distillation.networks import Condition, Levels, Network

LORA_FILE = "pytorch_lora_weights.safetensors"

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
    "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
"""Layers of UNets and DiTs that a LoRA adapts (the list of diffusers' LCM-LoRA script, and DiTs' own names)."""


def as_network(module: nn.Module, levels: Levels) -> Network:
    """``net(x, level, condition)`` around a UNet's or transformer's forward."""
    first = _first(module)

    def network(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        return module(**{first: x, "timestep": levels.told(level)}, **condition, return_dict=False)[0]

    return network


def averaged(module: nn.Module, levels: Levels, values: dict[str, Tensor]) -> Network:
    """The same network with other values for some of its parameters, which may change between calls."""
    first = _first(module)

    def network(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        arguments = {first: x, "timestep": levels.told(level), **condition, "return_dict": False}
        return torch.func.functional_call(module, values, (), arguments)[0]

    return network


def _first(module: nn.Module) -> str:
    """The name of the denoiser's first argument."""
    inner: Any = module
    return forward_names(inner.base[0] if hasattr(inner, "base") else inner)[0]


def encoder(pipe: Any) -> Callable[[Sequence[str]], Condition]:
    """What the pipeline makes of captions: a function to the denoiser's keyword arguments, computed once a caption.

    Raises:
        Unsupported: for families whose conditioning is not known here.
    """
    kind = type(pipe).__name__
    if kind not in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline"):
        raise Unsupported(
            f"distillation does not know how {kind} conditions its denoiser; it knows Stable Diffusion 1 and 2, "
            "Stable Diffusion 3 and PixArt-alpha"
        )
    device = anatomy(pipe).denoiser.device
    kept: dict[str, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Condition:
        new = sorted(set(prompts) - kept.keys())
        if new:
            if kind == "StableDiffusion3Pipeline":
                text, _, pooled, _ = pipe.encode_prompt(
                    new, None, None, device=device, do_classifier_free_guidance=False
                )
                rows = zip(text, pooled, strict=True)
            elif kind == "PixArtAlphaPipeline":
                text, mask, _, _ = pipe.encode_prompt(new, do_classifier_free_guidance=False, device=device)
                rows = zip(text, mask, strict=True)
            else:
                rows = ((row,) for row in pipe.encode_prompt(new, device, 1, False)[0])
            kept.update(zip(new, rows, strict=True))
        names = {"StableDiffusion3Pipeline": "pooled_projections", "PixArtAlphaPipeline": "encoder_attention_mask"}
        columns = zip(*(kept[prompt] for prompt in prompts), strict=True)
        return dict(zip(("encoder_hidden_states", names.get(kind, "")), map(torch.stack, columns), strict=False))

    return encode


def student_of(denoiser: nn.Module, rank: int, seed: int, start: Path | None = None) -> nn.Module:
    """A copy of the denoiser to train: all of it where ``rank`` is 0, else a LoRA of that rank (peft), named "student".

    The LoRA begins as the one in the folder ``start``, or with first matrices drawn from ``seed`` and second ones zero.

    Raises:
        ValueError: the LoRA to start from has another rank or other layers.
    """
    student: Any = copy.deepcopy(denoiser)
    if rank == 0:
        return student.requires_grad_(True)
    from peft import LoraConfig

    student.requires_grad_(False)
    targets = [name for name, part in student.named_modules() if _is_target(name, part)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "student")
    if start is not None:
        _begin(student, start)
    return student


@torch.no_grad()
def _begin(student: nn.Module, start: Path) -> None:
    from safetensors.torch import load_file

    kept = load_file(start / LORA_FILE)
    ours = {name: value for name, value in student.named_parameters() if value.requires_grad}
    for name, value in ours.items():
        plain = name.replace(".student.", ".")
        found = [key for key in kept if key.split(".", 1)[1] == plain]
        if len(found) != 1 or kept[found[0]].shape != value.shape:
            raise ValueError(f"{start} cannot be gone on from: its LoRA has no {plain} of shape {list(value.shape)}")
        value.copy_(kept[found[0]])


def _is_target(name: str, part: nn.Module) -> bool:
    return isinstance(part, (nn.Linear, nn.Conv2d)) and any(
        name == target or name.endswith("." + target) for target in LORA_TARGETS
    )
