"""What a denoiser is told: tables as given, found where a known network needs them, and refused where it does not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.distillation import diffusers_networks
from fastdiff.miniature.families import family
from fastdiff.sampling.noise_shift import NoiseShift, accepted, calibrate, save, shifted
from fastdiff.sampling.told import level_of

TABLE = (8, 8, (0.0, 500.0, 999.0), (0.0, 600.0, 999.0))


def test_times_lie_on_straight_lines_between_those_of_the_table():
    told = torch.tensor([0, 250, 500, 749, 999])
    assert shifted(told, *TABLE[2:]).tolist() == pytest.approx([0, 300, 600, 600 + 399 * 249 / 499, 999], abs=1e-3)
    alone = shifted(torch.tensor(250, dtype=torch.float64), *TABLE[2:])
    assert (alone.shape, alone.dtype, float(alone)) == ((), torch.float64, 300.0)
    assert shifted(250, *TABLE[2:]).dtype == torch.float32


@torch.no_grad()
def test_only_the_size_with_a_table_is_told_otherwise():
    pipe: Any = family("sd")
    words = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = pipe.unet(x, 250, encoder_hidden_states=words).sample
    other = pipe.unet(x, 300.0, encoder_hidden_states=words).sample
    large = pipe.unet(x.repeat(1, 1, 2, 1), 250, encoder_hidden_states=words).sample
    with fastdiff.accelerate(pipe, NoiseShift((TABLE,))) as handle:
        assert torch.equal(pipe.unet(x, 250, encoder_hidden_states=words).sample, other)
        assert not torch.equal(other, plain)
        assert torch.equal(pipe.unet(x.repeat(1, 1, 2, 1), 250, encoder_hidden_states=words).sample, large)
        row = handle.report().rows[0]
    assert (row.seen, row.accelerated) == (2, 1)
    assert "no table for a latent of 16 x 8" in row.notes[0]


class Known(torch.nn.Module):
    """The best possible network for clean latents drawn from N(0, 1): it needs the true level, and reads another.

    ``eps`` is ``noise * x`` at the level; where told a timestep it takes the level `factor` below it for the true one.
    """

    def __init__(self, scheduler: Any, factor: float):
        super().__init__()
        self.config = SimpleNamespace()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scheduler, self.factor = scheduler, factor

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any = None, return_dict: bool = True) -> Any:
        told = level_of(self.scheduler, float(timestep.reshape(-1)[0]))
        # undoes shift_sigma by `factor`: told the shifted level, it acts at the true one
        level = told / (self.factor - (self.factor - 1) * told)
        signal, noise = (1 - level), level
        return (noise / (signal**2 + noise**2) ** 0.5 * sample,)


class FakePipe:
    """A pipeline of one network."""

    def __init__(self, net: Any, scheduler: Any):
        self.unet, self.scheduler = net, scheduler

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.45])
def test_calibration_finds_the_factor_a_known_network_needs(factor: float, monkeypatch: pytest.MonkeyPatch):
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    monkeypatch.setattr(diffusers_networks, "encoder", lambda pipe: lambda prompts: {})
    latents = torch.randn(48, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    fit = calibrate(FakePipe(Known(scheduler, factor), scheduler), latents, ["x"] * 48, levels=6)
    assert fit.told[0] == fit.shifted[0] == 0
    assert fit.told[-1] == fit.shifted[-1] == 999
    assert all(np.diff(fit.shifted) >= 0)
    if factor == 1:
        assert fit.factors == (1.0,) * 6
        assert not fit.accepted
        assert accepted([fit]) == NoiseShift()
    else:
        # at the ends there is nothing to gain: all noise, or none, looks the same told otherwise
        assert fit.factors[1:-1] == (factor,) * 4
        assert fit.accepted
        assert fit.gain.low > 0
        assert accepted([fit]).tables == (fit.table(),)


def test_tables_are_saved_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(NoiseShift((TABLE,)), tmp_path / "some.json")
    monkeypatch.setattr("fastdiff.sampling.noise_shift.SAVED", tmp_path)
    assert NoiseShift.saved("some") == NoiseShift((TABLE,))
    plan = fastdiff.Plan((NoiseShift((TABLE,)),))
    assert fastdiff.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="no tables are saved for 'other'"):
        NoiseShift.saved("other")


def test_the_tables_that_ship_are_for_other_sizes_than_the_trained_one():
    tables = NoiseShift.saved("mini-sd").tables
    assert tables
    assert (16, 16) not in {table[:2] for table in tables}


@pytest.mark.parametrize(
    "tables",
    [
        [(8, 8, (0, 999), (0,))],
        [(8, 8, (0, 999), (50, 40))],
        [(8, 8, (999, 0), (0, 999))],
        [(8, 8, (0, 999), (0, 999)), (8, 8, (0, 999), (1, 999))],
    ],
)
def test_impossible_tables_are_refused(tables: Any):
    with pytest.raises(ValueError, match="NoiseShift"):
        NoiseShift(tuple(tables))


def test_it_says_where_it_cannot_act():
    assert "there is no table" in NoiseShift().supports(family("sd")).reason
    assert "tokens" in NoiseShift((TABLE,)).supports(family("flux")).reason
    with pytest.raises(ValueError, match="a prompt for each"):
        calibrate(family("sd"), torch.zeros(4, 4, 8, 8), ["x"] * 3)
