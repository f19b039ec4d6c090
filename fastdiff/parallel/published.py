"""Published latencies on one and more devices, and how well the cost model's form explains them.

A model with two unknowns, T(n) = s + c / n, is fitted in relative error. *Blind* means fitted without the largest n and
then asked for it: that is what an extrapolation from few devices is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """Seconds by number of devices, as published. `source` says by whom."""

    name: str
    seconds: tuple[tuple[int, float], ...]
    source: str


MEASUREMENTS = (
    Measurement("Flux-dev 1024, 28 steps, H100, Ulysses", ((1, 4.30), (2, 2.68), (4, 1.63)), "xDiT performance pages"),
    Measurement(
        "HunyuanVideo 720p 129 frames, H20", ((1, 6639), (2, 3401), (4, 1763), (8, 941)), "HunyuanVideo and xDiT pages"
    ),
    Measurement(
        "HunyuanVideo 720p 129 frames, H100", ((1, 1904), (2, 925), (4, 514), (8, 338)), "HunyuanVideo and xDiT pages"
    ),
    Measurement("HunyuanVideo 720p 129 frames, L20, PCIe", ((2, 6044), (4, 3271), (8, 2080)), "xDiT pages"),
    Measurement("Qwen-Image 2048, H800", ((1, 112.5), (2, 65.2), (4, 39.6), (8, 30.8)), "vLLM-Omni documentation"),
)

SDXL_TENSORRT = ((1, 25.25), (2, 13.33), (4, 8.27))
"""SDXL 2048 x 2048, 50 steps, A100: one device, guidance split, and 2 x 2 with asynchronous norms; 8.64 s in sync
(TensorRT-LLM pull request 1514)."""


@dataclass(frozen=True)
class Row:
    """One measurement against the model: largest relative error of the fit, and of the blind prediction (signed)."""

    name: str
    serial_s: float
    parallel_s: float
    fit_error: float
    blind_error: float


def fit(seconds: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit T(n) = s + c / n, least squares of the relative error; return (s, c), s at least 0."""
    rows = [(1 / time, 1 / (n * time)) for n, time in seconds]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    serial = (a1 * bb - b1 * ab) / determinant
    if serial < 0:
        return 0.0, b1 / bb
    return serial, (b1 * aa - a1 * ab) / determinant


def table() -> list[Row]:
    """The validation table."""
    rows = []
    for one in MEASUREMENTS:
        serial, parallel = fit(one.seconds)
        errors = [abs((serial + parallel / n) / time - 1) for n, time in one.seconds]
        blind_serial, blind_parallel = fit(one.seconds[:-1])
        devices, time = one.seconds[-1]
        blind = (blind_serial + blind_parallel / devices) / time - 1
        rows.append(Row(one.name, serial, parallel, max(errors), blind))
    return rows
