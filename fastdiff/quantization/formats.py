"""Ways to store a weight in few bits, by name. Each is one class in a file of its own with `encode` and `decode`."""

from typing import Protocol

from torch import Tensor

from .codebook import Codebook
from .integers import Integers
from .low_rank import LowRank
from .microscaled import Microscaled
from .twin_log import TwinLog


class Format(Protocol):
    """A way to store a weight."""

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store a float32 weight [N, K]; `inputs` [n, K] are samples of what it will multiply, where they help."""
        ...

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The float32 weight [N, K] that was stored, as far as it was kept."""
        ...


FORMATS: dict[str, Format] = {
    "int8": Integers(8),
    "int4": Integers(4, group=64, clip="mse"),
    "int3": Integers(3, group=64, clip="mse"),
    "twin-log4": TwinLog(4),
    "twin-log3": TwinLog(3),
    "codebook2": Codebook(),
    "mxfp4": Microscaled("mxfp4"),
    "nvfp4": Microscaled("nvfp4"),
}
"""Every storage format by the name that plans use."""


def stored_format(name: str, rank: int = 0, rounds: int = 5) -> Format:
    """The format of a name, beside `rank` directions kept in bfloat16 where rank is not 0."""
    if name not in FORMATS:
        raise ValueError(f"no storage format is called {name!r}; there are {', '.join(FORMATS)}")
    return LowRank(FORMATS[name], rank, rounds) if rank else FORMATS[name]
