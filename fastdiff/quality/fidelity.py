"""Fidelity of one picture to another: PSNR and SSIM, per picture."""

import torch
import torch.nn.functional as functional
from torch import Tensor


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures are two [B, C, H, W] of one shape, not {list(a.shape)} and {list(b.shape)}")
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError("pictures are floating point in 0..1: divide uint8 by 255")
    return a.double(), b.double()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio of [B, C, H, W] in 0..1: float64 [B] in dB, infinite where equal."""
    a, b = _pair(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def _window(sigma: float = 1.5, size: int = 11) -> Tensor:
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    weights = (-axis.square() / (2 * sigma**2)).exp()
    return weights / weights.sum()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of [B, C, H, W] in 0..1, H and W at least 11: float64 [B], 1 where equal.

    Gaussian window of 11 pixels and sigma 1.5, population statistics, valid positions only (Wang et al. 2004, §III-B).
    """
    a, b = _pair(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, not {a.shape[-2]} x {a.shape[-1]}")
    line = _window().to(a.device)

    def blur(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        flat = functional.conv2d(functional.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return flat.view(*x.shape[:2], *flat.shape[-2:])

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
    return (light * structure).mean(dim=(1, 2, 3))
