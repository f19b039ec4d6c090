"""`bench tiles`: a seam is told from what is no seam, and tiles take the calls they are said to take."""

from typing import Any

import pytest
import torch

from benchmarks import tiles


def _pictures(seam: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pictures = 0.1 * torch.rand(6, 3, 128, 128, generator=generator)
    pictures[..., 64:] += seam
    return pictures


def test_a_seam_is_seen_and_its_absence_too():
    borders: list[tuple[list[int], list[int]]] = [([], [64])] * 6
    without, within = (tiles.border_ratio(_pictures(seam), borders) for seam in (0.0, 0.2))
    assert without.low < 1 < without.high
    assert abs(without.value - 1) < 0.05
    # a step of 0.2 over differences of which the mean is a third of 0.1
    assert within.value == pytest.approx(0.2 / (0.1 / 3), rel=0.05)


def test_an_edge_of_an_object_that_is_no_border_is_not_taken_for_one():
    pictures = _pictures(0.0)
    pictures[..., :, 40:] += 0.5
    assert tiles.border_ratio(pictures, [([], [64])] * 6).value == pytest.approx(1, abs=0.05)


def test_steps_the_network_draws_in_every_cell_are_no_seam():
    """Stronger every 4 and 8 pixels, as decoders and UNets leave them, and strongest every 16, as at the border."""
    pictures = _pictures(0.0)
    for step, rise in ((4, 0.02), (8, 0.05), (16, 0.1)):
        for start in range(0, 128, step):
            pictures[..., start:] += rise
    ratio = tiles.border_ratio(pictures, [([], [64])] * 6, period=16)
    assert ratio.value == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_tiles_take_as_many_calls_as_said(pipe: Any):
    rows = {row.method: row for row in tiles.measure_tiles(1, large=1, steps=2, pipe=pipe)}
    calls = {name: row.nfe for name, row in rows.items() if name != "native"}
    assert calls == {
        "tiles-overlapping": 9,
        "tiles-moving": 4,
        "tiles-fixed": 4,
        "tiles-overlapping-large": 49,
        "tiles-moving-large": 16,
    }
    assert rows["tiles-moving"].quality["border"].n == 1
