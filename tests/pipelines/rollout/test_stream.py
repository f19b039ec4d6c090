"""A video model behind the interface of an image stream."""

from typing import Any

import numpy as np
import pytest

from fastdiff.video.causal import CausalWan
from fastdiff_pipelines.live import Controls, LiveSession
from fastdiff_pipelines.live.virtual import VirtualClock
from fastdiff_pipelines.rollout import ChunkRollout, VideoStream
from fastdiff_pipelines.rollout.slo import Costs, SloScheduler, Target
from fastdiff_pipelines.settings import Settings
from tests.pipelines.rollout.tiny import SIZE, TinyPipe, rollout, video

SETTINGS = Settings("a red circle", steps=2, strength=0.7)


def test_frames_are_those_of_a_session_and_come_one_by_one() -> None:
    frames = video(15)
    with rollout() as model:
        direct = np.concatenate(list(model("a red circle", frames, steps=2, strength=0.7, noise="fixed")))
        stream = VideoStream(model, SETTINGS)
        stream.warmup()
        each = [stream.push(frame, number) for number, frame in enumerate(frames)]
        assert max(len(made) for made in each) == 1
        made = [one for outputs in each for one in outputs] + stream.flush()
    assert [one.frame_id for one in made] == list(range(15)) and stream.in_flight == 0
    assert all(np.array_equal(one.image, frame) for one, frame in zip(made, direct, strict=True))
    assert all(spent > 0 for spent in stream.spent_ms) and "15 frames in, 15 made" in stream.report()


def test_a_cleared_stream_hands_out_nothing_of_before() -> None:
    with rollout() as model:
        stream = VideoStream(model, SETTINGS)
        for number, frame in enumerate(video(9)):
            stream.push(frame, number)
        stream.update(steps=3)
        stream.clear()
        assert stream.push(video(1)[0], 100) == [] and stream.in_flight == 1
        assert [one.frame_id for one in stream.flush()] == [100] and stream.in_flight == 0


def test_a_schedulers_choice_outlives_updates_and_is_told() -> None:
    costs, target = Costs(call=20, row=1), Target(5000, fps=100)
    scheduler = SloScheduler(costs, target, steps=(1, 2, 4), chunks=(1,), batched=(False,))
    with rollout() as model:
        stream = VideoStream(model, Settings("a", steps=4), scheduler)
        stream.update(prompt="b")
        now = stream._session.settings
        assert (now.prompts, now.steps, now.batched) == (("b",), scheduler.choice.steps, False) == (("b",), 1, False)
        assert "1 step, chunks of 1, one at a time: keeps both deadlines; 0 changes" in stream.report()
        stream.scheduler = SloScheduler(Costs(call=200, row=1), target)
        assert "breaks a deadline" in stream.report()


def test_warming_up_runs_every_shape_that_frames_will_need(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    inner = CausalWan.__call__

    def call(self: CausalWan, x: Any, *args: Any, **options: Any) -> Any:
        seen.add((len(x), x.shape[2], int(options["commit"])))
        return inner(self, x, *args, **options)

    monkeypatch.setattr(CausalWan, "__call__", call)
    with rollout() as model:
        stream = VideoStream(model, Settings("a", steps=3, guidance="full", guidance_scale=2.0))
        stream.warmup()
        warmed = set(seen)
        seen.clear()
        for frame in video(25):
            stream.push(frame)
        stream.flush()
    assert seen and seen <= warmed


def test_two_streams_of_different_sizes_share_a_model() -> None:
    pipe = TinyPipe()
    with ChunkRollout(pipe, height=SIZE, width=SIZE) as model:
        small = ChunkRollout(pipe, height=SIZE // 2, width=SIZE, causal=model.causal)
        streams = [VideoStream(one, SETTINGS) for one in (model, small)]
        for stream in streams:
            assert stream.push(np.zeros((*stream.size, 3), np.uint8)) == []
        assert [len(stream.flush()) for stream in streams] == [1, 1]
        small.close()
        assert pipe.transformer.blocks[0].attn1.processor.__class__.__name__ == "_SelfAttention"


def test_a_prompt_changed_live_changes_the_picture() -> None:
    frames = video(13)
    with rollout() as model:
        made: list[Any] = []
        for switches in (False, True):
            stream, found = VideoStream(model, SETTINGS), []
            for number, frame in enumerate(frames):
                if switches and number == 6:
                    stream.update(prompt="a blue square", on_update="retarget", similarity=None)
                found += stream.push(frame)
            made.append([one.image for one in found + stream.flush()])
    same = [np.array_equal(one, other) for one, other in zip(*made, strict=True)]
    assert same[0] and not any(same[5:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "tcd"}, "sampler lcm or euler, not 'tcd'"),
        ({"guidance": "self"}, "guidance none or full"),
        ({"noise": "blended"}, "noise fixed or fresh"),
        ({"similarity": 0.98}, "skips no frames"),
        ({"prompts": (("a", 1.0), ("b", 1.0))}, "takes no prompts"),
    ],
)
def test_what_only_image_streams_have_is_refused_and_nothing_changes(changes: dict, message: str) -> None:
    with rollout() as model:
        stream = VideoStream(model, SETTINGS)
        with pytest.raises(ValueError, match=message):
            stream.update(**changes)
        assert stream.settings == SETTINGS
        stream.push(video(1)[0])
        with pytest.raises(ValueError, match="resize it"):
            stream.push(video(1, size=8)[0])
        assert len(stream.flush()) == 1


def test_a_failure_loses_what_is_inside_and_no_more() -> None:
    with rollout() as model:
        stream = VideoStream(model, SETTINGS)
        handle = model.pipe.transformer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.push(video(1)[0])
        handle.remove()
        assert stream.in_flight == 0
        outputs = [one for frame in video(6) for one in stream.push(frame)] + stream.flush()
    assert len(outputs) == 6


def test_a_live_session_runs_it_as_it_runs_image_streams() -> None:
    clock = VirtualClock()
    with rollout() as model:
        session = LiveSession(lambda scale, plan: VideoStream(model, SETTINGS), Controls(SETTINGS), clock=clock)
        shown = []
        for number, frame in enumerate(video(21)):
            session.offer(frame, number, clock())
            session.step()
            clock.advance(0.04)
            for one in session.take():
                session.sent(one)
                shown.append(one.journey.frame_id)
        session.drain()
        for one in session.take():
            session.sent(one)
            shown.append(one.journey.frame_id)
    summary = session.ledger.summary()
    assert shown[:12] == list(range(12)) and summary["frames"]["in"] == 21
    assert summary["frames"]["shown"] + sum(summary["frames"]["dropped"].values()) == 21
