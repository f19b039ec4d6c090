"""Queues, fairness, deadlines and the ledger on a clock that only work moves: every figure is arithmetic."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from fastdiff_pipelines.live import (
    Budget,
    Controls,
    DeadlineController,
    LiveSession,
    LiveWorker,
    Rung,
    Turns,
    jain,
    measure,
)
from fastdiff_pipelines.live.ledger import Journey, Ledger
from fastdiff_pipelines.live.virtual import TimedStream, VirtualClock, camera, run, viewer
from fastdiff_pipelines.settings import Settings

FPS = 30
SERVICE_MS = 50.0


def _session(clock: VirtualClock, service=lambda stream: SERVICE_MS, steps: int = 1, **options) -> LiveSession:
    made = LiveSession(
        lambda scale, plan: TimedStream(clock, service, scale),
        Controls(Settings("", steps=steps)),
        clock=clock,
        **options,
    )
    viewer(made)
    return made


def _percentile(values, percent):
    return float(np.percentile(values, percent))


def test_an_overloaded_session_shows_frames_no_older_than_one_service_and_one_interval() -> None:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _session(clock)
    worker.add(session)
    camera(clock, session, FPS, 60)
    run(clock, worker.run_one, 60)
    ages = session.ledger.ages()
    assert len(ages) == pytest.approx(60_000 / SERVICE_MS, abs=3)
    assert _percentile(ages, 99) <= SERVICE_MS + 1000 / FPS + 5
    # nothing grows: the second half is as young as the first
    assert max(ages[len(ages) // 2 :]) <= max(ages[: len(ages) // 2]) + 1e-6
    assert set(session.ledger.drops) == {"replaced"}
    session.close()
    frames = session.ledger.summary()["frames"]
    assert frames["in"] == frames["shown"] + sum(frames["dropped"].values())


def test_a_plain_queue_under_the_same_load_falls_behind_without_bound() -> None:
    # the reference that shows the test above can fail: frame k of a FIFO waits for all before it
    captured = np.arange(60 * FPS) / FPS
    finished = np.zeros_like(captured)
    free = 0.0
    for k, at in enumerate(captured):
        free = max(free, at) + SERVICE_MS / 1000
        finished[k] = free
    ages = finished - captured
    # one second of it adds what the camera brings more than the model takes
    assert ages[FPS * 40] - ages[FPS * 39] == pytest.approx(FPS * SERVICE_MS / 1000 - 1)
    assert ages[-1] > 20


def test_the_ledgers_stages_add_up_to_the_whole() -> None:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _session(clock, steps=3)
    worker.add(session)
    camera(clock, session, FPS, 10)
    run(clock, worker.run_one, 10)
    found = session.ledger.summary()
    assert found["unexplained_ms"]["p99"] == pytest.approx(0, abs=1e-6)
    assert found["stages_ms"]["denoise"]["p50"] == pytest.approx(3 * SERVICE_MS)
    assert found["fps"] == pytest.approx(1000 / SERVICE_MS, rel=0.02)


def test_the_last_frames_come_out_when_the_camera_stops() -> None:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _session(clock, lambda stream: 10.0, steps=4)
    worker.add(session)
    camera(clock, session, FPS, 1)
    run(clock, worker.run_one, 2)
    assert session.ledger.summary()["frames"] == {"in": FPS, "shown": FPS, "repeated": 0, "dropped": {}}


def test_ids_rise_and_settings_come_with_the_frames_that_were_asked_for_them() -> None:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _session(clock, lambda stream: 20.0, steps=3)
    worker.add(session)
    seen = []

    def take() -> None:
        for one in session.take():
            seen.append((one.journey.frame_id, one.journey.version))
            session.sent(one)

    session.on_ready = take
    camera(clock, session, FPS, 2)
    clock.at(1.0, partial(session.change, prompt="other"))
    run(clock, worker.run_one, 2.5)
    ids = [frame_id for frame_id, _ in seen]
    assert all(b > a for a, b in pairwise(ids))
    assert [version for _, version in seen] == sorted(version for _, version in seen)
    # the frame that follows the change enters at once and is inside for three pushes
    assert session.ledger.summary()["prompt_to_pixel_frames"] == 3


@pytest.mark.parametrize("users", [2, 4])
def test_users_share_the_model_fairly_whatever_their_cameras_send(users: int) -> None:
    clock = VirtualClock()
    worker = LiveWorker(clock)
    sessions = [_session(clock, lambda stream, cost=20.0 + 15 * i: cost) for i in range(users)]
    for number, session in enumerate(sessions):
        worker.add(session)
        camera(clock, session, FPS * (1 + number), 30)
    run(clock, worker.run_one, 30)
    shares = [session.ledger.summary()["frames"]["shown"] * (20.0 + 15 * i) for i, session in enumerate(sessions)]
    assert jain(shares) > 0.99


def test_a_viewer_who_never_reads_loses_only_his_own_pictures() -> None:
    clock = VirtualClock()
    worker = LiveWorker(clock)
    quick, slow = _session(clock, lambda stream: 8.0), _session(clock, lambda stream: 8.0)
    slow.on_ready = lambda: None
    alone = _alone(8.0)
    for session in (quick, slow):
        worker.add(session)
        camera(clock, session, FPS, 20)
    run(clock, worker.run_one, 20)
    # a turn a second keeps what waits for him fresh; all else would be work for nobody
    assert 15 <= slow.ledger.summary()["frames"]["dropped"]["outbox"] <= 20
    waiting = slow.take()
    assert len(waiting) == 2
    assert clock() - waiting[-1].journey.captured <= 1.1
    assert _percentile(quick.ledger.ages(), 95) <= 1.2 * alone


def _alone(cost: float) -> float:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _session(clock, lambda stream: cost)
    worker.add(session)
    camera(clock, session, FPS, 20)
    run(clock, worker.run_one, 20)
    return _percentile(session.ledger.ages(), 95)


def test_waiting_earns_no_credit_and_costs_none() -> None:
    turns = Turns()
    turns.join("a")
    for _ in range(100):
        assert turns.choose(["a"]) == "a"
        turns.charge("a", 1.0)
    turns.join("b")
    chosen = []
    for _ in range(10):
        who = turns.choose(["a", "b"])
        chosen.append(who)
        turns.charge(who, 1.0)
    assert chosen.count("a") == chosen.count("b") == 5
    assert turns.choose(["c"]) is None


def test_jain_knows_its_bounds() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1)
    assert jain([1.0, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain([]) == 1.0


LADDER = (
    Rung("as asked", drops=False, cost_ms=20, depth=2),
    Rung("drop", cost_ms=20, depth=2),
    Rung("fewer steps", {"steps": 1}, cost_ms=12),
    Rung("smaller", {"steps": 1, "scale": 0.5}, cost_ms=6),
)
TARGET_MS = 110.0


def _slowed(clock: VirtualClock, factor) -> tuple[LiveWorker, LiveSession]:
    def service(stream: TimedStream) -> float:
        known = next(rung for rung in reversed(LADDER) if rung.changes.get("scale", 1.0) == stream.scale
                     and rung.changes.get("steps", 2) == stream.settings.steps)  # fmt: skip
        return known.cost_ms * factor(clock())

    controller = DeadlineController(LADDER, Budget(TARGET_MS, 1000 / FPS))
    session = _session(clock, service, steps=2, controller=controller)
    worker = LiveWorker(clock)
    worker.add(session)
    return worker, session


def _controller(session: LiveSession) -> DeadlineController:
    assert session.controller is not None
    return session.controller


@pytest.mark.parametrize("factor", [2.0, 3.0, 5.0])
def test_from_a_second_after_a_slow_down_frames_are_on_time_again(factor: float) -> None:
    clock = VirtualClock()
    worker, session = _slowed(clock, lambda now: factor if now > 10 else 1.0)
    late: list[float] = []
    counted: list[float] = []

    def take() -> None:
        for one in session.take():
            session.sent(one)
            if clock() > 11:
                counted.append(clock())
                if (clock() - one.journey.captured) * 1000 > TARGET_MS:
                    late.append(clock())

    session.on_ready = take
    camera(clock, session, FPS, 60)
    run(clock, worker.run_one, 60)
    assert len(counted) >= 300
    assert len(late) < 0.01 * len(counted)
    decisions = list(_controller(session).decisions)
    assert decisions
    assert all(b.at - a.at >= 1 for a, b in pairwise(decisions))


def test_settings_come_back_when_the_machine_does_and_do_not_swing() -> None:
    clock = VirtualClock()
    worker, session = _slowed(clock, lambda now: 3.0 if 10 < now < 20 else 1.0)
    camera(clock, session, FPS, 60)
    run(clock, worker.run_one, 60)
    assert _controller(session).rung.name == "as asked"
    assert len(_controller(session).decisions) <= 4


def test_a_machine_at_the_edge_is_tried_less_and_less_often() -> None:
    # every other second is twice as slow, so the better rung never holds for long
    clock = VirtualClock()
    worker, session = _slowed(clock, lambda now: 4.0 if int(now / 3) % 2 else 1.0)
    camera(clock, session, FPS, 120)
    run(clock, worker.run_one, 120)
    times = [decision.at for decision in _controller(session).decisions]
    first = sum(1 for at in times if at < 30)
    last = sum(1 for at in times if at > 90)
    assert last < first


def test_nothing_on_the_ladder_keeps_an_impossible_target_and_the_decision_says_so() -> None:
    controller = DeadlineController(LADDER, Budget(5.0))
    decision = controller.observe(20.0, at=0.0)
    assert decision is not None
    assert decision.after == "smaller"
    assert "nothing on the ladder" in decision.reason
    # late pictures are better than none
    assert controller.admits(waited_ms=0.5)


def test_costs_are_medians_of_runs_that_take_turns() -> None:
    calls = []

    def spent(rung: Rung) -> float:
        calls.append(rung.name)
        return 1000.0 if len(calls) <= len(LADDER) else rung.cost_ms

    found = measure(LADDER, spent, times=3)
    assert [rung.cost_ms for rung in found] == [rung.cost_ms for rung in LADDER]
    assert calls[: len(LADDER)] == calls[len(LADDER) : 2 * len(LADDER)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(0), "above 0"),
        (lambda: Rung("x", cost_ms=-1), "0 ms or more"),
        (lambda: DeadlineController([], Budget(10)), "at least one"),
        (lambda: DeadlineController([Rung("x")], Budget(10)), "measured cost"),
    ],
)
def test_an_impossible_ladder_is_refused(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_jitter_and_misses_of_known_ages() -> None:
    ledger = Ledger(lambda: 0.0, target_ms=25)
    for number in range(10):
        captured = float(number)
        ledger.admit()
        ledger.finish(Journey(number, captured, captured), captured + (0.02 if number % 2 else 0.03))
    found = ledger.summary()
    assert found["jitter_ms"] == pytest.approx(10)
    assert found["deadline"] == {"target_ms": 25, "missed": 5, "rate": 0.5}
    assert found["first_frame_ms"] == pytest.approx(30)
    assert found["age_ms"]["p50"] == pytest.approx(25)
    # nobody wrote stages down, so all of the age is unexplained
    assert found["unexplained_ms"]["p50"] == pytest.approx(25)


def test_an_empty_ledger_says_nothing_it_does_not_know() -> None:
    found = Ledger(lambda: 0.0).summary()
    assert found["age_ms"] is None
    assert found["deadline"] is None
    assert found["energy_j_per_frame"] is None
    assert found["stages_ms"] == {}
