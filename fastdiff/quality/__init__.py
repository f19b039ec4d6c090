"""What a speed-up cost: fidelity metrics and paired statistics."""

from .control import ControlRow, equal_latency
from .fidelity import psnr, ssim
from .statistics import (
    Interval,
    mean_interval,
    median_interval,
    paired_difference,
    paired_median_difference,
    quantile_interval,
)

__all__ = [
    "ControlRow",
    "Interval",
    "equal_latency",
    "mean_interval",
    "median_interval",
    "paired_difference",
    "paired_median_difference",
    "psnr",
    "quantile_interval",
    "ssim",
]
