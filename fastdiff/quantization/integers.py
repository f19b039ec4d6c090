"""Symmetric integers with one float16 scale a row or group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_choice, check_number

from .packing import grouped, pack, unpack

_CLIPS = tuple(1 - step / 20 for step in range(11))


@dataclass(frozen=True)
class Integers:
    """Weights rounded to the nearest of 2**bits - 1 evenly spaced values.

    Args:
        bits: 2 to 8.
        group: weights that share a scale; 0 for a whole row.
        clip: "max" lets the scale reach the largest weight, "mse" cuts it where that lowers the squared error.
    """

    bits: int = 4
    group: int = 0
    clip: str = "max"

    def __post_init__(self):
        check_number("Integers", "bits", self.bits, 2, 8, whole=True)
        check_number("Integers", "group", self.group, 0, whole=True)
        check_choice("Integers", "clip", self.clip, ("max", "mse"))

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store float32 [N, K]."""
        groups = grouped(weight.float(), self.group)
        most = 2 ** (self.bits - 1) - 1
        largest = groups.abs().amax(-1, keepdim=True) / most
        best, least = _scale(largest), None
        for clip in _CLIPS if self.clip == "mse" else _CLIPS[:1]:
            scale = _scale(largest * clip)
            error = (_rounded(groups, scale, most) * scale - groups).square().sum(-1, keepdim=True)
            better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
            best = torch.where(better, scale, best)
            least = error if least is None else torch.where(better, error, least)
        codes = _rounded(groups, best, most) + most
        return {"codes": pack(codes.flatten(), self.bits), "scale": best[..., 0].half()}

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]."""
        scale = stored["scale"].float()[..., None]  # [N, G, 1]
        group = self.group or shape[1]
        codes = unpack(stored["codes"], self.bits, scale.numel() * group).view(*scale.shape[:2], group)
        whole = codes.float() - (2 ** (self.bits - 1) - 1)
        return (whole * scale).flatten(1)[:, : shape[1]]


def _scale(largest: Tensor) -> Tensor:
    """What float16 makes of a scale, so that its rounding is part of the measured error; zeros scale by 1."""
    scale = largest.half().float()
    return torch.where(scale == 0, 1.0, scale)


def _rounded(groups: Tensor, scale: Tensor, most: int) -> Tensor:
    return (groups / scale).round().clamp(-most, most)
