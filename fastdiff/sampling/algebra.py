"""One algebra for every parameterisation: noise, velocity, clean sample, flow and TrigFlow networks.

A noise level is a pair ``(signal, noise)`` with ``x = signal * clean + noise * eps``:

* variance preserving (VP): ``signal² + noise² = 1``,
* flow matching: ``signal = 1 - sigma``, ``noise = sigma``,
* TrigFlow (https://huggingface.co/papers/2410.11081): ``signal = cos(angle)``, ``noise = sin(angle)``.

The three differ only by a scale of ``x``, so a deterministic DDIM step in VP coordinates *is* an Euler step in sigma.
Every estimate here is linear in the network output; the weights are what the row-wise samplers fold into tables.
All functions take floats or tensors that broadcast, and are exact to 1e-12 in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample", "flow_prediction")
Number = TypeVar("Number", float, torch.Tensor)


def clean_weights(prediction: Prediction, signal: torch.Tensor, noise: torch.Tensor):
    """Weights ``(of_x, of_output)`` with ``clean = of_x * x + of_output * output``.

    ``signal`` and ``noise`` may be any level, not only VP. An ``epsilon`` network has no clean estimate at zero signal:
    the weights are infinite there.
    """
    power = signal**2 + noise**2
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "v_prediction":
        return signal / power, -noise / power
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "flow_prediction":
        return 1 / (signal + noise), -noise / (signal + noise)
    raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")


def noise_weights(prediction: Prediction, signal: torch.Tensor, noise: torch.Tensor):
    """Weights ``(of_x, of_output)`` with ``eps = of_x * x + of_output * output``.

    A ``sample`` network has no noise estimate at zero noise: the weights are infinite there.
    """
    power = signal**2 + noise**2
    if prediction == "epsilon":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "v_prediction":
        return noise / power, signal / power
    if prediction == "sample":
        return 1 / noise, -signal / noise
    if prediction == "flow_prediction":
        return 1 / (signal + noise), signal / (signal + noise)
    raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")


def estimates(prediction: Prediction, x: torch.Tensor, output: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor):
    """What the network says about ``x``: ``(clean, eps)``, each of the shape of ``x``."""
    of_x, of_output = clean_weights(prediction, signal, noise)
    clean = of_x * x + of_output * output
    of_x, of_output = noise_weights(prediction, signal, noise)
    return clean, of_x * x + of_output * output


def predict(prediction: Prediction, clean: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor):
    """The output a perfect ``prediction`` network gives at ``signal * clean + noise * eps`` (undoes estimates)."""
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return signal * eps - noise * clean
    if prediction == "sample":
        return clean
    if prediction == "flow_prediction":
        return eps - clean
    raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")


def vp_to_flow(x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor):
    """``(x, sigma)`` in flow coordinates of a VP state; clean sample and eps are unchanged."""
    scale = signal + noise
    return x / scale, noise / scale


def flow_to_vp(x: torch.Tensor, sigma: torch.Tensor):
    """``(x, signal, noise)`` in VP coordinates of a flow state; clean sample and eps are unchanged."""
    radius = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    return x / radius, (1 - sigma) / radius, sigma / radius


def vp_to_trig(x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor, data_std: float = 1.0):
    """``(x, angle)`` in TrigFlow coordinates, where the clean sample has standard deviation ``data_std``."""
    return x * data_std, torch.atan2(noise, signal)


def trig_to_vp(x: torch.Tensor, angle: torch.Tensor, data_std: float = 1.0):
    """``(x, signal, noise)`` in VP coordinates of a TrigFlow state."""
    return x / data_std, torch.cos(angle), torch.sin(angle)


def flow_to_trig(x: torch.Tensor, sigma: torch.Tensor, data_std: float = 1.0):
    """``(x, angle)`` in TrigFlow coordinates of a flow state."""
    return vp_to_trig(*flow_to_vp(x, sigma), data_std)


def trig_to_flow(x: torch.Tensor, angle: torch.Tensor, data_std: float = 1.0):
    """``(x, sigma)`` in flow coordinates of a TrigFlow state."""
    return vp_to_flow(*trig_to_vp(x, angle, data_std))


def trig_estimates(x: torch.Tensor, output: torch.Tensor, angle: torch.Tensor, data_std: float = 1.0):
    """``(clean, eps)`` of a TrigFlow network ``output = F(x / data_std, angle)``; both scaled by ``data_std``."""
    signal, noise = torch.cos(angle), torch.sin(angle)
    return signal * x - noise * data_std * output, noise * x + signal * data_std * output


def as_trigflow(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prediction: Prediction,
    timestep: Callable[[torch.Tensor], torch.Tensor] | None = None,
    data_std: float = 1.0,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Wrap a trained network as a TrigFlow network, without training (SANA-Sprint, https://arxiv.org/abs/2503.09641).

    Args:
        network: called as ``network(x, level)``: for a flow network ``x`` in flow coordinates and ``level = sigma`` in
            [0, 1]; for the others ``x`` in VP coordinates and ``level = timestep(angle)``.
        prediction: what ``network`` predicts. For ``v_prediction`` the wrap is the identity (at ``data_std`` 1).
        timestep: maps angles to the network's own time (see `timestep_of_angle`); needed unless it is a flow network.
        data_std: standard deviation of the clean samples in TrigFlow coordinates.

    Returns:
        ``F(x, angle)`` of the shape of ``x``; an ``epsilon`` network makes it singular at an angle of pi/2, where a VP
        schedule never arrives (Stable Diffusion's ends at 1.5025 rad).
    """
    if prediction != "flow_prediction" and timestep is None:
        raise ValueError(f"a {prediction} network needs timestep=, a map from angles to its own time")

    def trigflow(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        scaled, signal, noise = trig_to_vp(x, angle, data_std)
        if prediction == "flow_prediction":
            inputs, sigma = vp_to_flow(scaled, signal, noise)
            clean, eps = estimates(prediction, inputs, network(inputs, sigma), 1 - sigma, sigma)
        else:
            assert timestep is not None
            clean, eps = estimates(prediction, scaled, network(scaled, timestep(angle)), signal, noise)
        return predict("v_prediction", clean, eps, signal, noise)

    return trigflow


def timestep_of_angle(signal: torch.Tensor, noise: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The continuous timestep of an angle on a discrete VP schedule: linear between the table's own angles.

    ``signal`` and ``noise`` are ``[T]``, from clean to noisy; angles outside the table are clamped to its ends.
    """
    angles = torch.atan2(noise, signal)

    def timestep(angle: torch.Tensor) -> torch.Tensor:
        bounded = angle.clamp(angles[0], angles[-1])
        upper = torch.searchsorted(angles, bounded.contiguous()).clamp(1, len(angles) - 1)
        lower = upper - 1
        return lower + (bounded - angles[lower]) / (angles[upper] - angles[lower])

    return timestep


def shift_sigma(sigma: Number, factor: float) -> Number:
    """Move a flow level towards noise: ``factor * sigma / (1 + (factor - 1) * sigma)``; log SNR falls 2 ln factor."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def resolution_shift(native_tokens: int, target_tokens: int) -> float:
    """Shift factor for another resolution (SD3, https://arxiv.org/abs/2403.03206, eq. 23): sqrt(target / native)."""
    return math.sqrt(target_tokens / native_tokens)


def dynamic_shift(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """FLUX's ``mu`` for an image of ``tokens`` latent tokens; the shift factor is ``exp(mu)``."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def log_snr(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of ``signal² / noise²``."""
    return 2 * (torch.log(signal) - torch.log(noise))
