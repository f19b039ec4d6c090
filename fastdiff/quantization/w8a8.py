"""Linear layers with 8-bit weights and 8-bit activations, which every CPU since AVX512-VNNI multiplies fastest."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.hooks import Hooks
from fastdiff_kernels.w8a8 import PATHS, fast_on_cpu, has_compiler, linear, quantise_weight

from .layers import (
    MINIMUM_FEATURES,
    ROTATIONS,
    SKIP,
    Place,
    QuantisedLinear,
    check_selection,
    install,
    mixes_pictures,
    online_rotation,
    places,
    value_pairs,
    verdict,
)
from .statistics import Statistics, trial
from .transforms import Rotation, block_of, fold_rotation, smoothing


class W8A8Linear(QuantisedLinear):
    """A linear layer in 8 bits.

    Args:
        linear: the layer to stand in for.
        smooth: [K] multiplied into inputs; rotation: applied after it.
        weight, bias: to use instead of the layer's, where a rotation was folded into them.
        path: of `fastdiff_kernels.w8a8.linear`.
    """

    def __init__(
        self,
        linear: torch.nn.Linear,
        smooth: Tensor | None = None,
        rotation: Rotation | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        path: str | None = None,
    ):
        super().__init__(linear, smooth, rotation)
        if bias is not None:
            self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.path = path
        whole, scale = quantise_weight(self.transformed_weight(linear.weight if weight is None else weight))
        self.keep("whole", whole)
        self.keep("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of [..., K] in x's dtype."""
        smooth = self.smooth
        if self._rotated:
            x, smooth = self.transformed(x), None
        return linear(x, self.read("whole"), self.read("scale"), self.bias, smooth=smooth, path=self.path)

    def stored_weight(self) -> Tensor:
        """Float32 [N, K]."""
        return self.read("whole").float() * self.read("scale")[:, None]


@dataclass(frozen=True)
class W8A8(Acceleration):
    """Multiply the denoiser's linear layers in 8 bits: weights per output channel, activations per token as they come.

    Convolutions, normalisation and attention stay as they are. Smoothing costs nothing while layers run (inputs are
    multiplied as they are rounded); a Hadamard rotation is folded into the value projection in front of an attention's
    output projection, and computed for the other layers.

    Args:
        smooth: strength in 0..1 of moving activation outliers into weights (SmoothQuant); 0 does not.
        rotate: "none", "hadamard", or "found": the rotation that measures best on each layer's inputs.
        statistics: a file that `collect(...).save` wrote, for `smooth` and "found"; without one, inputs are measured
            on one trial call of the denoiser.
        minimum_features: layers with fewer inputs or outputs stay; below 256 rounding costs what multiplying saves.
        skip: patterns of paths in the denoiser that stay.
        path: of `fastdiff_kernels.w8a8.linear`; None takes the fastest.
    """

    stage: ClassVar[str] = "weights"
    smooth: float = 0.0
    rotate: str = "none"
    statistics: str = ""
    minimum_features: int = MINIMUM_FEATURES
    skip: tuple[str, ...] = SKIP
    path: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "skip", tuple(self.skip))
        check_number("W8A8", "smooth", self.smooth, 0, 1)
        check_choice("W8A8", "rotate", self.rotate, ROTATIONS)
        check_choice("W8A8", "path", self.path, (None, *PATHS))
        check_selection("W8A8", self.minimum_features, self.skip)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where no layer is large enough or weights are quantised already."""
        found = places(pipe, self.minimum_features, self.skip)
        refused = verdict(found, self.minimum_features)
        if not refused or found[0].linear.weight.is_cuda:
            return refused
        if not fast_on_cpu():
            return Verdict(True, "this CPU has no dot product of bytes; 8 bits are slower than floats on it")
        if self.path is None and not has_compiler():
            return Verdict(True, "no C++ compiler was found, so 8-bit layers run unfused; install g++ for full speed")
        return refused

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Quantise and put in place."""
        found = places(pipe, self.minimum_features, self.skip)
        known = needed_statistics(pipe, found, hooks, self.statistics, self.smooth > 0 or self.rotate == "found")
        folded, pairs = self._folded(found)
        made = [(place, self.build(place, known, folded.get(place.name))) for place in found]
        install(pipe, hooks, made)
        if pairs:
            hooks.counter.note(f"{len(pairs)} rotations folded into value projections")
            watch_values(pipe, hooks, [place.parent for place, _ in pairs])

    def build(self, place: Place, known: Statistics, folded: tuple[Tensor, Tensor | None] | None = None) -> W8A8Linear:
        """The layer for one place; `folded` has weight and bias with another layer's rotation in them."""
        weight, bias = folded or (None, None)
        smooth = self._smoothing(place, known, weight)
        rotation = None
        if not (folded and place.name.endswith("to_out.0")):
            inputs = known.samples.get(place.name)
            if inputs is not None and smooth is not None:
                inputs = inputs * smooth.cpu()
            rotation = online_rotation(self.rotate, place.linear.in_features, inputs)
        return W8A8Linear(place.linear, smooth, rotation, weight, bias, self.path)

    def _smoothing(self, place: Place, known: Statistics, weight: Tensor | None) -> Tensor | None:
        peak = known.peaks.get(place.name)
        # a folded rotation has already spread what smoothing would move
        if not self.smooth or peak is None or (weight is not None and place.name.endswith("to_out.0")):
            return None
        used = place.linear.weight if weight is None else weight
        return smoothing(peak.to(used.device), used.detach(), self.smooth)

    def _folded(self, found: list[Place]) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[tuple[Place, Place]]]:
        """Weights and biases of layers with a Hadamard rotation between them, by name, and the pairs of layers."""
        folded: dict[str, tuple[Tensor, Tensor | None]] = {}
        pairs = []
        if self.rotate != "hadamard":
            return folded, pairs
        by_name = {place.name: place for place in found}
        for name, (out, head) in value_pairs(found).items():
            size = block_of(head)
            if size == 1:
                continue
            value = by_name[name]
            weights = (value.linear.weight, value.linear.bias, out.linear.weight)
            producer, bias, consumer = fold_rotation(
                *(None if one is None else one.detach() for one in weights),
                size,  # type: ignore[arg-type]
            )
            folded[name] = producer, bias
            folded[out.name] = consumer, None
            pairs.append((value, out))
        return folded, pairs


def needed_statistics(pipe: Any, found: list[Place], hooks: Hooks, path: str, needed: bool) -> Statistics:
    """Statistics from a file, else from a trial call where they are needed, and said so."""
    if path:
        known = Statistics.load(path)
        missing = [place.name for place in found if place.name not in known.peaks]
        if missing:
            raise Unsupported(f"{path} knows nothing of {missing[0]}; collect statistics of this model again")
        return known
    if not needed:
        return Statistics()
    hooks.counter.note("inputs were measured on one trial call; statistics= of real prompts are better")
    return trial(pipe, found)


def watch_values(pipe: Any, hooks: Hooks, attentions: list[Any]) -> None:
    """Refuse to run when an image prompt was attached after rotations were folded into value projections."""
    from fastdiff.anatomy import anatomy

    def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(mixes_pictures, attentions)):
            raise Unsupported(
                "W8A8: an IP-Adapter was loaded after rotations were folded into value projections; "
                "load it first, or use rotate='none'"
            )
        return inner(*args, **kwargs)

    for denoiser in anatomy(pipe).denoisers.values():
        hooks.wrap(denoiser, "forward", around)
