"""Folded guidance against its formulas."""

from functools import partial

import pytest
import torch

from fastdiff.sampling import algebra, guidance, rows

exactly = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)

VP = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}


def _table(prediction, steps=4):
    if prediction == "flow_prediction":
        return rows.euler(FLOW, steps, strength=0.8)
    return rows.lcm({**VP, "prediction_type": prediction}, steps)


def _draw(seed):
    return torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, OUTPUT, NEGATIVE, REFERENCE = (_draw(seed) for seed in range(4))


def _folded(table, step, *arguments):
    g = guidance.guide(table, *arguments)
    return (
        g.x[step] * X + g.output[step] * OUTPUT + g.negative[step] * NEGATIVE + g.reference[step] * REFERENCE,
        g.clean_x[step] * X
        + g.clean_output[step] * OUTPUT
        + g.clean_negative[step] * NEGATIVE
        + g.clean_reference[step] * REFERENCE,
    )


def _plain(table, step, output):
    return (
        table.keep[step] * X + table.gain[step] * output,
        table.clean_keep[step] * X + table.clean_gain[step] * output,
    )


@pytest.mark.parametrize("prediction", algebra.PREDICTIONS)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_full_guidance(prediction, step):
    table = _table(prediction)
    exactly(_folded(table, step, "full", 3.0), _plain(table, step, NEGATIVE + 3 * (OUTPUT - NEGATIVE)))


@pytest.mark.parametrize("prediction", algebra.PREDICTIONS)
@pytest.mark.parametrize("kind", guidance.GUIDANCE)
def test_scale_one_is_no_guidance(prediction, kind):
    table = _table(prediction)
    exactly(_folded(table, 1, kind, 1.0, 0.3), _plain(table, 1, OUTPUT))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("scale", "delta"), [(1.4, 1.0), (1.4, 0.5), (2.0, 0.0)])
def test_self_guidance_in_noise_space(prediction, scale, delta):
    table, step = _table(prediction), 2
    signal, noise = table.signal[step], table.noise[step]
    virtual = (X - signal * REFERENCE) / noise
    _, eps = algebra.estimates(prediction, X, OUTPUT, signal, noise)
    guided = delta * virtual + scale * (eps - delta * virtual)
    output = algebra.predict(prediction, (X - noise * guided) / signal, guided, signal, noise)
    exactly(_folded(table, step, "self", scale, delta), _plain(table, step, output))


def test_delta_zero_multiplies_the_noise():
    table = _table("epsilon")
    exactly(_folded(table, 1, "self", 1.7, 0.0), _plain(table, 1, 1.7 * OUTPUT))


def test_self_guidance_of_a_flow_network_in_velocity_space():
    table, step = _table("flow_prediction"), 1
    velocity = (X - REFERENCE) / table.noise[step]
    output = 0.5 * velocity + 1.4 * (OUTPUT - 0.5 * velocity)
    exactly(_folded(table, step, "self", 1.4, 0.5), _plain(table, step, output))


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_at_delta_one_every_network_agrees(scale):
    """The same clean and noise estimates are guided to the same clean estimate, whatever the network predicts."""
    flow = rows.euler(FLOW, 4, strength=0.5)
    signal, noise = flow.signal[1], flow.noise[1]
    clean, eps = _draw(5), _draw(6)
    found = []
    for prediction in algebra.PREDICTIONS:
        table = rows._table(
            "any", prediction, flow.timesteps, flow.signal, flow.noise, flow.keep, flow.gain, flow.fresh,
            clean=algebra.clean_weights(prediction, flow.signal, flow.noise),
        )  # fmt: skip
        g = guidance.guide(table, "self", scale, 1.0)
        output = algebra.predict(prediction, clean, eps, signal, noise)
        x = signal * clean + noise * eps
        found.append(g.clean_x[1] * x + g.clean_output[1] * output + g.clean_reference[1] * REFERENCE)
    for other in found[1:]:
        exactly(other, found[0])


@pytest.mark.parametrize("prediction", algebra.PREDICTIONS)
def test_the_first_row_of_onetime_is_full_guidance(prediction):
    table = _table(prediction)
    exactly(_folded(table, 0, "onetime", 1.8, 1.0), _folded(table, 0, "full", 1.8, 1.0))
    exactly(_folded(table, 1, "onetime", 1.8, 0.6), _folded(table, 1, "self", 1.8, 0.6))


@pytest.mark.parametrize("prediction", algebra.PREDICTIONS)
@pytest.mark.parametrize("delta", [1.0, 0.6])
def test_the_anchor_of_onetime_stands_for_its_negative(prediction, delta):
    """Self guidance towards the negative row's clean estimate is onetime guidance at that row."""
    table = _table(prediction)
    g = guidance.guide(table, "self", 1.8, delta)
    anchor = g.anchor_x[0] * X + g.anchor_negative[0] * NEGATIVE
    found = g.x[0] * X + g.output[0] * OUTPUT + g.reference[0] * anchor
    exactly(found, _folded(table, 0, "onetime", 1.8, delta)[0])


@pytest.mark.parametrize("scale", [0.5, 1.4, 7.0])
def test_self_guidance_has_the_reference_as_fixed_point(scale):
    """A network that already sees the reference behind the noise is left alone, whatever the scale."""
    for prediction in algebra.PREDICTIONS:
        table = _table(prediction)
        for step in range(4):
            signal, noise = table.signal[step], table.noise[step]
            eps = (X - signal * REFERENCE) / noise
            output = algebra.predict(prediction, REFERENCE, eps, signal, noise)
            g = guidance.guide(table, "self", scale, 1.0)
            plain = table.clean_keep[step] * X + table.clean_gain[step] * output
            found = g.clean_x[step] * X + g.clean_output[step] * output + g.clean_reference[step] * REFERENCE
            exactly(found, plain)


def test_stock_noise_of_the_published_code_is_the_explicit_form():
    """With a boundary of exactly 0 and 1 its recursion and the reference held per row say the same."""
    table = rows.ddim(VP, timesteps=[999, 759, 499, 259])
    signals, noises = table.signal, table.noise
    clean, draws = _draw(0), [_draw(seed) for seed in range(10, 14)]
    x, stock = signals[0] * clean + noises[0] * draws[0], draws[0]
    for i in range(4):
        exactly(stock, (x - signals[i] * clean) / noises[i])
        eps = 0.7 * stock + 1.4 * (torch.sin(x) - 0.7 * stock)
        if i < 3:
            stock = draws[i + 1] + signals[i + 1] / noises[i + 1] * (noises[i] * (stock - eps)) / signals[i]
            x = signals[i + 1] * (x - noises[i] * eps) / signals[i] + noises[i + 1] * draws[i + 1]


def test_rows_that_need_a_negative():
    assert guidance.negative_steps(4, "full", 2.0) == 4
    assert guidance.negative_steps(4, "onetime", 2.0) == 1
    assert guidance.negative_steps(4, "self", 2.0) == guidance.negative_steps(4, "none", 2.0) == 0
    assert guidance.negative_steps(4, "full", 1.0) == 0


def test_what_cannot_be_folded_is_said():
    with pytest.raises(ValueError, match="unknown guidance 'cfg'"):
        guidance.guide(_table("epsilon"), "cfg")
    zero_signal = rows.lcm({**VP, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 4)
    with pytest.raises(ValueError, match="use delta 1"):
        guidance.guide(zero_signal, "self", 1.4, 0.5)
