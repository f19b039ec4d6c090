"""Pictures as conditions of a frame: a ControlNet's image and an IP-Adapter's, each with a scale that may change live.

Both travel as rows of the conditioning, scale included, so frames in flight keep theirs and nothing is compiled anew
when one changes. Where a pipeline has neither, nothing is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.acceleration import Unsupported
from fastdiff_pipelines.frames import check_frame, normalise


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as a condition.

    Attributes:
        image: uint8 ``[H, W, 3]`` of the stream's size for a ControlNet; any PIL image for an IP-Adapter.
        scale: how much it counts, 0 to 2.
    """

    image: Any
    scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"a picture's scale must be a finite number, got {self.scale!r}")
        if not 0 <= self.scale <= 2:
            raise ValueError(f"a picture's scale must be 0 to 2, got {self.scale!r}")


def resized(picture: Picture, height: int, width: int) -> Picture:
    """The same condition with its uint8 ``[H, W, 3]`` picture of this size."""
    image = scaled(picture.image, height, width)
    return picture if image is picture.image else Picture(image, picture.scale)


def scaled(image: Any, height: int, width: int) -> Any:
    """A uint8 array ``[H, W, 3]`` of this size: the same object where it has it."""
    if tuple(image.shape[:2]) == (height, width):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    made = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return made[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def adapter_width(module: Any) -> int | None:
    """Image embeddings' width where an IP-Adapter is loaded, else None."""
    projection = getattr(module, "encoder_hid_proj", None)
    layers = getattr(projection, "image_projection_layers", None)
    if not layers:
        return None
    if len(layers) > 1:
        raise Unsupported("a stream takes one IP-Adapter; load the pipeline with one")
    first = layers[0]
    embed = getattr(first, "image_embeds", None)
    if embed is None:
        raise Unsupported("this kind of IP-Adapter gives the model whole image tokens; a stream takes pooled ones")
    return int(embed.in_features)


def picture_rows(pipe: Any, module: Any, height: int, width: int, settings: Any) -> dict[str, torch.Tensor]:
    """The picture rows of a UNet's conditioning, one row each; rows of scale 0 where the settings name no picture.

    Raises:
        Unsupported: a picture was given to a pipeline that has no model for it.
        TypeError, ValueError: the picture has another size or dtype.
    """
    found: dict[str, torch.Tensor] = {}
    net = getattr(pipe, "controlnet", None)
    control, prompt = settings.control, settings.image_prompt
    if control is not None and net is None:
        raise Unsupported("this pipeline has no ControlNet; load a pipeline of diffusers' ControlNet kind")
    if net is not None:
        image = torch.zeros(1, 3, height, width)
        if control is not None:
            image = normalise(check_frame(control.image, height, width), torch.device("cpu"), torch.float32)
            image = image * 0.5 + 0.5
        found["control_image"] = image.to(module.device, module.dtype)
        found["control_scale"] = _scale(control, module)
    pooled = adapter_width(module)
    if prompt is not None and pooled is None:
        raise Unsupported("this pipeline has no IP-Adapter; call pipe.load_ip_adapter first")
    if pooled is not None:
        embeds = torch.zeros(1, 1, pooled)
        if prompt is not None:
            embeds = pipe.prepare_ip_adapter_image_embeds(prompt.image, None, module.device, 1, False)[0]
        found["image_embeds"] = embeds.reshape(1, 1, pooled).to(module.device, module.dtype)
        found["image_scale"] = _scale(prompt, module)
    return found


def _scale(picture: Picture | None, module: Any) -> torch.Tensor:
    return torch.tensor([0.0 if picture is None else picture.scale], device=module.device, dtype=module.dtype)


def control_residuals(
    net: Any, x: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor], added: Any
) -> dict[str, Any]:
    """What a ControlNet adds to a UNet's blocks, each row by its own scale; nothing where there is no ControlNet."""
    if "control_image" not in conditioning:
        return {}
    down, middle = net(
        x,
        timesteps,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        controlnet_cond=conditioning["control_image"],
        conditioning_scale=1.0,
        added_cond_kwargs=added,
        return_dict=False,
    )
    scale = conditioning["control_scale"].view(-1, 1, 1, 1)
    return {
        "down_block_additional_residuals": [one * scale for one in down],
        "mid_block_additional_residual": middle * scale,
    }


@contextmanager
def adapter_scales(module: Any, conditioning: dict[str, torch.Tensor]) -> Iterator[None]:
    """Gives IP-Adapter layers each row's scale for the length of a call, and their own back afterwards."""
    if "image_scale" not in conditioning:
        yield
        return
    rows = [_RowScale(conditioning["image_scale"].view(-1, 1, 1))]
    layers = [one for one in module.attn_processors.values() if isinstance(getattr(one, "scale", None), list)]
    before = [one.scale for one in layers]
    for one in layers:
        one.scale = rows
    try:
        yield
    finally:
        for one, scale in zip(layers, before, strict=True):
            one.scale = scale


class _RowScale:
    """A scale for each row where diffusers expects one number, which it asks only whether it is 0 and to multiply."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows  # [B, 1, 1]

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __mul__(self, values: torch.Tensor) -> torch.Tensor:
        return self.rows * values
