"""Identities of the parameterisation algebra, in float64."""

import math
from functools import partial

import pytest
import torch

from fastdiff.sampling import algebra

exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
ANGLES = torch.tensor([0.05, 0.4, 0.9, 1.3, 1.5], dtype=torch.float64).view(-1, 1)


def _pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    return clean, torch.randn(5, 32, dtype=torch.float64, generator=generator)


def _level(kind):
    signal, noise = torch.cos(ANGLES), torch.sin(ANGLES)
    if kind == "flow":
        return signal / (signal + noise), noise / (signal + noise)
    return signal, noise


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("prediction", algebra.PREDICTIONS)
def test_estimates_invert_predict_at_every_level(prediction, kind):
    clean, eps = _pair()
    signal, noise = _level(kind)
    output = algebra.predict(prediction, clean, eps, signal, noise)
    found = algebra.estimates(prediction, signal * clean + noise * eps, output, signal, noise)
    torch.testing.assert_close(found, (clean, eps), rtol=1e-11, atol=1e-12)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        algebra.clean_weights("score", *_level("vp"))  # pyright: ignore[reportArgumentType]


def test_conversions_keep_clean_and_noise():
    clean, eps = _pair()
    signal, noise = _level("vp")
    x = signal * clean + noise * eps
    flow, sigma = algebra.vp_to_flow(x, signal, noise)
    exactly(flow, (1 - sigma) * clean + sigma * eps)
    exactly(algebra.flow_to_vp(flow, sigma), (x, signal, noise))
    for data_std in (1.0, 0.5):
        trig, angle = algebra.flow_to_trig(flow, sigma, data_std)
        exactly(angle, ANGLES)
        exactly(trig, data_std * (torch.cos(angle) * clean + torch.sin(angle) * eps))
        exactly(algebra.trig_to_flow(trig, angle, data_std), (flow, sigma))
        torch.testing.assert_close(algebra.trig_to_vp(*algebra.vp_to_trig(x, signal, noise, data_std), data_std)[0], x)


def test_ddim_in_vp_is_euler_in_sigma():
    clean, eps = _pair()
    signal, noise = _level("vp")
    following_signal, following_noise = torch.cos(ANGLES / 2), torch.sin(ANGLES / 2)
    flow, sigma = algebra.vp_to_flow(signal * clean + noise * eps, signal, noise)
    after, following = algebra.vp_to_flow(
        following_signal * clean + following_noise * eps, following_signal, following_noise
    )
    exactly(flow + (following - sigma) * (eps - clean), after)


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_trigflow_wrap_of_a_flow_network_says_the_same(data_std):
    clean, eps = _pair()
    weight = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def network(x, sigma):
        return torch.tanh(x * weight) + sigma

    flow, sigma = algebra.vp_to_flow(torch.cos(ANGLES) * clean + torch.sin(ANGLES) * eps, *_level("vp"))
    expected = algebra.estimates("flow_prediction", flow, network(flow, sigma), 1 - sigma, sigma)
    x, angle = algebra.flow_to_trig(flow, sigma, data_std)
    output = algebra.as_trigflow(network, "flow_prediction", data_std=data_std)(x, angle)
    found = algebra.trig_estimates(x, output, angle, data_std)
    exactly(found, tuple(data_std * value for value in expected))
    # the closed form of SANA-Sprint
    radius = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    closed = ((1 - 2 * sigma) * flow + (1 - 2 * sigma + 2 * sigma**2) * network(flow, sigma)) / radius
    exactly(output, closed)


def test_trigflow_wrap_of_a_velocity_network_is_the_identity():
    x, _ = _pair()

    def network(x, t):
        return torch.sin(x) * t

    wrapped = algebra.as_trigflow(network, "v_prediction", timestep=lambda angle: angle * 3)
    exactly(wrapped(x, ANGLES), network(x, ANGLES * 3))


def test_trigflow_wrap_of_a_noise_network():
    clean, eps = _pair()
    wrapped = algebra.as_trigflow(lambda x, t: eps, "epsilon", timestep=lambda angle: angle)
    x = torch.cos(ANGLES) * clean + torch.sin(ANGLES) * eps
    torch.testing.assert_close(algebra.trig_estimates(x, wrapped(x, ANGLES), ANGLES)[0], clean, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="needs timestep="):
        algebra.as_trigflow(lambda x, t: eps, "epsilon")


def test_timestep_of_angle_interpolates_the_table():
    angles = torch.tensor([0.1, 0.2, 0.4, 1.0], dtype=torch.float64)
    timestep = algebra.timestep_of_angle(torch.cos(angles), torch.sin(angles))
    asked = torch.tensor([0.0, 0.1, 0.15, 0.3, 0.7, 2.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.5, 1.5, 2.5, 3.0], dtype=torch.float64)
    exactly(timestep(asked), expected)


def test_shift_lowers_log_snr_by_twice_its_logarithm():
    sigma = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for factor in (0.5, 1.0, 3.0, math.exp(1.15)):
        shifted = algebra.shift_sigma(sigma, factor)
        difference = algebra.log_snr(1 - sigma, sigma) - algebra.log_snr(1 - shifted, shifted)
        exactly(difference, torch.full_like(sigma, 2 * math.log(factor)))
        exactly(algebra.shift_sigma(shifted, 1 / factor), sigma)
    assert algebra.shift_sigma(1.0, 7.0) == 1.0 and algebra.shift_sigma(0.0, 7.0) == 0.0
    assert algebra.resolution_shift(1024, 4096) == 2.0
    assert algebra.dynamic_shift(4096) == pytest.approx(1.15) and algebra.dynamic_shift(256) == pytest.approx(0.5)
