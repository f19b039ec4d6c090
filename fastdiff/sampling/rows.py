"""Row-wise samplers: one batch, every row at its own timestep, with its own noise and its own history.

diffusers' schedulers move a whole batch from one timestep to the next and keep their history in themselves, so they
cannot advance rows that are at different steps. Here a sampler is a table of numbers, and a step is a pure function.
Every sampler below is linear in the network output, so one expression serves them all::

    x_next = keep * x + gain * output + fresh * noise + past * previous_clean
    clean  = clean_keep * x + clean_gain * output

Tables are built in float64 on the CPU and cast once, with `RowTable.to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastdiff.sampling import schedule
from fastdiff.sampling.algebra import Prediction, clean_weights, noise_weights

SAMPLERS = ("lcm", "tcd", "ddim", "dpm", "euler")


@dataclass(frozen=True)
class RowTable:
    """The numbers of one sampler: ``[n]`` tensors, row ``i`` for step ``i`` of ``n``, from noisy to clean.

    Attributes:
        sampler: its name.
        prediction: what the network predicts.
        timesteps: what the network is told, in the scheduler's unit (0-999, or 1000 sigma for flow).
        signal, noise: level of the row's input, ``x = signal * clean + noise * eps``.
        keep, gain, fresh, past: weights of ``x``, the output, new noise and the previous clean estimate in the next x.
        clean_keep, clean_gain: weights of ``x`` and the output in the clean estimate.
        injects_noise: whether any step adds new noise.
        has_history: whether any step uses the previous clean estimate.
    """

    sampler: str
    prediction: Prediction
    timesteps: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    keep: torch.Tensor
    gain: torch.Tensor
    fresh: torch.Tensor
    past: torch.Tensor
    clean_keep: torch.Tensor
    clean_gain: torch.Tensor
    injects_noise: bool
    has_history: bool

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RowTable:
        """The same table on a device, its numbers rounded once from float64 to ``dtype``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, dtype) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def enter(table: RowTable, clean: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Noise ``clean`` ``[B, ...]`` to each row's own level: ``signal[index] * clean + noise[index] * noise``."""
    return _column(table.signal, index, clean) * clean + _column(table.noise, index, clean) * noise


def step(
    table: RowTable,
    x: torch.Tensor,
    output: torch.Tensor,
    index: torch.Tensor,
    noise: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance every row by one step of its own.

    Args:
        x, output: states and network outputs ``[B, ...]``, of the table's dtype.
        index: the step each row is at, int64 ``[B]`` in 0..n-1.
        noise: standard normal ``[B, ...]``; needed if the table injects noise (it is weighted 0 on a last step).
        past: each row's clean estimate of the step before, ``[B, ...]``; needed if the table has history. A row at its
            first step ignores it, so anything finite will do there.

    Returns:
        ``(x_next, clean)``: the next states (the sample, for a row at its last step) and the clean estimates.

    Raises:
        ValueError: if noise or history is needed and missing.
    """
    following = _column(table.keep, index, x) * x + _column(table.gain, index, x) * output
    if table.injects_noise:
        if noise is None:
            raise ValueError(f"the {table.sampler} sampler injects noise: pass noise= of the shape of x")
        following = following + _column(table.fresh, index, x) * noise
    if table.has_history:
        if past is None:
            raise ValueError(f"the {table.sampler} sampler needs past=, each row's previous clean estimate")
        following = following + _column(table.past, index, x) * past
    return following, _column(table.clean_keep, index, x) * x + _column(table.clean_gain, index, x) * output


def _column(values: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values[index].view(-1, *[1] * (like.ndim - 1))  # [B, 1, ...]


def lcm(scheduler: Any, steps: int = 4, strength: float = 1.0, timesteps: Sequence[int] | None = None) -> RowTable:
    """Latent consistency sampling (https://arxiv.org/abs/2310.04378), equal to diffusers' LCMScheduler."""
    told, signal, noise = _vp_levels(scheduler, timesteps or schedule.consistency_timesteps(scheduler, steps, strength))
    prediction = schedule.prediction_of(scheduler)
    scaled = told * schedule.config_of(scheduler).get("timestep_scaling", 10.0)
    of_x, of_output = clean_weights(prediction, signal, noise)
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    clean_keep, clean_gain = skip + out * of_x, out * of_output
    next_signal, next_noise = _shifted(signal, 1.0), _shifted(noise, 0.0)
    return _table(
        "lcm", prediction, told, signal, noise, next_signal * clean_keep, next_signal * clean_gain,
        fresh=next_noise, clean=(clean_keep, clean_gain),
    )  # fmt: skip


def tcd(
    scheduler: Any,
    steps: int = 4,
    strength: float = 1.0,
    timesteps: Sequence[int] | None = None,
    gamma: float = 0.3,
) -> RowTable:
    """Trajectory consistency sampling (https://arxiv.org/abs/2402.19159), equal to diffusers' TCDScheduler.

    ``gamma`` in [0, 1] is the share of noise renewed each step (``eta`` in diffusers); 0 is DDIM down to timestep 0.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    told, signal, noise = _vp_levels(scheduler, timesteps or schedule.consistency_timesteps(scheduler, steps, strength))
    signals, noises = schedule.signal_and_noise(scheduler)
    following = _shifted(told, 0.0)
    target = torch.floor((1 - gamma) * following).long()
    keep, gain = _move(schedule.prediction_of(scheduler), signal, noise, signals[target], noises[target])
    ratio = signals[following.long()] / signals[target]
    ratio[-1] = 1.0
    return _table(
        "tcd", schedule.prediction_of(scheduler), told, signal, noise, ratio * keep, ratio * gain,
        fresh=(1 - ratio**2).clamp(min=0).sqrt(),
    )  # fmt: skip


def ddim(
    scheduler: Any,
    steps: int = 25,
    strength: float = 1.0,
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
) -> RowTable:
    """DDIM (https://arxiv.org/abs/2010.02502); ``eta`` 0 is deterministic, 1 is DDPM.

    Each row goes to the next timestep of the list. diffusers goes to ``t - T // N`` instead, which is the same wherever
    N divides T.
    """
    told, signal, noise = _vp_levels(scheduler, timesteps or schedule.spaced_timesteps(scheduler, steps, strength))
    final = 1.0
    if not schedule.config_of(scheduler).get("set_alpha_to_one", True):
        final = float(schedule.signal_and_noise(scheduler)[0][0])
    next_signal = _shifted(signal, final)
    next_noise = (1 - next_signal**2).clamp(min=0).sqrt()
    spread = eta * (next_noise / noise) * (1 - (signal / next_signal) ** 2).clamp(min=0).sqrt()
    direction = (next_noise**2 - spread**2).clamp(min=0).sqrt()
    keep, gain = _move(schedule.prediction_of(scheduler), signal, noise, next_signal, direction)
    return _table("ddim", schedule.prediction_of(scheduler), told, signal, noise, keep, gain, fresh=spread)


def euler(
    scheduler: Any,
    steps: int = 4,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
    uniform: bool = False,
) -> RowTable:
    """Euler steps of a flow-matching network, equal to diffusers' FlowMatchEulerDiscreteScheduler."""
    told, sigma = _flow_levels(scheduler, steps, strength, timesteps, mu, uniform)
    following = _shifted(sigma, 0.0)
    return _table(
        "euler", "flow_prediction", told, 1 - sigma, sigma, torch.ones_like(sigma), following - sigma,
        fresh=torch.zeros_like(sigma),
    )  # fmt: skip


def flow_lcm(
    scheduler: Any,
    steps: int = 4,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
    uniform: bool = False,
) -> RowTable:
    """Consistency steps of a flow-matching network: clean estimate, then new noise (FlowMatchLCMScheduler)."""
    told, sigma = _flow_levels(scheduler, steps, strength, timesteps, mu, uniform)
    following = _shifted(sigma, 0.0)
    return _table(
        "lcm", "flow_prediction", told, 1 - sigma, sigma, 1 - following, -(1 - following) * sigma, fresh=following
    )


def dpm(scheduler: Any, steps: int = 25, strength: float = 1.0, timesteps: Sequence[int] | None = None) -> RowTable:
    """DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095), equal to diffusers' DPMSolverMultistepScheduler of order 2.

    The second-order correction uses the row's own previous clean estimate. A row's first step is of first order, and so
    is its last when the schedule is shorter than 15 steps or ends at zero noise, as in diffusers.
    """
    from diffusers import DPMSolverMultistepScheduler

    config = dict(schedule.config_of(scheduler))
    schedule.refuse_nonlinear(config)
    wanted = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    solver: Any = DPMSolverMultistepScheduler.from_config(config, **wanted)
    if timesteps is not None:
        solver.set_timesteps(timesteps=list(timesteps))
    else:
        solver.set_timesteps(schedule.steps_for_strength(steps, strength, config["num_train_timesteps"]))
    count = len(timesteps) if timesteps is not None else steps
    told, sigmas = solver.timesteps[-count:].double(), solver.sigmas[-count - 1 :].double()
    flow = bool(config.get("use_flow_sigmas"))
    signals = 1 - sigmas if flow else (1 + sigmas**2).rsqrt()
    noises = sigmas * (1 if flow else signals)
    whole = len(solver.timesteps)
    short = config.get("lower_order_final", True) and whole < 15
    first_order_end = short or config.get("euler_at_final") or config.get("final_sigmas_type", "zero") == "zero"
    return multistep(schedule.prediction_of(scheduler), told, signals, noises, bool(first_order_end))


def multistep(
    prediction: Prediction, told: torch.Tensor, signals: torch.Tensor, noises: torch.Tensor, first_order_end: bool
) -> RowTable:
    """DPM-Solver++(2M) over any levels: ``told`` ``[n]``, ``signals`` and ``noises`` float64 ``[n + 1]``."""
    signal, noise = signals[:-1], noises[:-1]
    of_x, of_output = clean_weights(prediction, signal, noise)
    # the first order of DPM-Solver++ is DDIM: x' = (noise'/noise) x + (signal' - signal noise'/noise) clean
    ratio = noises[1:] / noise
    weight = signals[1:] - signal * ratio
    widths = torch.log(signals[1:] / noises[1:]) - torch.log(
        signal / noise
    )  # in half log SNR; the last may be infinite
    second = torch.zeros_like(weight)
    second[1:] = widths[1:] / (2 * widths[:-1])
    if first_order_end:
        second[-1] = 0.0
    now = weight * (1 + second)
    return _table(
        "dpm", prediction, told, signal, noise, ratio + now * of_x, now * of_output,
        fresh=torch.zeros_like(weight), past=-weight * second,
    )  # fmt: skip


def build(sampler: str, scheduler: Any, **options: Any) -> RowTable:
    """The table of a sampler by name: ``lcm`` and ``euler`` for flow networks; ``lcm tcd ddim dpm`` for the others."""
    makers = {"lcm": flow_lcm, "euler": euler} if schedule.is_flow(scheduler) else VP_SAMPLERS
    if sampler not in makers:
        kind = "a flow-matching" if schedule.is_flow(scheduler) else "this"
        raise ValueError(f"sampler {sampler!r} does not fit {kind} model: choose one of {', '.join(makers)}")
    return makers[sampler](scheduler, **options)


VP_SAMPLERS = {"lcm": lcm, "tcd": tcd, "ddim": ddim, "dpm": dpm}


def _vp_levels(scheduler: Any, timesteps: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    signals, noises = schedule.signal_and_noise(scheduler)
    told = torch.tensor(schedule.check_timesteps(timesteps, len(signals) - 1), dtype=torch.float64)
    if not torch.equal(told, told.round()):
        raise ValueError(f"timesteps of a discrete schedule are whole numbers, got {list(timesteps)}")
    return told, signals[told.long()], noises[told.long()]


def _flow_levels(scheduler: Any, steps: int, strength: float, timesteps: Any, mu: float | None, uniform: bool):
    count = schedule.config_of(scheduler)["num_train_timesteps"]
    if timesteps is None:
        sigmas = schedule.flow_sigmas(scheduler, steps, strength, mu, uniform)
    else:
        sigmas = [t / count for t in schedule.check_timesteps(timesteps, count)]
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return sigma * count, sigma


def _shifted(values: torch.Tensor, final: float) -> torch.Tensor:
    return torch.cat([values[1:], torch.tensor([final], dtype=values.dtype)])


def _move(prediction: Prediction, signal, noise, next_signal, next_noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``(keep, gain)`` of ``next_signal * clean + next_noise * eps``."""
    clean_x, clean_output = clean_weights(prediction, signal, noise)
    eps_x, eps_output = noise_weights(prediction, signal, noise)
    return next_signal * clean_x + next_noise * eps_x, next_signal * clean_output + next_noise * eps_output


def _table(sampler, prediction, told, signal, noise, keep, gain, fresh, past=None, clean=None) -> RowTable:
    past = torch.zeros_like(keep) if past is None else past
    clean_keep, clean_gain = clean or clean_weights(prediction, signal, noise)
    if not torch.isfinite(torch.stack([keep, gain, fresh, past, clean_keep, clean_gain])).all():
        raise ValueError(
            f"the {sampler} sampler is singular for a {prediction} network at timesteps {told.tolist()}: the schedule "
            "has no signal (or no noise) left at one of them; leave it out"
        )
    return RowTable(
        sampler, prediction, told, signal, noise, keep, gain, fresh, past, clean_keep, clean_gain,
        injects_noise=bool((fresh != 0).any()), has_history=bool((past != 0).any()),
    )  # fmt: skip
