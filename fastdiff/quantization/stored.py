"""Weights kept small and unpacked for every product: for memory, not for speed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_choice, check_number
from fastdiff.hooks import Hooks

from .formats import FORMATS, Format, stored_format
from .layers import (
    MINIMUM_FEATURES,
    ROTATIONS,
    SKIP,
    Place,
    QuantisedLinear,
    check_selection,
    install,
    online_rotation,
    places,
    verdict,
)
from .low_rank import LowRank
from .packing import grouped
from .statistics import Statistics
from .transforms import Rotation, smoothing
from .w8a8 import needed_statistics

_ACTIVATION_GROUP = 64


class StoredLinear(QuantisedLinear):
    """A linear layer whose weight is kept in a storage format.

    Args:
        linear: the layer to stand in for.
        form: the format.
        smooth: [K] multiplied into inputs; rotation: applied after it.
        inputs: samples [n, K] of the layer's inputs, for formats that fit themselves to them.
        activations: bits to round inputs to as well, 0 for none.
    """

    def __init__(
        self,
        linear: torch.nn.Linear,
        form: Format,
        smooth: Tensor | None = None,
        rotation: Rotation | None = None,
        inputs: Tensor | None = None,
        activations: int = 0,
    ):
        super().__init__(linear, smooth, rotation)
        self.form, self.activations = form, activations
        weight = self.transformed_weight(linear.weight)
        given = None if inputs is None else self.transformed(inputs.to(weight))
        stored = form.encode(weight, given)
        self._names = tuple(stored)
        for name, tensor in stored.items():
            self.keep(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of [..., K] in x's dtype."""
        x = self.transformed(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        stored, shape = self.read_all(self._names), (self.out_features, self.in_features)
        if not self.activations:
            return torch.nn.functional.linear(x, self.form.decode(stored, shape).to(x.dtype), bias)
        rounded = rounded_activations(x, self.activations)
        if not isinstance(self.form, LowRank):
            return torch.nn.functional.linear(rounded, self.form.decode(stored, shape).to(x.dtype), bias)
        # what is kept in bfloat16 sees inputs as they are
        kept = (x @ stored["down"].to(x.dtype).mT) @ stored["up"].to(x.dtype).mT
        return kept + torch.nn.functional.linear(rounded, self.form.remainder(stored, shape).to(x.dtype), bias)

    def stored_weight(self) -> Tensor:
        """Float32 [N, K]."""
        return self.form.decode(self.read_all(self._names), (self.out_features, self.in_features))


def rounded_activations(x: Tensor, bits: int) -> Tensor:
    """x [..., K] rounded to `bits` bits in groups of 64 channels of a token, and back to x's dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    groups = grouped(flat, _ACTIVATION_GROUP)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale == 0, 1.0, scale)
    rounded = (groups / scale).round() * scale
    return rounded.flatten(1)[:, : x.shape[-1]].view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class StoredWeights(Acceleration):
    """Keep the denoiser's linear weights in few bits and unpack each for its product.

    SVDQuant is `format="int4", rank=32, smooth=0.5`; LRQ-DiT `format="twin-log3", rotate="found", smooth=0.5`;
    VQ4DiT `format="codebook2"` with statistics. It makes nothing faster; engines for such weights need a GPU with
    their instructions.

    Args:
        format: one of `formats.FORMATS`.
        rank: directions of each weight kept in bfloat16 beside the format; rounds: how often they are refitted.
        rotate: "none", "hadamard", or "found": the rotation that measures best on each layer's inputs.
        smooth: strength in 0..1 of moving activation outliers into weights; of use with `activations`.
        activations: round inputs to so many bits too, as an engine would; 0 leaves them.
        statistics: a file that `collect(...).save` wrote; without one, what needs inputs measures one trial call.
        fit: let formats that can fit themselves to inputs do so.
        minimum_features: layers with fewer inputs or outputs stay. skip: patterns of paths that stay.
    """

    stage: ClassVar[str] = "weights"
    format: str = "nvfp4"
    rank: int = 0
    rounds: int = 5
    rotate: str = "none"
    smooth: float = 0.0
    activations: int = 0
    statistics: str = ""
    fit: bool = False
    minimum_features: int = MINIMUM_FEATURES
    skip: tuple[str, ...] = SKIP

    def __post_init__(self):
        object.__setattr__(self, "skip", tuple(self.skip))
        check_choice("StoredWeights", "format", self.format, FORMATS)
        check_number("StoredWeights", "rank", self.rank, 0, whole=True)
        check_number("StoredWeights", "rounds", self.rounds, 1, whole=True)
        check_choice("StoredWeights", "rotate", self.rotate, ROTATIONS)
        check_number("StoredWeights", "smooth", self.smooth, 0, 1)
        check_number("StoredWeights", "activations", self.activations, 0, 8, whole=True)
        if self.activations == 1:
            raise ValueError("StoredWeights: activations=1 has no value but zero; use 2 to 8 bits, or 0 for none")
        check_selection("StoredWeights", self.minimum_features, self.skip)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where no layer is large enough or weights are quantised already."""
        return verdict(places(pipe, self.minimum_features, self.skip), self.minimum_features)

    def conflict(self, other: Acceleration) -> str:
        """Two ways of keeping the same weights do not add up."""
        return "both replace the linear layers; keep one" if type(other).__name__ == "W8A8" else ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Encode and put in place."""
        found = places(pipe, self.minimum_features, self.skip)
        needed = self.smooth > 0 or self.rotate == "found" or self.fit
        known = needed_statistics(pipe, found, hooks, self.statistics, needed)
        install(pipe, hooks, [(place, self.build(place, known)) for place in found])
        if self.activations:
            hooks.counter.note(
                f"inputs are rounded to {self.activations} bits to show what it costs; nothing is faster"
            )

    def build(self, place: Place, known: Statistics) -> StoredLinear:
        """The layer for one place."""
        linear, inputs = place.linear, known.samples.get(place.name)
        smooth = None
        if self.smooth and place.name in known.peaks:
            smooth = smoothing(known.peaks[place.name].to(linear.weight.device), linear.weight.detach(), self.smooth)
        seen = inputs if inputs is None or smooth is None else inputs * smooth.cpu()
        rotation = online_rotation(self.rotate, linear.in_features, seen)
        form = stored_format(self.format, min(self.rank, *linear.weight.shape), self.rounds)
        return StoredLinear(linear, form, smooth, rotation, inputs if self.fit else None, self.activations)
