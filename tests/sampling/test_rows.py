"""Row-wise samplers against diffusers' schedulers, against separate runs, and against closed forms."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import scheduling_flow_match_lcm, scheduling_lcm, scheduling_tcd

from fastdiff.sampling import algebra, rows, schedule

exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = {"num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "trailing", **BETAS}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def _draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _exact(scheduler: Any) -> Any:
    """Give a diffusers scheduler our float64 levels, so that parity can be held to float64."""
    products = schedule.alphas_cumprod(scheduler)
    scheduler.alphas_cumprod = products
    closed = float(scheduler.final_alpha_cumprod) == 1.0
    scheduler.final_alpha_cumprod = torch.ones_like(products[0]) if closed else products[0]
    return scheduler


def _index(value):
    return torch.tensor([value])


@pytest.mark.parametrize(
    "extra",
    [{}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}],
)
def test_levels_are_diffusers_levels(extra):
    scheduler = DDIMScheduler(**{**VP, "clip_sample": False, **extra})
    torch.testing.assert_close(
        schedule.alphas_cumprod(scheduler), scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (1, 1.0), (3, 0.5)])
def test_lcm_rows_are_diffusers_steps(monkeypatch, prediction, steps, strength):
    scheduler = _exact(LCMScheduler(**VP, prediction_type=prediction))
    scheduler.set_timesteps(steps, strength=strength)
    table = rows.lcm(scheduler, steps, strength)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = _draw(1, 4, 3, 3, seed=9)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, **k: noise)
    x = _draw(1, 4, 3, 3)
    for i, t in enumerate(scheduler.timesteps):
        output = _draw(1, 4, 3, 3, seed=i + 1)
        expected = scheduler.step(output, t, x)
        found, clean = rows.step(table, x, output, _index(i), noise)
        # diffusers' boundary scalings are float32
        torch.testing.assert_close(clean, expected.denoised, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, expected.prev_sample, rtol=1e-6, atol=1e-6)
        x = found


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_rows_are_diffusers_steps(monkeypatch, prediction, gamma):
    scheduler = _exact(TCDScheduler(**VP, prediction_type=prediction))
    scheduler.set_timesteps(4)
    table = rows.tcd(scheduler, 4, gamma=gamma)
    noise = _draw(1, 4, 3, 3, seed=9)
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *a, **k: noise)
    x = _draw(1, 4, 3, 3)
    for i, t in enumerate(scheduler.timesteps):
        output = _draw(1, 4, 3, 3, seed=i + 1)
        expected = scheduler.step(output, t, x, eta=gamma).prev_sample
        x = rows.step(table, x, output, _index(i), noise)[0]
        # diffusers floors (1 - gamma) t in float32; its step is the same unless that crosses a whole number
        exactly(x, expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("eta", "to_one"), [(0.0, True), (0.0, False), (1.0, True)])
def test_ddim_rows_are_diffusers_steps(prediction, spacing, eta, to_one):
    config = {**VP, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    scheduler = _exact(DDIMScheduler(**config, clip_sample=False, prediction_type=prediction))
    scheduler.set_timesteps(10)
    table = rows.ddim(scheduler, 10, eta=eta)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    x, noise = _draw(1, 4, 3, 3), _draw(1, 4, 3, 3, seed=9)
    strides = (table.timesteps[:-1] - table.timesteps[1:]).tolist()
    for i, t in enumerate(scheduler.timesteps.tolist()):
        output = _draw(1, 4, 3, 3, seed=i + 1)
        found, clean = rows.step(table, x, output, _index(i), noise)
        expected = scheduler.step(output, t, x, eta=eta, variance_noise=noise)
        exactly(clean, expected.pred_original_sample)
        if i + 1 == len(table) or strides[i] == 100:  # linspace: diffusers' previous timestep is not the next in line
            exactly(found, expected.prev_sample)
        x = found


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (4, 0.5), (20, 1.0), (1, 1.0)])
@pytest.mark.parametrize("extra", [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}])
def test_dpm_rows_are_diffusers_steps(prediction, steps, strength, extra):
    config = {**VP, "prediction_type": prediction, **extra}
    table = rows.dpm(config, steps, strength)
    scheduler: Any = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(schedule.steps_for_strength(steps, strength))
    first = len(scheduler.timesteps) - steps
    scheduler.set_begin_index(first)
    assert table.timesteps.tolist() == scheduler.timesteps[first:].tolist()
    x, past = _draw(1, 4, 3, 3).float(), torch.zeros(1, 4, 3, 3)
    single = table.to(dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps[first:]):
        output = _draw(1, 4, 3, 3, seed=i + 1).float()
        expected = scheduler.step(output, t, x).prev_sample
        x, past = rows.step(single, x, output, _index(i), past=past)
        torch.testing.assert_close(x, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_rows_are_diffusers_steps(monkeypatch, shift):
    noise = _draw(1, 4, 3, 3, seed=9).float()
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *a, **k: noise)
    for kind, make in ((FlowMatchEulerDiscreteScheduler, rows.euler), (FlowMatchLCMScheduler, rows.flow_lcm)):
        scheduler: Any = kind(shift=shift)
        scheduler.set_timesteps(5)
        table = make(scheduler, 5).to(dtype=torch.float32)
        torch.testing.assert_close(table.timesteps, scheduler.timesteps)
        x = _draw(1, 4, 3, 3).float()
        for i, t in enumerate(scheduler.timesteps):
            output = _draw(1, 4, 3, 3, seed=i + 1).float()
            expected = scheduler.step(output, t, x).prev_sample
            x, clean = rows.step(table, x, output, _index(i), noise)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
            assert i < 4 or torch.allclose(clean, x, rtol=1e-5, atol=1e-6)


def test_flow_rows_take_the_dynamic_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    table = rows.euler(scheduler, 4, mu=0.8, uniform=True)
    grid = torch.linspace(1, 0.25, 4, dtype=torch.float64)
    torch.testing.assert_close(table.noise, algebra.shift_sigma(grid, math.exp(0.8)), rtol=1e-6, atol=1e-6)


TABLES = {
    "lcm": lambda: rows.lcm(VP, 4),
    "tcd": lambda: rows.tcd({**VP, "prediction_type": "v_prediction"}, 4),
    "ddim": lambda: rows.ddim({**VP, "prediction_type": "v_prediction"}, 4, eta=0.5),
    "dpm": lambda: rows.dpm({**VP, "prediction_type": "v_prediction"}, 4),
    "euler": lambda: rows.euler({"num_train_timesteps": 1000, "shift": 3.0}, 4),
    "flow_lcm": lambda: rows.flow_lcm({"num_train_timesteps": 1000, "shift": 3.0}, 4),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_at_different_steps_are_separate_runs(name):
    """A ring of four rows, one step apart, gives what four runs give alone."""
    table = TABLES[name]()
    weight = _draw(6, 6, seed=5)

    def network(x, t):
        return torch.tanh(x @ weight) + t.view(-1, 1) / 1000

    starts, noises = _draw(4, 6, seed=1), _draw(4, 4, 6, seed=2)
    alone = []
    for start, noise in zip(starts, noises, strict=True):
        x, past = start[None], torch.zeros(1, 6, dtype=torch.float64)
        for i in range(4):
            x, past = rows.step(table, x, network(x, table.timesteps[[i]]), _index(i), noise[None, i], past)
        alone.append(x)
    state, past, done = {k: s[None] for k, s in enumerate(starts)}, {}, {}
    for call in range(7):
        live = [k for k in range(4) if 0 <= call - k < 4]
        index = torch.tensor([call - k for k in live])
        x = torch.cat([state[k] for k in live])
        before = torch.cat([past.get(k, torch.full((1, 6), 7.0, dtype=torch.float64)) for k in live])
        noise = torch.stack([noises[k, call - k] for k in live])
        x, clean = rows.step(table, x, network(x, table.timesteps[index]), index, noise, before)
        for row, k in enumerate(live):
            state[k], past[k] = x[row : row + 1], clean[row : row + 1]
            if call - k == 3:
                done[k] = state[k]
    exactly(torch.cat([done[k] for k in range(4)]), torch.cat(alone))


def test_lcm_boundary_and_one_step():
    table = rows.lcm(VP, timesteps=[999, 0])
    assert table.clean_keep[1] == pytest.approx(1.0, abs=1e-12) and table.clean_gain[1] == pytest.approx(0, abs=1e-12)
    assert rows.lcm(VP, 4).timesteps.tolist() == [999, 759, 499, 259]
    single = rows.lcm(VP, 1)
    signals, noises = schedule.signal_and_noise(VP)
    x, output = _draw(1, 3), _draw(1, 3, seed=1)
    skip, out = 0.25 / (9990**2 + 0.25), 9990 / math.sqrt(9990**2 + 0.25)
    expected = out * (x - noises[999] * output) / signals[999] + skip * x
    exactly(rows.step(single, x, output, _index(0), noise=x)[0], expected)


def test_tcd_without_noise_is_ddim_on_its_grid():
    config = {**VP, "prediction_type": "v_prediction", "set_alpha_to_one": False}
    quiet, plain = rows.tcd(config, 4, gamma=0.0), rows.ddim(config, timesteps=[999, 759, 499, 259])
    for name in ("keep", "gain", "signal", "noise"):
        exactly(getattr(quiet, name), getattr(plain, name))
    assert not quiet.injects_noise


def test_ddim_is_euler_on_the_mapped_flow():
    table = rows.ddim({**VP, "prediction_type": "epsilon"}, 6)
    sigma = table.noise / (table.signal + table.noise)
    mapped = rows.euler({"num_train_timesteps": 1000, "shift": 1.0}, timesteps=(sigma * 1000).tolist())
    x = vp = _draw(1, 8)
    x, _ = algebra.vp_to_flow(x, table.signal[0], table.noise[0])
    for i in range(6):
        eps = torch.sin(3 * vp)
        clean, _ = algebra.estimates("epsilon", vp, eps, table.signal[i], table.noise[i])
        vp = rows.step(table, vp, eps, _index(i))[0]
        x = rows.step(mapped, x, eps - clean, _index(i))[0]
    torch.testing.assert_close(x, vp, rtol=1e-11, atol=1e-11)


def _orders(order, counts=(32, 64, 128)):
    """Slopes of the error on a Gaussian of standard deviation 0.5, whose probability flow is known in closed form."""
    errors = []
    for count in counts:
        sigmas = torch.exp(torch.linspace(2.0, -4.5, count + 1, dtype=torch.float64))
        signals, told = (1 + sigmas**2).rsqrt(), torch.arange(count, dtype=torch.float64)
        noises, variances = sigmas * signals, signals**2 * 0.25 + (sigmas * signals) ** 2
        x, past = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        whole = rows.multistep("epsilon", told, signals, noises, first_order_end=False)
        for i in range(count):
            single = rows.multistep("epsilon", told[[i]], signals[i : i + 2], noises[i : i + 2], first_order_end=True)
            table, at = (single, 0) if order == 1 else (whole, i)
            x, past = rows.step(table, x, noises[i] / variances[i] * x, _index(at), past=past)
        errors.append(abs(float(x) - float((variances[-1] / variances[0]).sqrt())))
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_solver_orders_are_slopes():
    assert all(0.8 < slope < 1.25 for slope in _orders(1))
    assert all(1.75 < slope < 2.4 for slope in _orders(2))


@pytest.mark.parametrize("bad", [[10, 20], [], [1000], [5, 5], [-1]])
def test_bad_timesteps_are_refused(bad):
    with pytest.raises(ValueError, match="timesteps"):
        rows.ddim(VP, timesteps=bad) if bad else schedule.check_timesteps(bad, 999)


def test_what_a_row_sampler_cannot_do_is_said():
    with pytest.raises(ValueError, match="clip_sample=False"):
        rows.lcm(DDIMScheduler(**VP))
    with pytest.raises(ValueError, match="singular for a epsilon network"):
        rows.ddim({**VP, "rescale_betas_zero_snr": True}, timesteps=[999, 500])
    with pytest.raises(ValueError, match="does not fit a flow-matching"):
        rows.build("tcd", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="fewer than the"):
        rows.lcm(VP, 8, strength=0.1)
    with pytest.raises(ValueError, match="injects noise"):
        rows.step(rows.lcm(VP, 2), _draw(1, 3), _draw(1, 3), _index(0))
    with pytest.raises(ValueError, match="whole numbers"):
        rows.build("lcm", VP, timesteps=[10.5])
