"""Twin-log quantisation: negative and positive weights each on a logarithmic ladder of their own (LRQ-DiT,
https://arxiv.org/abs/2508.03485), fine near zero, where most weights lie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_number

from .packing import pack, unpack

_SHIFTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5)
_SHARES = (1.0, 0.9999, 0.999, 0.99, 0.98)


@dataclass(frozen=True)
class TwinLog:
    """sign · (2**l - shift), with l on 2**(bits - 1) even steps between log2(shift) and the row's highest.

    The shift, which sets how fast the ladder widens, and the share of weights it reaches are searched row by row for
    the least squared error. Relative to the row's largest weight, the shift lies between 0.001 and 0.5.
    """

    bits: int = 4

    def __post_init__(self):
        check_number("TwinLog", "bits", self.bits, 2, 8, whole=True)

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store float32 [N, K]."""
        weight = weight.float()
        tops = {share: _tops(weight, share) for share in _SHARES}
        least = torch.full((len(weight), 1), float("inf"), device=weight.device)
        best_codes = torch.zeros_like(weight)
        best_ladder = torch.zeros(len(weight), 3, device=weight.device)
        for shift in _SHIFTS:
            for top in tops.values():
                # what float16 makes of a ladder, so that its rounding is part of the measured error
                ladder = torch.cat([top, shift * top.amax(1, keepdim=True)], 1).half().float()
                codes = _codes(weight, ladder, self.bits)
                error = (_values(codes, ladder, self.bits) - weight).square().sum(1, keepdim=True)
                better = error < least
                least = torch.where(better, error, least)
                best_codes = torch.where(better, codes, best_codes)
                best_ladder = torch.where(better, ladder, best_ladder)
        return {"codes": pack(best_codes.flatten(), self.bits), "ladder": best_ladder.half()}

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]."""
        codes = unpack(stored["codes"], self.bits, shape[0] * shape[1]).view(shape)
        return _values(codes.float(), stored["ladder"].float(), self.bits)


def _tops(weight: Tensor, share: float) -> Tensor:
    """[N, 2]: the magnitude that a share of a row's negative, and of its positive, weights stay below."""
    found = []
    for sign in (-1, 1):
        half = (sign * weight).clamp_min(0)
        ordered = half.sort(1, descending=True).values
        beyond = ((half > 0).sum(1, keepdim=True) * (1 - share)).long()
        found.append(ordered.gather(1, beyond))
    tops = torch.cat(found, 1)
    # a row without weights of one sign borrows the other's ladder
    return torch.where(tops > 0, tops, tops.amax(1, keepdim=True)).clamp_min(6e-5)


def _steps(ladder: Tensor, side: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest rung, height of a step and shift for weights on a side (0 or 1) of each row's ladder [N, 3]."""
    shift = ladder[:, 2:]
    low = shift.log2()
    high = (ladder[:, :2] + shift).log2()
    step = (high - low) / (2 ** (bits - 1) - 1)
    return low, torch.where(side.bool(), step[:, 1:], step[:, :1]), shift


def _codes(weight: Tensor, ladder: Tensor, bits: int) -> Tensor:
    side = (weight >= 0).float()
    low, step, shift = _steps(ladder, side, bits)
    rungs = 2 ** (bits - 1)
    rung = (((weight.abs() + shift).log2() - low) / step).round().clamp(0, rungs - 1)
    return rung + rungs * side


def _values(codes: Tensor, ladder: Tensor, bits: int) -> Tensor:
    rungs = 2 ** (bits - 1)
    side = (codes >= rungs).float()
    low, step, shift = _steps(ladder, side, bits)
    return (2 * side - 1) * (torch.exp2(low + step * (codes - rungs * side)) - shift)
