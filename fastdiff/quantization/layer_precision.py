"""A scheme for every linear layer, as `sensitivity` measured it to be worth, ours and torchao's in one plan."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch

from fastdiff.acceleration import Acceleration, Verdict
from fastdiff.hooks import Hooks

from .formats import FORMATS, stored_format
from .layers import MINIMUM_FEATURES, SKIP, Place, check_selection, install, places, verdict
from .stored import StoredLinear
from .torchao_layers import KINDS, missing, torchao_linear
from .w8a8 import W8A8Linear

KEEP = "keep"
SCHEMES = (KEEP, "w8a8", *KINDS, *FORMATS)
"""Every scheme a layer may have: left alone, our 8 bits, what torchao computes, what is only stored."""


def build(linear: torch.nn.Linear, scheme: str, path: str | None = None) -> torch.nn.Module:
    """A linear layer like `linear`, which is left as it is, in one of `SCHEMES` other than "keep"."""
    if scheme in KINDS:
        return torchao_linear(linear, scheme)
    return W8A8Linear(linear, path=path) if scheme == "w8a8" else StoredLinear(linear, stored_format(scheme))


@dataclass(frozen=True)
class LayerPrecision(Acceleration):
    """Give each linear layer of the denoiser its own scheme. Exact when every row keeps.

    Args:
        rows: (pattern, scheme) each, such as ("transformer.*.ff.*", "w8a8"); the first pattern that fits a layer's
            name (the denoiser's, a dot, its path) decides, and a layer that none fits is kept.
        minimum_features: layers with fewer inputs or outputs are kept. skip: patterns of paths that are kept.
        path: of `fastdiff_kernels.w8a8.linear` for "w8a8"; None takes the fastest.
    """

    stage: ClassVar[str] = "weights"
    rows: tuple[tuple[str, str], ...] = (("*", "w8a8"),)
    minimum_features: int = MINIMUM_FEATURES
    skip: tuple[str, ...] = SKIP
    path: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        object.__setattr__(self, "skip", tuple(self.skip))
        for row in self.rows:
            if len(row) != 2 or not isinstance(row[0], str) or row[1] not in SCHEMES:
                raise ValueError(
                    f"LayerPrecision: {row!r} must be (pattern, scheme) with one of the schemes {', '.join(SCHEMES)}"
                )
        check_selection("LayerPrecision", self.minimum_features, self.skip)

    @property
    def exact(self) -> bool:
        """True when every row keeps its layers."""
        return all(scheme == KEEP for _, scheme in self.rows)

    def scheme(self, name: str) -> str:
        """The scheme of the layer of a name."""
        return next((scheme for pattern, scheme in self.rows if fnmatch(name, pattern)), KEEP)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where no layer is large enough, or torchao, or the GPU for one of its schemes, is missing."""
        found = places(pipe, self.minimum_features, self.skip)
        refused = verdict(found, self.minimum_features)
        if not refused:
            return refused
        device = found[0].linear.weight.device.type
        used = {self.scheme(place.name) for place in found}
        for kind in KINDS:
            reason = missing(kind, device) if kind in used else ""
            if reason:
                return Verdict(False, reason)
        unused = [pattern for pattern, _ in self.rows if not any(fnmatch(place.name, pattern) for place in found)]
        return Verdict(True, f"no layer is called {unused[0]!r}" if unused else "")

    def conflict(self, other: Acceleration) -> str:
        """Two that replace the same layers do not add up."""
        twice = type(other).__name__ in ("W8A8", "StoredWeights")
        return "both replace the linear layers; put all schemes into LayerPrecision's rows" if twice else ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Build and put in place."""
        if self.exact:
            hooks.counter.expects = "nothing"
            hooks.counter.note("every layer is kept as it is")
        made: list[tuple[Place, torch.nn.Module]] = []
        for place in places(pipe, self.minimum_features, self.skip):
            scheme = self.scheme(place.name)
            if scheme != KEEP:
                made.append((place, build(place.linear, scheme, self.path)))
        install(pipe, hooks, made)
