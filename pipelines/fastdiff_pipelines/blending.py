"""Between two prompts or two seeds: spherical interpolation, which keeps lengths and so stays what models know.

A straight line between two independent Gaussian noises is shorter in the middle by a factor of sqrt(2), and a model
shown such noise paints mush; on the sphere it stays noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NEARLY_PARALLEL = 1e-4


def slerp(start: torch.Tensor, end: torch.Tensor, share: float, dims: int = 1) -> torch.Tensor:
    """On the arc from ``start`` to ``end``, both ``[...]`` of one shape; at share 0 and 1 exactly these.

    Args:
        dims: how many last axes make up one vector. Its direction moves along the arc, its length along a line.
    """
    if share <= 0:
        return start
    if share >= 1:
        return end
    shape = start.shape
    a = start.reshape(*shape[: len(shape) - dims], -1).double()
    b = end.reshape(*shape[: len(shape) - dims], -1).double()
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    unit_a, unit_b = a / length_a.clamp(min=1e-12), b / length_b.clamp(min=1e-12)
    angle = torch.arccos((unit_a * unit_b).sum(dim=-1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle)
    along = (torch.sin((1 - share) * angle) * unit_a + torch.sin(share * angle) * unit_b) / sine.clamp(min=1e-12)
    mixed = along * ((1 - share) * length_a + share * length_b)
    # opposite and (nearly) equal directions have no single arc between them
    straight = (1 - share) * a + share * b
    return torch.where(sine < NEARLY_PARALLEL, straight, mixed).reshape(shape).to(start.dtype)


def blend(parts: Sequence[torch.Tensor], weights: Sequence[float], dims: int = 1) -> torch.Tensor:
    """Several tensors of one shape by weight, each joining along the arc towards it. Weights are positive."""
    found, total = parts[0], weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += weight
        found = slerp(found, part, weight / total, dims)
    return found


def blend_conditioning(parts: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Conditionings by weight, token by token; masks are united.

    Raises:
        ValueError: the prompts were encoded to different lengths.
    """
    if len(parts) == 1:
        return parts[0]
    found = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if any(value.shape != values[0].shape for value in values):
            raise ValueError(f"these prompts cannot be blended: their {name} differ in length")
        if values[0].is_floating_point():
            found[name] = blend(values, weights)
        else:
            found[name] = torch.stack(values).amax(dim=0)
    return found
