"""Queues, fairness, deadlines and the ledger on a clock that only work moves: every figure is arithmetic."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from fastdiff_pipelines.live import (
    Controls,
    LiveSession,
    LiveWorker,
    Turns,
    jain,
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


def test_a_viewer_who_never_says_that_pictures_were_seen_gets_one_a_second() -> None:
    # sending succeeds for a long time to somebody who reads none of it
    clock = VirtualClock()
    worker = LiveWorker(clock)
    quick, deaf = _session(clock, lambda stream: 8.0), _session(clock, lambda stream: 8.0, acknowledged=True)
    for session in (quick, deaf):
        worker.add(session)
        camera(clock, session, FPS, 20)
    sent: list[float] = []
    sent_ids: list[int] = []

    def take() -> None:
        for one in deaf.take():
            deaf.sent(one)
            sent.append(clock())
            sent_ids.append(one.journey.frame_id)

    deaf.on_ready = take
    run(clock, worker.run_one, 20)
    late = [at for at in sent if at > 5]
    assert len(late) == pytest.approx(15, abs=1)
    # one word is enough
    newest = sent_ids[-1]
    assert deaf.painted(newest, 1.0)
    before = len(sent)
    camera(clock, deaf, FPS, 1, start=clock())
    run(clock, worker.run_one, clock() + 1)
    # the one that had waited, and all that follow
    assert len(sent) - before == FPS + 1


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


def test_a_constant_latency_is_no_jitter_and_no_miss() -> None:
    ledger = Ledger(lambda: 0.0, target_ms=50)
    for number in range(10):
        captured = number / FPS
        ledger.admit()
        ledger.finish(Journey(number, captured, captured), captured + 0.05 - 1e-9)
    found = ledger.summary()
    assert found["jitter_ms"] == pytest.approx(0, abs=1e-6)
    assert found["deadline"]["missed"] == 0


def test_the_first_frame_counts_from_the_start_with_the_frames_it_had_to_wait_for() -> None:
    # a chunk of four frames is whole after three intervals, and then takes its time
    clock = VirtualClock()

    class Chunked(TimedStream):
        def _work(self) -> None:
            if len(self._inside) == self.settings.steps:
                super()._work()

    session = LiveSession(
        lambda scale, plan: Chunked(clock, lambda stream: SERVICE_MS, scale), Controls(Settings("", steps=4)),
        clock=clock,
    )  # fmt: skip
    viewer(session)
    worker = LiveWorker(clock)
    worker.add(session)
    camera(clock, session, FPS, 1)
    run(clock, worker.run_one, 1)
    assert session.ledger.summary()["first_frame_ms"] == pytest.approx(3 * 1000 / FPS + SERVICE_MS, abs=1e-3)


def test_what_a_stream_does_not_say_of_itself_is_a_stage_too() -> None:
    clock = VirtualClock()

    class Silent(TimedStream):
        def push(self, frame=None, frame_id=None, captured=None):
            found = super().push(frame, frame_id, captured)
            for one in found:
                one.timings.denoise_ms = 0.0
            self.spent_ms = (0.0, 0.0, 0.0)
            return found

    session = LiveSession(
        lambda scale, plan: Silent(clock, lambda stream: SERVICE_MS, scale), Controls(Settings("", steps=1)),
        clock=clock,
    )  # fmt: skip
    viewer(session)
    worker = LiveWorker(clock)
    worker.add(session)
    camera(clock, session, FPS, 2)
    run(clock, worker.run_one, 3)
    found = session.ledger.summary()
    assert found["stages_ms"]["rest"]["p50"] == pytest.approx(SERVICE_MS)
    assert found["unexplained_ms"]["p99"] == pytest.approx(0, abs=1e-6)


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
