"""Strengths, levels and noises: numbers known beforehand."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_pipelines.rollout.flow import cell_flow, chunk_flows
from fastdiff_pipelines.rollout.levels import Levels, shift_of
from fastdiff_pipelines.rollout.motion import Motion, MotionController
from fastdiff_pipelines.rollout.noise import Noise, draw, warp
from tests.pipelines.rollout.tiny import rollout, video


def test_a_still_scene_tends_to_the_full_strength_geometrically() -> None:
    controller = MotionController(Motion(), first=0.2)
    still = torch.full((1, 3, 4, 8, 8), 0.3, dtype=torch.float64)
    for number in range(1, 8):
        expected = 0.8 * (1 - 0.1**number) + 0.1**number * 0.2
        assert controller.strength(still, 0.8).item() == pytest.approx(expected, abs=1e-12)


def test_full_motion_goes_to_the_lower_bound_and_more_motion_never_to_more_noise() -> None:
    def after(step: float, chunks: int = 20) -> float:
        controller = MotionController(Motion())
        clip = torch.cat([torch.full((1, 3, 1, 4, 4), i * step, dtype=torch.float64) for i in range(2)], dim=2)
        return [controller.strength(clip, 0.8).item() for _ in range(chunks)][-1]

    assert after(0.2) == pytest.approx(0.7) and after(0.9) == pytest.approx(0.7)
    falling = [after(step) for step in (0.0, 0.05, 0.1, 0.15, 0.2)]
    assert falling == sorted(falling, reverse=True) and falling[2] == pytest.approx(0.75)


def test_the_first_difference_is_to_the_chunk_before() -> None:
    controller = MotionController(Motion(memory=0.0))
    controller.strength(torch.zeros(1, 3, 2, 4, 4), 0.8)
    assert controller.strength(torch.ones(1, 3, 2, 4, 4), 0.8).item() == pytest.approx(0.7)
    assert controller.strength(torch.ones(1, 3, 2, 4, 4), 0.8).item() == pytest.approx(0.8)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_levels_at_full_strength_are_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    even = torch.linspace(1, 0, 5, dtype=torch.float64)[:4]
    scheduler.set_timesteps(sigmas=even.tolist())
    levels = Levels(4, shift_of(scheduler))(torch.ones(2))
    assert levels.shape == (2, 5)
    torch.testing.assert_close(levels[1], torch.as_tensor(scheduler.sigmas).double(), rtol=0, atol=1e-6)


@given(strength=st.floats(0.05, 1), steps=st.integers(1, 8), shift=st.floats(1, 8))
@settings(max_examples=30, deadline=None)
def test_levels_begin_at_the_strength_and_fall_to_nothing(strength: float, steps: int, shift: float) -> None:
    (levels,) = Levels(steps, shift)(torch.tensor([strength], dtype=torch.float64))
    assert levels[0].item() == pytest.approx(strength) and levels[-1] == 0 and (levels.diff() < 0).all()


def test_levels_of_ones_own() -> None:
    levels = Levels(2, 3.0, (0.9, 0.4))
    torch.testing.assert_close(levels(torch.ones(1))[0], torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64))
    assert levels(torch.tensor([0.5]))[0, 0].item() == pytest.approx(0.5)


def test_a_whole_shift_moves_noise_exactly_and_fills_the_edge_afresh() -> None:
    noise, fresh = draw(0, 1, (3, 5, 6), 1), draw(0, 1, (3, 5, 6), 2)
    flow = torch.zeros(1, 2, 5, 6)
    flow[:, 0] = 2
    moved, rest = warp(noise, flow, fresh)
    assert torch.equal(moved[..., 2:], noise[..., :-2]) and torch.equal(moved[..., :2], fresh[..., :2])
    assert not rest.any()


def test_parts_of_a_cell_add_up() -> None:
    noise, fresh = draw(0, 1, (2, 4, 4), 1), draw(0, 1, (2, 4, 4), 2)
    flow = torch.full((1, 2, 4, 4), 0.4)
    once, rest = warp(noise, flow, fresh)
    assert torch.equal(once, noise)
    twice, rest = warp(once, rest + flow, fresh)
    assert torch.equal(twice[..., 1:, 1:], noise[..., :-1, :-1]) and rest[..., 1:, 1:].allclose(torch.tensor(-0.2))


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_no_value_is_used_twice_whatever_the_flow(seed: int) -> None:
    noise, fresh = draw(seed, 2, (1, 6, 6), 1), draw(seed, 2, (1, 6, 6), 2)
    flow = 3 * draw(seed, 2, (2, 6, 6), 3)
    moved, _ = warp(noise, flow, fresh)
    known = torch.cat([noise, fresh], dim=1).flatten(1)
    for row in range(2):
        values = moved[row].flatten()
        assert len(values.unique()) == len(values) and torch.isin(values, known[row]).all()


def test_flow_of_a_moved_picture() -> None:
    picture = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = picture.roll((4, -2), dims=(2, 3))
    flow = cell_flow(picture, moved, 6, 6)
    assert (flow[:, 0, 1:-1, 1:-1] == -2 / 8).all() and (flow[:, 1, 1:-1, 1:-1] == 4 / 8).all()
    assert not cell_flow(picture, picture, 6, 6).any()
    frames = torch.stack([picture, picture, moved, moved], dim=2)
    flows = chunk_flows(None, frames, (2, 2), 6, 6)
    assert not flows[:, :, 0].any() and (flows[:, 1, 1, 1:-1, 1:-1] == 0.5).all()


def test_the_first_latent_frame_takes_fewer_control_frames() -> None:
    picture = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = torch.stack([picture.roll(i, dims=-1) for i in range(13)], dim=2)  # a pixel a frame, in cells of 8
    first, later = chunk_flows(None, frames[:, :, :5], (1, 4), 4, 8), chunk_flows(frames[:, :, 4:5], frames[:, :, 5:],
                                                                                 (4, 4), 4, 8)  # fmt: skip
    assert first[0, 0, 1].median() == later[0, 0, 0].median() == later[0, 0, 1].median() == 4 / 8
    with rollout(noise="warped", chunk=2, steps=1) as model:
        session = model.open("x")
        assert session._groups == [1, 4] and session.wanted == 5
        session.generate(video(5))
        assert session._groups == [4, 4] and session.wanted == 8


def test_noise_is_known_by_its_place() -> None:
    make = lambda rows: Noise("fresh", 3, rows, (2, 3, 3), "cpu", torch.float32)  # noqa: E731
    assert torch.equal(make(1).chunk(5, 2, 4), make(2).chunk(5, 2, 4)[:, :1])
    assert torch.equal(make(1).chunk(5, 2, 4)[:3], make(1).chunk(5, 2, 3))
    with pytest.raises(ValueError, match="control frames"):
        Noise("warped", 0, 1, (2, 3, 3), "cpu", torch.float32).chunk(0, 1, 2)
