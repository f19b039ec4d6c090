"""The optimizers of the miniature models: AdamW, and Muon for the matrices inside a transformer's blocks.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix before it is applied; scaled
to AdamW's step (https://arxiv.org/abs/2502.16982, section 2.2) both take one learning rate.
"""

from typing import Any

import torch
from torch import nn

_WITH_MUON = ("mini-dit", "mini-wan")


class Optimizers:
    """Several optimizers as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for part, kept in zip(self.parts, state, strict=True):
            part.load_state_dict(kept)


def build(name: str, module: nn.Module, learning_rate: float) -> Optimizers:
    """The optimizers of the model called ``name``."""
    named = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
    inner = [value for key, value in named if name in _WITH_MUON and value.ndim == 2 and "blocks." in key]
    held = {id(value) for value in inner}
    outer = [value for _, value in named if id(value) not in held]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ]
    if inner:
        parts.append(
            torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=5)
        )
    return Optimizers(parts)
