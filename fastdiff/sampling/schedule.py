"""Where the steps lie: noise levels and timesteps of a diffusers scheduler config, in float64 on the CPU.

Timesteps run from noisy to clean. ``strength`` below 1 starts part-way, as image-to-image does, and always leaves
exactly ``steps`` of them: a stream is sized by its denoiser calls, not by the steps it skips.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from fastdiff.sampling.algebra import PREDICTIONS, Prediction


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """The config mapping of a diffusers scheduler, or the mapping itself."""
    return scheduler if isinstance(scheduler, Mapping) else scheduler.config


def is_flow(scheduler: Any) -> bool:
    """Whether this scheduler's network predicts a flow-matching velocity on ``x = (1 - sigma) clean + sigma eps``."""
    config = config_of(scheduler)
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return True
    return "beta_schedule" not in config and "shift" in config


def prediction_of(scheduler: Any) -> Prediction:
    """What the network predicts, read from the scheduler's config."""
    if is_flow(scheduler):
        return "flow_prediction"
    prediction = config_of(scheduler).get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"row-wise samplers do not know the prediction type {prediction!r}; known: {PREDICTIONS}")
    return cast(Prediction, prediction)


def signal_and_noise(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """VP levels ``(signal, noise)`` of every training timestep: float64 ``[T]`` each, from clean to noisy."""
    products = alphas_cumprod(scheduler)
    return products.sqrt(), (1 - products).sqrt()


def alphas_cumprod(scheduler: Any) -> torch.Tensor:
    """The schedule's cumulative alphas, float64 ``[T]``: diffusers' own without their float32 rounding."""
    config = config_of(scheduler)
    refuse_nonlinear(config)
    count = config["num_train_timesteps"]
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        edges = torch.cos((torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - edges[1:] / edges[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"row-wise samplers do not know the beta schedule {kind!r} of this scheduler")
    products = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        roots = products.sqrt()  # https://arxiv.org/abs/2305.08891, algorithm 1
        products = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return products


def refuse_nonlinear(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for configs that clip or threshold the clean estimate."""
    for name in ("clip_sample", "thresholding"):
        if config.get(name):
            raise ValueError(
                f"the scheduler config sets {name}=True; row-wise samplers are linear in the network output. Build the "
                f"scheduler with {name}=False (latent models are trained without it)"
            )


def consistency_timesteps(scheduler: Any, steps: int, strength: float = 1.0, original_steps: int = 50) -> list[int]:
    """LCM's and TCD's timesteps: ``steps`` evenly chosen ones of the distillation grid below ``strength``.

    Raises:
        ValueError: if the grid below ``strength`` has fewer than ``steps`` points.
    """
    config = config_of(scheduler)
    original_steps = config.get("original_inference_steps") or original_steps
    stride = config["num_train_timesteps"] // original_steps
    grid = np.arange(1, int(original_steps * strength) + 1)[::-1] * stride - 1
    if len(grid) < steps:
        raise ValueError(
            f"strength {strength} leaves {len(grid)} timesteps of the {original_steps}-step grid, fewer than the "
            f"{steps} steps asked for: raise strength or take fewer steps"
        )
    chosen = np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(int)
    return [int(t) for t in grid[chosen]]


def steps_for_strength(steps: int, strength: float, most: int = 1000) -> int:
    """Length of the full schedule whose last ``steps`` steps diffusers' image-to-image takes at ``strength``."""
    total = math.ceil(steps / strength - 1e-9)
    if total > most:
        raise ValueError(f"strength {strength} with {steps} steps needs a schedule of {total} steps, over {most}")
    return total


def spaced_timesteps(scheduler: Any, steps: int, strength: float = 1.0) -> list[int]:
    """DDIM's timesteps under the config's ``timestep_spacing``: the last ``steps`` below ``strength``."""
    config = config_of(scheduler)
    count, spacing = config["num_train_timesteps"], config.get("timestep_spacing", "leading")
    total = steps_for_strength(steps, strength, count)
    if spacing == "linspace":
        grid = np.linspace(0, count - 1, total).round()[::-1]
    elif spacing == "leading":
        grid = np.arange(total)[::-1] * (count // total) + config.get("steps_offset", 0)
    elif spacing == "trailing":
        grid = np.round(np.arange(count, 0, -count / total)) - 1
    else:
        raise ValueError(f"unknown timestep_spacing {spacing!r}: choose linspace, leading or trailing")
    return [int(t) for t in grid[-steps:]]


def flow_sigmas(
    scheduler: Any,
    steps: int,
    strength: float = 1.0,
    mu: float | None = None,
    uniform: bool = False,
) -> list[float]:
    """Flow-matching levels of the last ``steps`` steps, shifted as the config says; without the closing zero.

    Args:
        mu: exponent of the resolution-dependent shift, needed when the config has ``use_dynamic_shifting``.
        uniform: start from FLUX's grid ``linspace(1, 1 / N, N)`` instead of the scheduler's own.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = config_of(scheduler)
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas=True (a video model's convention) is not supported by the row-wise samplers")
    if "shift" in config:
        names = set(FlowMatchEulerDiscreteScheduler().config) - {"_class_name", "_diffusers_version"}
        flow = FlowMatchEulerDiscreteScheduler(**{name: config[name] for name in names if name in config})
    else:
        flow = FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=config.get("flow_shift", 1.0))
    total = steps_for_strength(steps, strength, config["num_train_timesteps"])
    sigmas = np.linspace(1.0, 1 / total, total).tolist() if uniform else None
    flow.set_timesteps(total, sigmas=sigmas, mu=mu if config.get("use_dynamic_shifting") else None)
    levels: Any = flow.sigmas
    return [float(s) for s in levels[:-1][-steps:]]


def check_timesteps(timesteps: Sequence[float], most: float) -> list[float]:
    """User timesteps as floats; they must fall strictly and lie in [0, most]."""
    values = [float(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if not values or not falling or values[0] > most or values[-1] < 0:
        raise ValueError(f"timesteps must fall strictly and lie in [0, {most:g}], from noisy to clean; got {values}")
    return values
