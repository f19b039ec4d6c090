"""Settings that a stream refuses: the others are applied, the refusal is told once, and a fade becomes a cut."""

from typing import Any

import pytest

from fastdiff_pipelines.live import Controls, IdentityStream, LiveSession, Recording
from fastdiff_pipelines.live.applied import Applied
from fastdiff_pipelines.live.recording import read
from fastdiff_pipelines.live.virtual import VirtualClock
from fastdiff_pipelines.rollout import VideoStream
from fastdiff_pipelines.rollout.slo import Costs, SloScheduler, Target
from fastdiff_pipelines.settings import Settings
from tests.pipelines.rollout.tiny import rollout, video


class Choosy(IdentityStream):
    """Takes no blends, no guidance "self", and a blend of noise only where noise is blended; all or nothing."""

    def update(self, **changes: Any) -> None:
        new = self.settings.changed(**{name: value for name, value in changes.items() if name != "on_update"})
        if new.prompts or new.seeds or new.guidance == "self":
            raise ValueError("not here")
        if new.blend != 0.5 and new.noise != "blended":
            raise ValueError("blend needs blended noise")
        self.settings = new


def test_what_is_refused_holds_nothing_else_back_and_is_told_once() -> None:
    problems: list[str] = []
    applied, stream = Applied(problems.append), Choosy()
    wanted = {"prompt": "b", "guidance": "self", "strength": 0.7}
    assert applied.tell(stream, wanted) == [
        {"settings": {"prompt": "b"}, "lora": {}},
        {"settings": {"strength": 0.7}, "lora": {}},
    ]
    assert stream.settings == Settings("b", strength=0.7)
    assert applied.tell(stream, wanted) == []
    assert [one["settings"] for one in applied.tell(stream, {**wanted, "prompt": "c"})] == [{"prompt": "c"}]
    assert problems == ["these settings are not possible: not here"]
    applied.tell(stream, {"guidance": "none"})
    applied.tell(stream, {"guidance": "self"})
    assert len(problems) == 2


def test_what_needs_another_setting_is_tried_again_after_it() -> None:
    problems: list[str] = []
    applied, stream = Applied(problems.append), Choosy()
    taken = applied.tell(stream, {"blend": 0.2, "noise": "blended", "guidance": "self", "on_update": "retarget"})
    assert [next(iter(one["settings"])) for one in taken] == ["on_update", "noise", "blend"]
    assert stream.settings.blend == 0.2
    assert problems == ["these settings are not possible: not here"]


def test_another_stream_is_told_everything_anew_and_similarity_is_switched_off() -> None:
    told: list[dict[str, Any]] = []
    stream = Choosy()
    stream.update = lambda **changes: told.append(changes)  # type: ignore[method-assign]
    applied = Applied(lambda message: None)
    applied.tell(stream, {"steps": 2, "similarity": 0.98})
    applied.tell(stream, {"steps": 2})
    applied.begin()
    applied.tell(stream, {"steps": 2})
    assert told == [{"steps": 2, "similarity": 0.98}, {"similarity": None}, {"steps": 2}]


@pytest.fixture
def model() -> Any:
    with rollout() as made:
        yield made


def _live(model: Any, clock: VirtualClock, problems: list[str], **options: Any) -> tuple[LiveSession, VideoStream]:
    stream = VideoStream(model, Settings("a", steps=2), options.pop("scheduler", None))
    made = LiveSession(lambda scale, plan: stream, Controls(Settings("a", steps=2)), clock=clock,
                       on_problem=problems.append, **options)  # fmt: skip
    return made, stream


def test_a_fade_to_another_prompt_and_seed_is_a_cut_of_a_video(model: Any, tmp_path: Any) -> None:
    clock, problems = VirtualClock(), []
    recording = Recording(tmp_path / "session.fdrec", {})
    session, stream = _live(model, clock, problems, recording=recording)
    for number, frame in enumerate(video(8)):
        if number == 2:
            session.change(1.0, prompt="b", seed=3)
        session.offer(frame, number)
        session.step()
        clock.advance(0.25)
        assert stream.settings.prompt == ("a" if number < 2 else "b")
    assert stream.settings.seed == 3
    assert len(problems) == 1
    assert "so it is a cut" in problems[0]
    session.end()
    # what the stream refused is not in the recording, or its replay would fail
    told = [head["settings"] for head, _ in read(recording.path) if head["kind"] == "change"]
    assert {"prompt": "b"} in told
    assert not any(one.get("prompts") for one in told)


def test_a_prompt_that_comes_with_an_impossible_guidance_is_not_lost(model: Any) -> None:
    clock, problems = VirtualClock(), []
    session, stream = _live(model, clock, problems)
    session.change(prompt="b", guidance="self")
    session.offer(video(1)[0], 0)
    session.step()
    assert (stream.settings.prompt, stream.settings.guidance) == ("b", "none")
    assert len(problems) == 1
    assert "guidance none or full" in problems[0]


def test_the_pace_of_a_video_is_in_the_sessions_json(model: Any) -> None:
    clock, problems = VirtualClock(), []
    # a call of 300 ms: two steps of one chunk miss what four frames play, one step does not
    target = Target(first_frame_ms=2000, fps=8)
    scheduler = SloScheduler(Costs(call=300, row=0), target, steps=(1, 2), chunks=(1,), batched=(False,))
    session, stream = _live(model, clock, problems, scheduler=scheduler)
    session.offer(video(1)[0], 0)
    session.step()
    # the settings that came with the first frame leave the choice standing
    assert stream.settings.steps == 2 and stream._session.settings.steps == 1
    found = session.summary()["pace"]
    assert found["now"] == "1 of 2 steps"
    assert found["fits"] and found["choice"]["steps"] == 1
    assert found["decisions"] == []
    late = SloScheduler(Costs(call=900, row=0), target, steps=(1, 2), chunks=(1,), batched=(False,))
    session, _ = _live(model, clock, problems, scheduler=late)
    session.offer(video(1)[0], 0)
    session.step()
    assert session.summary()["pace"]["now"] == "1 of 2 steps, too slow for the target"
    assert _live(model, clock, problems)[0].summary()["pace"] is None
