"""Deadlines by arithmetic, on a clock that only work moves."""

import pytest

from fastdiff_pipelines.live.virtual import VirtualClock
from fastdiff_pipelines.rollout.slo import Costs, SloScheduler, Target, choose, measure, predict


def test_what_one_way_to_run_takes() -> None:
    costs = Costs(call=10, row=5, codec=4, context=15)
    one = predict(costs, Target(1000, fps=16), 4, 2, False)
    assert (one.first_frame_ms, one.chunk_ms, one.played_ms) == (8 + 4 * 20, 80 + 8 + 30, 500)
    many = predict(costs, Target(1000, fps=16), 4, 1, True)
    assert many.chunk_ms == 30 + 4 and many.first_frame_ms == 4 + 15 + (20 + 2) + (25 + 2) + (30 + 2)
    camera = predict(costs, Target(1000, fps=16, source_fps=16), 4, 3, False)
    assert camera.first_frame_ms == 500 + 12 + 4 * 25
    slow = predict(costs, Target(), 2, 1, False, slowness=3)
    assert slow.chunk_ms == 3 * (30 + 4 + 15)


def test_a_batch_waits_for_the_camera_while_it_fills() -> None:
    fast = predict(Costs(call=1, row=0), Target(fps=16, source_fps=16), 4, 1, True)
    assert fast.first_frame_ms == 1 + 3 * 250


def test_most_steps_that_keep_both_deadlines_then_the_earliest_first_frame() -> None:
    target = Target(first_frame_ms=1000, fps=16, margin=0.0)
    cheap = choose(Costs(call=10, row=1), target)
    assert (cheap.steps, cheap.chunk, cheap.batched, cheap.fits) == (4, 1, False, True)
    # sequential: four calls of 70 in 250 ms do not fit a chunk of one; a longer chunk or a batch does
    dear = choose(Costs(call=65, row=5), target)
    assert dear.steps == 4 and dear.fits and (dear.chunk > 1 or dear.batched)
    rows_cost = choose(Costs(call=0, row=100), target)
    assert rows_cost.steps == 2 and rows_cost.fits


def test_of_ways_that_all_fail_the_least_bad_is_taken_and_says_so() -> None:
    target = Target(first_frame_ms=100, fps=16)
    worst = choose(Costs(call=400, row=100), target)
    assert worst.steps == 1 and not worst.fits


def test_the_line_through_measured_calls() -> None:
    fitted = Costs.fitted([(1, 12.0), (2, 14.0), (4, 18.0)])
    assert fitted.call == pytest.approx(10) and fitted.row == pytest.approx(2)
    assert Costs.fitted([(1, 5.0), (2, 4.0)]).row == 0
    through_nothing = Costs.fitted([(1, 1.0), (4, 10.0)])
    assert through_nothing.call == 0 and through_nothing.row == pytest.approx(41 / 17)
    with pytest.raises(ValueError, match="two different sizes"):
        Costs.fitted([(2, 1.0), (2, 3.0)])


def test_measuring_leaves_the_first_call_out() -> None:
    calls = []

    def run(rows: int, frames: int) -> float:
        calls.append((rows, frames))
        return 1000.0 if calls.count((rows, frames)) == 1 else 3.0 * rows * frames

    assert measure(run, [(1, 1), (2, 3)]) == [(1, 3.0), (6, 18.0)]


class Machine:
    """Chunks one after the other on a virtual clock, at a speed that changes."""

    def __init__(self, scheduler: SloScheduler):
        self.clock, self.scheduler = VirtualClock(), scheduler
        self.misses: list[float] = []
        self.changes: list[float] = []

    def run(self, seconds: float, slowness: float) -> None:
        until = self.clock() + seconds
        while self.clock() < until:
            now, scheduler = self.scheduler.choice, self.scheduler
            real = predict(scheduler.costs, scheduler.target, now.steps, now.chunk, now.batched, slowness=slowness)
            self.clock.advance(real.chunk_ms / 1000)
            if real.chunk_ms > real.played_ms:
                self.misses.append(self.clock())
            if scheduler.observe(real.chunk_ms, self.clock()):
                self.changes.append(self.clock())
            self.clock.advance(max(0.0, (real.played_ms - real.chunk_ms) / 1000))


def test_a_machine_that_slows_down_keeps_its_deadline_again_within_a_second_and_does_not_waver() -> None:
    machine = Machine(SloScheduler(Costs(call=20, row=2), Target(first_frame_ms=2000, fps=20)))
    machine.run(5, 1.0)
    assert not machine.misses and not machine.changes and machine.scheduler.choice.steps == 4
    machine.run(10, 4.0)
    assert machine.misses and max(machine.misses) < 6.0 and machine.scheduler.choice.fits
    settled = len(machine.changes)
    assert settled <= 2
    machine.run(20, 1.0)
    assert machine.scheduler.choice.steps == 4 and len(machine.changes) <= settled + 2
    assert all(after - before >= 1 for before, after in zip(machine.changes, machine.changes[1:], strict=False))
    assert [decision.at for decision in machine.scheduler.decisions] == machine.changes
    assert "4 steps" in machine.scheduler.decisions[0].before


def test_a_chunk_plays_for_as_long_as_its_autoencoder_says() -> None:
    """Chunks of 8 frames at 16 a second: 300 ms are in time, so a better way is taken only after patience."""
    target = Target(first_frame_ms=10_000, fps=16)
    scheduler = SloScheduler(
        Costs(call=100, row=0), target, steps=(3, 4), chunks=(1,), batched=(False,), per_latent=8, hold_s=0.0
    )
    assert scheduler.choice.steps == 4
    slower = scheduler.observe(560, 1.0)
    assert slower is not None and slower.steps == 3
    assert [scheduler.observe(300, at) for at in (2.0, 3.0, 4.0)] == [None] * 3
    faster = scheduler.observe(300, 7.5)
    assert faster is not None and faster.steps == 4


def test_costs_are_measured_one_latent_frame_at_a_time_whatever_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff_pipelines.rollout import ChunkRollout, Motion
    from fastdiff_pipelines.rollout.slo import measured_costs
    from tests.pipelines.rollout.tiny import rollout

    opened, inner = [], ChunkRollout.open
    monkeypatch.setattr(
        ChunkRollout, "open", lambda *args, **options: opened.append(inner(*args, **options)) or opened[-1]
    )
    with rollout(chunk=3, sigmas=(1.0, 0.7, 0.5, 0.2), noise="warped", motion=Motion()) as model:
        assert measured_costs(model).codec > 0
    assert opened[0].settings.chunk == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(fps=0), "fps=0"),
        (lambda: Target(margin=1.0), "margin=1.0"),
        (lambda: Costs(-1, 0), "call=-1"),
    ],
)
def test_impossible_numbers_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_of_a_real_rollout_and_a_stream_that_goes_by_them() -> None:
    from fastdiff_pipelines.rollout import VideoStream
    from fastdiff_pipelines.rollout.slo import measured_costs
    from fastdiff_pipelines.settings import Settings
    from tests.pipelines.rollout.tiny import rollout, video

    with rollout() as model:
        ticks = iter(range(10**6))
        costs = measured_costs(model, clock=lambda: 0.004 * next(ticks))
        assert costs.call == pytest.approx(4) and costs.row == pytest.approx(0, abs=1e-9)
        assert costs.context == pytest.approx(4) and costs.codec > 0
        # a machine on which no chunk is ever in time: the stream goes down to one step and loses no frame
        scheduler = SloScheduler(Costs(call=1e-6, row=0), Target(fps=16), hold_s=0.0, chunks=(1,))
        stream = VideoStream(model, Settings("a red circle", steps=4), scheduler)
        assert scheduler.choice.steps == 4
        scheduler.target = Target(first_frame_ms=1, fps=1e6)
        made = [one for frame in video(29) for one in stream.push(frame)] + stream.flush()
    assert [one.frame_id for one in made] == list(range(29)) and scheduler.choice.steps == 1
    assert stream._session.settings.steps == 1
