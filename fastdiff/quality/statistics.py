"""Means and paired differences with bootstrap intervals.

Comparisons are paired: the same prompts and the same initial noise for both methods, so that what differs between
prompts cancels. An interval is the percentile bootstrap's central 95 % (Efron & Tibshirani 1993, §13.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def exact(cls, value: float, n: int = 1) -> "Interval":
        """A counted or computed figure, without sampling error."""
        return cls(float(value), float(value), float(value), n)

    def as_json(self) -> dict[str, float | int]:
        """The benchmark record's form: value, low, high, n."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


def _bootstrap(samples: np.ndarray, statistic: Callable[..., np.ndarray], seed: int) -> Interval:
    samples = samples[~np.isnan(samples)]
    n = len(samples)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if np.isinf(samples).any():
        value = float(statistic(samples))
        return Interval(value, value, value, n)
    rng = np.random.default_rng(seed)
    # In slices, so that a million samples do not need a gigabyte of indices.
    rows = max(1, 4_000_000 // n)
    draws = [
        statistic(samples[rng.integers(n, size=(min(rows, _RESAMPLES - start), n))], axis=-1)
        for start in range(0, _RESAMPLES, rows)
    ]
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return Interval(float(statistic(samples)), float(low), float(high), n)


def mean_interval(samples: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Mean of `samples` (NaN entries are left out) with its bootstrap interval."""
    return _bootstrap(np.asarray(samples, np.float64), np.mean, seed)


def _differences(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> np.ndarray:
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {list(first.shape)} and {list(second.shape)}")
    return first - second


def paired_difference(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Mean of x - y over pairs, with its bootstrap interval; a pair with a NaN is left out.

    Raises ValueError when the lengths differ.
    """
    return _bootstrap(_differences(x, y), np.mean, seed)


def paired_median_difference(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, seed: int = 0
) -> Interval:
    """Median of x - y over pairs, for heavy-tailed figures such as PSNR, with its bootstrap interval."""
    return _bootstrap(_differences(x, y), np.median, seed)


def median_interval(samples: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Median of `samples` with its bootstrap interval, for heavy-tailed figures such as PSNR."""
    return _bootstrap(np.asarray(samples, np.float64), np.median, seed)


def quantile_interval(samples: Sequence[float] | np.ndarray, share: float, seed: int = 0) -> Interval:
    """The value below which `share` (0..1) of `samples` lie, with its bootstrap interval."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies from 0 to 1, not {share}")
    return _bootstrap(np.asarray(samples, np.float64), lambda some, **axis: np.quantile(some, share, **axis), seed)
