"""A few directions of a weight kept in bfloat16, the rest in few bits (SVDQuant, https://arxiv.org/abs/2411.05007)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import check_number

_SMALL = 1024
_BASE = "base_"


@dataclass(frozen=True)
class LowRank:
    """A weight as up · down + base format of what that leaves.

    Args:
        base: the format of the remainder.
        rank: directions kept; as many as the weight's smaller side keep all of it.
        rounds: the factors are fitted again to what the format could not hold, so often; the best round is kept.
    """

    base: Any
    rank: int = 32
    rounds: int = 5

    def __post_init__(self):
        check_number("LowRank", "rank", self.rank, 1, whole=True)
        check_number("LowRank", "rounds", self.rounds, 1, whole=True)

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store float32 [N, K]; with inputs [n, K], the round of least output error is kept, not of weight error."""
        weight = weight.float()
        shape = (weight.shape[0], weight.shape[1])
        rest, least, best = torch.zeros_like(weight), float("inf"), {}
        for _ in range(self.rounds):
            up, down = _factors(weight - rest, self.rank)
            part = up.float() @ down.float()
            stored = self.base.encode(weight - part)
            rest = self.base.decode(stored, shape)
            missed = part + rest - weight
            error = float((missed if inputs is None else inputs.float() @ missed.mT).square().mean())
            if error < least:
                least = error
                best = {"up": up, "down": down, **{_BASE + name: tensor for name, tensor in stored.items()}}
        return best

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]."""
        return stored["up"].float() @ stored["down"].float() + self.remainder(stored, shape)

    def remainder(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]: the part that is in few bits."""
        inner = {name.removeprefix(_BASE): tensor for name, tensor in stored.items() if name.startswith(_BASE)}
        return self.base.decode(inner, shape)


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """bfloat16 [N, r] and [r, K] whose product is nearest to a weight."""
    if min(weight.shape) <= _SMALL:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        right = right.mT
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(weight, rank + 8, niter=4)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).bfloat16(), (right[:, :rank] * root).mT.contiguous().bfloat16()
