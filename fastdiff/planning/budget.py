"""What a user allows: words such as ``psnr>=30``, ``attribute_drop<=1%`` or ``40ms``, checked on reading."""

import math
import re
from dataclasses import dataclass

HIGHER = {"psnr": True, "ssim": True, "attribute_drop": False}


@dataclass(frozen=True)
class Budget:
    """A bound on one metric: `value` is the least allowed where higher is better, else the most."""

    metric: str
    value: float

    @property
    def higher(self) -> bool:
        """True where a higher figure is better."""
        return HIGHER[self.metric]

    def met(self, low: float, high: float) -> bool:
        """True when even the worse end of an interval keeps to the bound."""
        return low >= self.value if self.higher else high <= self.value

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.higher else '<='}{self.value:g}"


def read_budget(text: str) -> Budget:
    """Read ``psnr>=30``, ``ssim>=0.95`` or ``attribute_drop<=1%``.

    Raises:
        ValueError: anything else; the message shows what would be right.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*(%?)\s*", text)
    shown = "write psnr>=30, ssim>=0.95 or attribute_drop<=1%"
    if not found or found.group(1) not in HIGHER:
        raise ValueError(f"{text!r} is no budget: {shown}")
    metric, sign, number, percent = found.groups()
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"{text!r} is no budget: {shown}") from None
    if not math.isfinite(value) or (sign == ">=") != HIGHER[metric]:
        raise ValueError(f"{text!r} is no budget: {shown}")
    return Budget(metric, value)


def read_latency(text: str) -> float:
    """Seconds of ``40ms``, ``1.5s`` or ``2.5x`` (then negative: times faster than without a plan).

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|x)\s*", text)
    value = float(found.group(1)) if found else 0.0
    if not found or value <= 0:
        raise ValueError(f"{text!r} is no latency: write 40ms, 1.5s or 2.5x")
    return {"ms": value / 1000, "s": value, "x": -value}[found.group(2)]
