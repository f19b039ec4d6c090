"""Four-bit floats (e2m1) with one small scale a group: MXFP4 (OCP Microscaling 1.0) and NVFP4.

Storage only: Hopper and CPUs have no instruction that multiplies them, torchao has the kernels of GPUs that do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_choice

from .packing import grouped, pack, unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUPS = {"mxfp4": 32, "nvfp4": 16}
_BIAS = 127
_FP8_MAX = 448.0


@dataclass(frozen=True)
class Microscaled:
    """Weights as e2m1 under a scale a group.

    Args:
        kind: "mxfp4": 32 weights under a power of two; "nvfp4": 16 under an e4m3 scale times one float32 a tensor.
        search: try the neighbouring scales too and keep the one of least squared error.
    """

    kind: str = "mxfp4"
    search: bool = True

    def __post_init__(self):
        check_choice("Microscaled", "kind", self.kind, _GROUPS)

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return _GROUPS[self.kind]

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store float32 [N, K]."""
        groups = grouped(weight.float(), self.group)
        largest = groups.abs().amax(-1)
        tensor = torch.ones(1, device=weight.device)
        if self.kind == "nvfp4":
            tensor = (largest.max() / (_FP8_MAX * E2M1[-1])).reshape(1)
            tensor = torch.where(tensor == 0, 1.0, tensor)
        best, least = None, None
        for stored in self._candidates(largest, tensor):
            scale = self._scale(stored, tensor)[..., None]
            error = (_levels(_codes(groups, scale)) * scale - groups).square().sum(-1)
            better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
            # through bytes, since float8 has no `where`
            now = stored.view(torch.uint8)
            best = now if best is None else torch.where(better, now, best)
            least = error if least is None else torch.where(better, error, least)
        assert best is not None
        scale = self._scale(best.view(self._kind()), tensor)[..., None]
        return {
            "codes": pack(_codes(groups, scale).flatten(), 4),
            "scale": best.view(self._kind()),
            "tensor": tensor,
        }

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]."""
        scale = self._scale(stored["scale"], stored["tensor"])[..., None]
        codes = unpack(stored["codes"], 4, scale.numel() * self.group).view(*scale.shape[:2], self.group)
        return (_levels(codes) * scale).flatten(1)[:, : shape[1]]

    def _kind(self) -> torch.dtype:
        return torch.uint8 if self.kind == "mxfp4" else torch.float8_e4m3fn

    def _candidates(self, largest: Tensor, tensor: Tensor) -> list[Tensor]:
        if self.kind == "mxfp4":
            # e2m1 reaches 6 = 1.5 · 2², so a group's largest weight lands between 4 and 8
            exponent = torch.where(largest > 0, largest.log2().floor() - 2, torch.zeros_like(largest))
            near = (0, 1) if self.search else (0,)
            return [(exponent + step + _BIAS).clamp(0, 254).to(torch.uint8) for step in near]
        wanted = largest / E2M1[-1] / tensor
        factors = (1.0, 1.125, 1.5, 0.875) if self.search else (1.0,)
        # never to zero, which would lose the group
        return [(wanted * by).clamp(2.0**-9, _FP8_MAX).to(torch.float8_e4m3fn) for by in factors]

    def _scale(self, stored: Tensor, tensor: Tensor) -> Tensor:
        if self.kind == "mxfp4":
            return torch.exp2(stored.float() - _BIAS)
        return stored.float() * tensor


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """0..7 for positive levels, 8..15 for negative ones; halves go to the even code, as hardware rounds."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=groups.device)
    ratio = (groups / scale).abs()
    low = torch.bucketize(ratio, bounds)  # a value on a bound goes below it
    high = torch.bucketize(ratio, bounds, right=True)
    level = torch.where(low % 2 == 0, low, high)
    return level + 8 * (groups < 0)


def _levels(codes: Tensor) -> Tensor:
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)], device=codes.device)
    return levels[codes.long()]
