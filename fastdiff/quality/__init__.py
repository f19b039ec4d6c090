"""What a speed-up cost: fidelity metrics and paired statistics."""

from .fidelity import psnr, ssim
from .statistics import Interval, mean_interval, paired_difference, paired_median_difference

__all__ = ["Interval", "mean_interval", "paired_difference", "paired_median_difference", "psnr", "ssim"]
