"""Telling a denoiser the noise level it sees rather than the one that was added (https://arxiv.org/abs/2510.02307).

At a size a denoiser was not trained for, the same noise hides more or less of the picture, so the level it would guess
differs from the schedule's. Only what it is *told* changes here; the steps themselves do not. How much, is measured:
`calibrate` tells it other levels, keeps those with the smallest one-step error, and takes the table only if that holds
on pictures it was not fitted on. At the trained size it should not, and then nothing is changed.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict
from fastdiff.anatomy import anatomy, denoiser_arguments, forward_names
from fastdiff.hooks import Hooks
from fastdiff.quality.statistics import Interval, mean_interval
from fastdiff.sampling.algebra import predict, shift_sigma
from fastdiff.sampling.schedule import is_flow, prediction_of
from fastdiff.sampling.told import level_of, timestep_name

SAVED = Path(__file__).parent / "tables"
FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.45, 1.7)
"""Shift factors (`algebra.shift_sigma`) tried at each level; above 1 tells more noise."""
PLAIN = FACTORS.index(1.0)


@dataclass(frozen=True)
class NoiseShift(Acceleration):
    """Tell the denoiser shifted timesteps at the latent sizes there is a table for.

    Args:
        tables: rows of (height, width, told, shifted): a latent size in cells, and for rising timesteps as the
            pipeline tells them those to tell instead; between them, on straight lines. `calibrate` makes them.
    """

    stage: ClassVar[str] = "steps"
    tables: tuple[tuple[int, int, tuple[float, ...], tuple[float, ...]], ...] = ()

    def __post_init__(self):
        tables = tuple((h, w, tuple(map(float, told)), tuple(map(float, to))) for h, w, told, to in self.tables)
        object.__setattr__(self, "tables", tables)
        for height, width, told, shifted in tables:
            rising = all(np.diff(told) > 0) and all(np.diff(shifted) >= 0)
            if len(told) != len(shifted) or len(told) < 2 or not rising:
                raise ValueError(
                    f"NoiseShift: the table for {height} x {width} must hold as many shifted timesteps as told ones, "
                    "two or more, both rising"
                )
        if len({table[:2] for table in tables}) != len(tables):
            raise ValueError("NoiseShift: two tables are for the same latent size; keep one")

    @classmethod
    def saved(cls, name: str = "mini-sd") -> Self:
        """The tables that ship for an embedded model: those its calibration accepted."""
        path = SAVED / f"{name}.json"
        if not path.is_file():
            raise ValueError(
                f"no tables are saved for {name!r}; make some with fastdiff.sampling.noise_shift.calibrate"
            )
        return cls(tuple(json.loads(path.read_text("utf-8"))["tables"]))

    def supports(self, pipe: Any) -> Verdict:
        """Needs a table, and a denoiser that takes latents [B, C, h, w], whose size tells which."""
        if not self.tables:
            return Verdict(
                False, "there is no table; calibrate this model with fastdiff.sampling.noise_shift.calibrate"
            )
        for name, denoiser in anatomy(pipe).denoisers.items():
            names = forward_names(denoiser)
            if "img_ids" in names:
                return Verdict(False, f"the {name} takes tokens, which do not show the size of the picture")
            try:
                timestep_name(names)
            except Unsupported as error:
                return Verdict(False, str(error))
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser."""
        tables = {(height, width): (told, to) for height, width, told, to in self.tables}
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", _Teller(tables, hooks, denoiser).around)


class _Teller:
    """Changes what one denoiser is told."""

    def __init__(self, tables: dict[tuple[int, int], tuple], hooks: Hooks, denoiser: Any):
        self.tables = tables
        self.hooks = hooks
        self.denoiser = denoiser

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser with the shifted timestep."""
        given = denoiser_arguments(self.denoiser, args, kwargs)
        sample = next(iter(given.values()))
        height, width = sample.shape[-2:] if isinstance(sample, Tensor) and sample.dim() >= 4 else (0, 0)
        if (height, width) not in self.tables:
            self.hooks.counter.count(False)
            self.hooks.counter.note(f"there is no table for a latent of {height} x {width}: told as it is")
            return inner(*args, **kwargs)
        name = timestep_name(given)
        self.hooks.counter.count(True)
        return inner(**{**given, name: shifted(given[name], *self.tables[height, width])})


def shifted(timestep: Any, told: Sequence[float], to: Sequence[float]) -> Tensor:
    """What to tell instead of a timestep, one or ``[B]``: a tensor of its shape, floating, on its device."""
    given = torch.as_tensor(timestep)
    values = np.interp(given.detach().double().cpu().numpy(), told, to)
    dtype = given.dtype if given.is_floating_point() else torch.float32
    return torch.as_tensor(values, device=given.device).to(dtype)


@dataclass(frozen=True)
class Fit:
    """A calibration at one latent size.

    Attributes:
        told, shifted: the table, the ends fixed.
        factors: the shift factor fitted at each inner point.
        gain: held-out share of the one-step error that the table takes away, averaged over levels, with its interval.
        error: that gain's standard error.
        accepted: whether the gain exceeds two standard errors; if not, the size gets no table.
    """

    height: int
    width: int
    told: tuple[float, ...]
    shifted: tuple[float, ...]
    factors: tuple[float, ...]
    gain: Interval
    error: float

    @property
    def accepted(self) -> bool:
        return self.gain.value > 2 * self.error

    def table(self) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
        """The row for `NoiseShift`."""
        return self.height, self.width, self.told, self.shifted


@torch.no_grad()
def calibrate(
    pipe: Any,
    latents: Tensor,
    prompts: Sequence[str],
    levels: int = 10,
    folds: int = 3,
    batch: int = 32,
    seed: int = 0,
) -> Fit:
    """Fit a table for the size of ``latents``.

    Args:
        pipe: an unaccelerated pipeline whose conditioning `fastdiff.distillation` knows.
        latents: clean ``[N, C, h, w]``, scaled as the denoiser takes them: pictures drawn, or made, at this size.
            100 or more.
        prompts: a caption for each.
        levels: points of the table.
        folds: parts of the pictures; each is judged by a table fitted on the others.

    Raises:
        ValueError: too few pictures, or not a prompt for each.
    """
    if len(latents) != len(prompts) or len(latents) < 2 * folds:
        raise ValueError(f"calibration needs a prompt for each of at least {2 * folds} latents")
    probe = _Probe(pipe, latents, prompts, batch, seed)
    steps = pipe.scheduler.config.num_train_timesteps
    times = np.linspace(0.04, 0.96, levels) * (steps - 1)
    errors = np.stack([[probe.errors(time, factor) for factor in FACTORS] for time in times])  # [level, factor, N]
    plain = errors[:, PLAIN]
    fold = np.arange(len(latents)) % folds
    gains = np.zeros((levels, len(latents)))
    for part in range(folds):
        held = fold == part
        for level, place in enumerate(best_factors(errors[:, :, ~held])):
            gains[level, held] = plain[level, held] - errors[level, place, held]
    relative = (gains / plain.mean(axis=1, keepdims=True)).mean(axis=0)
    factors = tuple(FACTORS[place] for place in best_factors(errors))
    to = np.maximum.accumulate([0.0, *map(probe.told, times, factors), float(steps - 1)])
    return Fit(
        height=latents.shape[-2],
        width=latents.shape[-1],
        told=(0.0, *times.tolist(), float(steps - 1)),
        shifted=tuple(to.tolist()),
        factors=factors,
        gain=mean_interval(relative),
        error=float(relative.std(ddof=1) / math.sqrt(len(relative))),
    )


def best_factors(errors: np.ndarray) -> list[int]:
    """Which factor to take at each level: the one of least error, where that is no accident.

    Levels are fitted with their neighbours, at half their weight, since what they need changes slowly; one whose best
    factor is not better than none by two standard errors keeps none.

    Args:
        errors: ``[level, factor, picture]``.
    """
    gains = (errors[:, [PLAIN]] - errors) / errors[:, [PLAIN]].mean(axis=2, keepdims=True)
    padded = np.pad(gains, ((1, 1), (0, 0), (0, 0)), mode="edge")
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    means, spreads = smooth.mean(axis=2), smooth.std(axis=2, ddof=1) / math.sqrt(errors.shape[2])
    best = means.argmax(axis=1)
    sure = [means[level, place] > 2 * spreads[level, place] for level, place in enumerate(best)]
    return [int(place) if certain else PLAIN for place, certain in zip(best, sure, strict=True)]


class _Probe:
    """One-step errors of a denoiser on known pictures with known noise."""

    def __init__(self, pipe: Any, latents: Tensor, prompts: Sequence[str], batch: int, seed: int):
        from fastdiff.distillation.diffusers_networks import encoder

        self.scheduler = pipe.scheduler
        self.denoiser = anatomy(pipe).denoiser
        names = forward_names(self.denoiser)
        self.names = names[0], timestep_name(names)
        self.encode = encoder(pipe)
        self.latents, self.prompts, self.batch = latents, list(prompts), batch
        draws = [torch.Generator().manual_seed(seed + row) for row in range(len(latents))]
        noise = [torch.randn(latents.shape[1:], generator=one) for one in draws]
        self.noise = torch.stack(noise).to(latents.device, latents.dtype)
        steps = self.scheduler.config.num_train_timesteps
        self.table = np.array([level_of(self.scheduler, float(time)) for time in range(1 if self.flow else 0, steps)])

    @property
    def flow(self) -> bool:
        return is_flow(self.scheduler)

    def told(self, time: float, factor: float) -> float:
        """The timestep of the level `factor` away from that of `time`."""
        level = shift_sigma(level_of(self.scheduler, time), factor)
        if self.flow:
            return level * self.scheduler.config.num_train_timesteps
        return float(np.interp(level, self.table, np.arange(len(self.table))))

    def errors(self, time: float, factor: float) -> np.ndarray:
        """Mean square of the output's error, float64 per picture, at the level of `time` when told another.

        One deterministic step is linear in the output, so this is its error up to a factor of the level alone.
        """
        sigma = torch.tensor(level_of(self.scheduler, time), dtype=torch.float64)
        signal, noise = 1 - sigma, sigma
        if not self.flow:
            radius = (signal**2 + noise**2) ** 0.5
            signal, noise = signal / radius, noise / radius
        signal, noise = signal.to(self.latents), noise.to(self.latents)
        found = []
        for start in range(0, len(self.latents), self.batch):
            some = slice(start, start + self.batch)
            clean, eps = self.latents[some], self.noise[some]
            told = torch.full((len(clean),), self.told(time, factor), device=clean.device, dtype=torch.float32)
            words = self.encode(self.prompts[some])
            inputs = dict(zip(self.names, (signal * clean + noise * eps, told), strict=True))
            output = self.denoiser(**inputs, **words, return_dict=False)[0][:, : clean.shape[1]]
            wanted = predict(prediction_of(self.scheduler), clean, eps, signal, noise)
            found.append((output - wanted).double().square().mean(dim=(1, 2, 3)).cpu().numpy())
        return np.concatenate(found)


def accepted(fits: Sequence[Fit]) -> NoiseShift:
    """The tables of the fits whose gain held; save it as a plan, or with `save`."""
    return NoiseShift(tuple(fit.table() for fit in fits if fit.accepted))


def save(shift: NoiseShift, path: Path, fits: Sequence[Fit] = ()) -> None:
    """Write tables to a file `NoiseShift.saved` reads, with the evidence for them."""
    rounded = [
        (h, w, [round(one, 2) for one in told], [round(one, 2) for one in to]) for h, w, told, to in shift.tables
    ]
    evidence = [
        {"height": fit.height, "width": fit.width, "accepted": fit.accepted, "gain": fit.gain.as_json()} for fit in fits
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tables": rounded, "fits": evidence}) + "\n", "utf-8")
