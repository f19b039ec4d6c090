"""`bench cachequant` runs end to end on the untrained model: what is exact is exact, and rows add up."""

import pytest
import torch

from benchmarks import cachequant
from fastdiff.caching.cachequant import CacheQuant, Step
from fastdiff.miniature import untrained

WAYS = ("every-step", "uniform", "schedule", "corrected", "computed-only")


def test_what_is_computed_at_every_step_is_exact_where_weights_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cachequant, "STEPS", 6)
    pipe = untrained(0)
    pipe.set_progress_bar_config(disable=True)
    made = cachequant.run(prompts=2, fitted=2, pipe=pipe)
    assert [row.method for row in made.rows] == [f"{name}-{way}" for name in ("int4", "float") for way in WAYS]
    assert [row.nfe for row in made.rows] == [12, 6, 6, 6, 6] * 2
    exact = made.row("float-every-step").quality
    assert exact["output_error"].value == 0
    assert exact["psnr"].value == 100
    assert made.row("int4-every-step").quality["output_error"].value > 0
    assert made.row("float-uniform").quality["output_error"].value > 0


def test_the_error_is_of_what_the_schedule_answers():
    """Two steps whose exact outputs are 1 and 3, computed as 2 and 3: repeating the first misses by 1 and 1."""
    steps = [Step(0.9, torch.ones(1, 1, 2), 2 * torch.ones(1, 1, 2))]
    steps += [Step(0.5, 3 * torch.ones(1, 1, 2), 3 * torch.ones(1, 1, 2))]
    assert cachequant.output_error(steps, CacheQuant((0.9,))) == pytest.approx((2 / 10) ** 0.5)
    halved = CacheQuant((0.9,), ((0.9, (0.5,), (0.0,)), (0.5, (3.0,), (0.0,))))
    assert cachequant.output_error(steps, halved) == 0
