"""Frames of a video on different ranks."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.parallel.clip import ClipParallel, global_frames
from fastdiff.parallel.strips import Strips
from tests.parallel.nets import NETS, inputs, largest, pipeline, sd, simulate


@pytest.mark.parametrize("name", ["svd", "motion"])
@pytest.mark.parametrize(("ranks", "frames"), [(2, 5), (3, 6)])
def test_windows_over_everything_equal_one_device(name: str, ranks: int, frames: int):
    pipe = pipeline(NETS[name]().double())
    arguments = inputs(name, rows=8, frames=frames, dtype=torch.float64)
    truth = pipe(**arguments)
    plan = ClipParallel(window=frames, global_frames=0)
    assert largest(simulate(pipe, plan, ranks, **arguments), truth) < 1e-12
    # global frames that the window holds already count once
    assert largest(simulate(pipe, ClipParallel(window=frames, global_frames=4), ranks, **arguments), truth) < 1e-12


def test_a_narrow_window_differs_and_sends_less():
    pipe, arguments = pipeline(NETS["motion"]()), inputs("motion", rows=8, frames=8)
    wide = simulate(pipe, ClipParallel(window=8, global_frames=0), 2, **arguments)
    narrow = simulate(pipe, ClipParallel(window=1, global_frames=0), 2, **arguments)
    assert largest(narrow, wide.results[0]) > 1e-3
    # one frame of the neighbour's four
    assert narrow.traffic[0].received["attention"] * 4 == wide.traffic[0].received["attention"]


def test_every_frame_seen_globally_is_the_whole_video():
    """No window, all frames global: each query sees itself and, once, every other frame."""
    pipe = pipeline(NETS["motion"]().double())
    arguments = inputs("motion", rows=8, frames=4, dtype=torch.float64)
    run = simulate(pipe, ClipParallel(window=0, global_frames=4), 2, **arguments)
    assert largest(run, pipe(**arguments)) < 1e-12


def test_a_bias_acts_on_its_side_of_the_turn():
    pipe, arguments = pipeline(NETS["motion"]()), inputs("motion", rows=8, frames=4)
    settings: dict[str, Any] = {"window": 1, "global_frames": 2}
    plain = simulate(pipe, ClipParallel(**settings), 2, **arguments).results[0]
    below = simulate(pipe, ClipParallel(**settings, global_bias=10.0), 2, **arguments).results[0]
    above = simulate(pipe, ClipParallel(**settings, global_bias=10.0, turn=5), 2, **arguments).results[0]
    assert torch.equal(below, plain)  # timestep 10 is below the turn at 800, where only the local bias acts
    assert not torch.equal(above, plain)


def test_positions_beyond_the_motion_module():
    pipe, arguments = pipeline(NETS["motion"]()), inputs("motion", rows=8, frames=10)
    with pytest.raises(fastdiff.Unsupported, match="knows 8 frames and the video has 10"):
        simulate(pipe, ClipParallel(), 2, **arguments)
    assert simulate(pipe, ClipParallel(positions="clip"), 2, **arguments).results[0].isfinite().all()


def test_global_frames_are_spread_over_each_rank():
    strips = Strips((0, 8, 16))
    assert global_frames(strips, 0, 4) == [0, 4]
    assert global_frames(strips, 1, 4) == [8, 12]
    assert global_frames(strips, 1, 100) == list(range(8, 16))
    assert global_frames(strips, 1, 1) == []


def test_pictures_are_refused():
    with pytest.raises(fastdiff.Unsupported, match="no layers over frames"):
        simulate(pipeline(sd()), ClipParallel(), 2, **inputs("sd"))
