"""What a denoiser is told about time, and the noise level that stands for.

Pipelines tell their denoisers 0-999, 1000 sigma or sigma itself, under several names. Levels here are flow matching's
sigma, 0 for clean and 1 for noise, on every schedule: ``noise / (signal + noise)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import TIMESTEPS
from fastdiff.sampling.schedule import is_flow


def timestep_name(names: Any) -> str:
    """Which of a denoiser's arguments (their names, or a mapping by name) is its time.

    Raises:
        Unsupported: none is, or it runs backwards (Z-Image counts from clean to noise).
    """
    for name in TIMESTEPS:
        if name in names:
            if name == "t":
                raise Unsupported("this denoiser counts its time `t` in its own way, which is not known here")
            return name
    raise Unsupported(f"this denoiser takes no time: its arguments are {', '.join(names)}")


def told_rows(value: Any) -> list[float]:
    """The times a call was told, one per row or one for all."""
    return [float(one) for one in torch.as_tensor(value).reshape(-1)]


def level_of(scheduler: Any, told: float) -> float:
    """The noise level in [0, 1] of a time as the denoiser is told it.

    Raises:
        Unsupported: the scheduler is neither of flow matching nor has a table of cumulative alphas.
    """
    if is_flow(scheduler):
        # some pipelines say sigma, others 1000 sigma; no schedule goes as low as sigma 0.001
        return told if told <= 1 else told / scheduler.config.num_train_timesteps
    products = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(products, Tensor):
        raise Unsupported(f"{type(scheduler).__name__} does not say which noise level a timestep stands for")
    below = min(max(int(told), 0), len(products) - 1)
    above = min(below + 1, len(products) - 1)
    product = float(products[below]) + (told - int(told)) * float(products[above] - products[below])
    signal, noise = product**0.5, (1 - product) ** 0.5
    return noise / (signal + noise)
