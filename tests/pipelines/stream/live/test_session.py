"""Recording and replay, failures that stay with their session, ages that viewers tell, energy: known answers."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from fastdiff_pipelines import Stream
from fastdiff_pipelines.live import Controls, IdentityStream, LiveSession, LiveWorker, Recording, replay
from fastdiff_pipelines.live.energy import energy_meter
from fastdiff_pipelines.live.recording import read
from fastdiff_pipelines.settings import Settings


def _record(path, make_toy, clip, toy_size) -> tuple[LiveSession, Any]:
    def open(scale: float, plan: str | None) -> Stream:
        return Stream(make_toy(), "a", steps=2, noise="fresh", **toy_size)

    recording = Recording(path, {"model": "toy", "seed": 0})
    session = LiveSession(open, Controls(Settings("a", steps=2, noise="fresh")), recording=recording)
    worker = LiveWorker()
    worker.add(session)
    for number, frame in enumerate(clip):
        if number == 4:
            session.change(prompt="b", strength=0.7)
        if number == 7:
            session.change(prompts=(("a", 0.5), ("b", 0.5)))
        session.offer(frame, number)
        assert worker.run_one()
        session.take()
    session.drain()
    recording.close()
    return session, open


def test_a_replay_gives_the_same_pictures_by_hash(tmp_path, make_toy, clip, toy_size) -> None:
    path = tmp_path / "session.fdrec"
    session, open = _record(path, make_toy, clip, toy_size)
    assert session.ledger.drops["failed"] == 0
    found = replay(path, open)
    assert (found.frames, found.same, found.different) == (len(clip), len(clip), 0)
    kinds = [head["kind"] for head, _ in read(path)]
    assert kinds.count("change") == 3
    assert kinds[0] == "about"


def test_a_replay_on_another_model_says_which_picture_differs_first(tmp_path, make_toy, clip, toy_size) -> None:
    path = tmp_path / "session.fdrec"
    _record(path, make_toy, clip, toy_size)
    found = replay(path, lambda scale, plan: Stream(make_toy("v_prediction"), "a", steps=2, noise="fresh", **toy_size))
    assert found.different == len(clip)
    assert found.first_different == "0"


def test_a_recording_cut_short_gives_what_is_whole_and_another_file_is_refused(
    tmp_path, make_toy, clip, toy_size
) -> None:
    path = tmp_path / "session.fdrec"
    _, open = _record(path, make_toy, clip, toy_size)
    path.write_bytes(path.read_bytes()[:-100])
    found = replay(path, open)
    assert 0 < found.same < len(clip)
    assert found.different == 0
    path.write_text("something else")
    with pytest.raises(ValueError, match="not a recording"):
        replay(path, open)


def _empty(path) -> Recording:
    return Recording(path, {"model": "none"})


def test_a_recording_that_never_began_is_whole_when_its_session_leaves(tmp_path) -> None:
    session = LiveSession(lambda scale, plan: IdentityStream(16, 16), Controls(Settings("")))
    worker = LiveWorker()
    worker.add(session)
    replaced, left, late = (_empty(tmp_path / f"{name}.fdrec") for name in ("replaced", "left", "late"))
    session.record(replaced)
    session.record(left)
    assert session.recording is left
    worker.remove(session)
    with pytest.raises(RuntimeError, match="ended"):
        session.record(late)
    for recording in (replaced, left, late):
        assert [head["kind"] for head, _ in read(recording.path)] == ["about"]


def test_a_recording_that_cannot_be_finished_ends_nobody_else(tmp_path, monkeypatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    problems: list[str] = []
    recording = _empty(tmp_path / "session.fdrec")
    monkeypatch.setattr(recording, "close", full)
    session = LiveSession(
        lambda scale, plan: IdentityStream(16, 16), Controls(Settings("")), on_problem=problems.append,
        recording=recording,
    )  # fmt: skip
    worker = LiveWorker()
    worker.add(session)
    worker.remove(session)
    assert len(problems) == 1
    assert "not whole" in problems[0]


def test_a_session_that_leaves_within_a_turn_is_recorded_to_the_end_of_it(tmp_path, clip) -> None:
    class Leaving(IdentityStream):
        def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> Any:
            worker.remove(session)
            session.record(late)
            return super().push(frame, frame_id, captured)

    recording, late = _empty(tmp_path / "session.fdrec"), _empty(tmp_path / "late.fdrec")
    session = LiveSession(lambda scale, plan: Leaving(16, 16), Controls(Settings("")), recording=recording)
    worker = LiveWorker()
    worker.add(session)
    session.offer(clip[0], 0)
    assert worker.run_one()
    assert [head["kind"] for head, _ in read(recording.path)] == ["about", "open", "change", "frame", "push"]
    assert [head["kind"] for head, _ in read(late.path)] == ["about"]
    assert worker.sessions == []


def test_a_failing_model_loses_its_frames_and_tells_and_ends_the_session_at_last(clip) -> None:
    problems: list[str] = []

    class Failing(IdentityStream):
        def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> Any:
            raise RuntimeError("out of memory")

    session = LiveSession(lambda scale, plan: Failing(16, 16), Controls(Settings("")), on_problem=problems.append)
    for number in range(3):
        session.offer(clip[0], number)
        session.step()
    assert session.closed
    assert len(problems) == 3
    assert "out of memory" in problems[0]
    assert session.ledger.drops["failed"] == 3
    with pytest.raises(RuntimeError, match="closed"):
        session.offer(clip[0], 9)


def test_a_broken_frame_is_told_to_its_sender_only(clip) -> None:
    told: dict[str, list[str]] = {"one": [], "other": []}

    def unpack(payload: Any, height: int, width: int) -> Any:
        if payload is None:
            raise ValueError("not a picture")
        return payload

    sessions = {
        name: LiveSession(
            lambda scale, plan: IdentityStream(16, 16), Controls(Settings("")), unpack=unpack, on_problem=lines.append
        )
        for name, lines in told.items()
    }
    worker = LiveWorker()
    for session in sessions.values():
        worker.add(session)
    sessions["one"].offer(None, 0)
    sessions["other"].offer(clip[0], 0)
    while worker.run_one():
        pass
    assert [len(lines) for lines in told.values()] == [1, 0]
    assert [len(session.take()) for session in sessions.values()] == [0, 1]


def test_ages_that_a_viewer_tells_are_held_to_what_can_be(clip) -> None:
    now = [100.0]
    session = LiveSession(
        lambda scale, plan: IdentityStream(16, 16), Controls(Settings("")), clock=lambda: now[0], acknowledged=True
    )
    for number, age in ((0, -5.0), (1, 1e12), (2, 30.0)):
        session.offer(clip[0], number)
        session.step()
        (one,) = session.take()
        session.sent(one)
        now[0] += 0.05
        assert session.painted(number, age)
        assert not session.painted(number, age)
    assert session.ledger.ages() == pytest.approx([0.0, 50.0, 30.0])


def test_energy_is_read_where_a_driver_tells_it() -> None:
    used = [1000, 5000]
    library = SimpleNamespace(
        NVMLError=OSError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetTotalEnergyConsumption=lambda index: used[index],
    )  # fmt: skip
    meter = energy_meter(library)
    assert meter is not None
    assert meter() == 6.0
    library.nvmlDeviceGetCount = lambda: 0
    assert energy_meter(library) is None


def test_ten_thousand_frames_leave_less_than_a_kilobyte_each(make_toy, clip, toy_size) -> None:
    process, places, held = psutil.Process(), [], []
    session = LiveSession(
        lambda scale, plan: Stream(make_toy(), "a", steps=2, **toy_size), Controls(Settings("a", steps=2)),
        acknowledged=True,
    )  # fmt: skip
    worker = LiveWorker()
    worker.add(session)
    for number in range(10_000):
        session.offer(clip[number % len(clip)], number)
        assert worker.run_one()
        for one in session.take():
            session.sent(one)
            assert session.painted(one.journey.frame_id, 1.0)
        # windows and the allocator fill up first
        if number >= 3000 and number % 100 == 0:
            places.append(number)
            held.append(process.memory_info().rss)
    assert np.polyfit(places, held, 1)[0] < 1024
    assert session.ledger.summary()["frames"]["shown"] == 9999


def test_the_ledger_is_plain_json(clip) -> None:
    session = LiveSession(lambda scale, plan: IdentityStream(16, 16), Controls(Settings("")), target_ms=50)
    session.offer(clip[0], 0)
    session.step()
    for one in session.take():
        session.sent(one)
    assert json.loads(json.dumps(session.ledger.summary()))["frames"]["shown"] == 1
