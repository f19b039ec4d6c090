"""Chunks that are inside while settings change, a video begins anew, or a step fails."""

from functools import partial
from typing import Any

import pytest
import torch

from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff_pipelines.rollout import Context
from tests.pipelines.rollout.tiny import rollout, video


def test_what_a_change_finished_does_not_come_out_in_the_next_video() -> None:
    with rollout(steps=2) as model:
        session = model.open("x")
        assert [len(session.generate()) for _ in range(2)] == [0, 1]
        session.update(steps=1)
        assert session.in_flight == 1
        session.restart()
        assert session.in_flight == 0 and session.ledger.summary()["frames"]["dropped"] == {"restarted": 4}
        assert [(chunk.number, len(chunk)) for chunk in session.generate()] == [(2, 1)]


@pytest.mark.parametrize(("fails", "frames"), [("generate", 13), ("flush", 9)])
def test_what_a_failing_step_takes_with_it_is_counted(fails: str, frames: int) -> None:
    with rollout(steps=3) as model:
        session = model.open("x")
        for part in (video(1), video(4), video(4)):
            for chunk in session.generate(part):
                session.ledger.hand_out(chunk)
        work: Any = session.flush
        if fails == "generate":
            session.update(steps=2)
            work = partial(session.generate, video(4))
        # a flush finishes a chunk with its first call, the change above has finished both
        calls = iter(range(10))

        def stop(*_: Any) -> None:
            if next(calls) == (fails == "flush"):
                raise KeyboardInterrupt

        handle = model.pipe.transformer.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            work()
        handle.remove()
        counted = session.ledger.summary()["frames"]
    assert session.in_flight == 0 and session.restarts == 1
    assert counted == {"in": frames, "shown": 1, "repeated": 0, "dropped": {"failed": frames - 1}}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1)])
def test_another_chunk_length_leaves_the_last_chunk_as_it_was(before: int, after: int) -> None:
    """Its frames see each other and nothing of what comes later, whatever comes later."""
    with rollout(steps=1, batched=False, chunk=before, context=Context(frames=6)) as model:
        keys = []
        for changes in ({}, {"chunk": after}):
            session = model.open("x")
            session.generate()
            session.update(**changes)
            session.generate()
            keys.append(session._memory.cache.keys.get(1)[:, :before].clone())
    torch.testing.assert_close(keys[1], keys[0], rtol=0, atol=1e-5)


def test_shorter_chunks_take_what_waited_for_a_longer_one() -> None:
    frames = video(12)
    source = [*frames[:4], {"chunk": 1}, *frames[4:]]
    with rollout(steps=1, chunk=2, batched=False) as model:
        for on_bad in ("raise", "drop"):
            session = model.open("x")
            assert [len(chunk) for chunk in session.run(source, on_bad=on_bad)] == [1, 4, 4, 3]
            assert session.ledger.summary()["frames"] == {"in": 12, "shown": 12, "repeated": 0, "dropped": {}}


def test_an_item_with_too_few_videos_is_a_bad_frame() -> None:
    one, two = video(6), video(6, seed=1)
    pairs = [list(pair) for pair in zip(one, two, strict=True)]
    with rollout(steps=1, batched=False) as model:
        session = model.open(["x", "y"])
        made = list(session.run([*pairs[:2], [one[2]], *pairs[3:]], on_bad="drop"))
        assert sum(len(chunk) for chunk in made) == 5
        assert session.ledger.summary()["frames"]["dropped"] == {"broken": 1}
        with pytest.raises(ValueError, match="2 videos take 2 control frames at a time, got 1"):
            list(session.run([[one[0]]]))


def test_absolute_positions_go_on_when_the_context_is_computed_again() -> None:
    with rollout(steps=2, context=Context(frames=3, sinks=1, kind="steps", positions="absolute")) as model:
        session = model.open("x")
        for _ in range(6):
            session.generate()
        session.flush()
        before = session._memory.cache.moments([1])
        assert before.tolist() == [[0, 4, 5]]
        session.update(steps=3, guidance_scale=2.0)
        assert session._memory.cache.moments().tolist() == before.tolist() * 6
        session.update(prompt="y")
        session.finalise()
        assert session._memory.cache.moments().tolist() == before.tolist() * 6
        assert session._memory.cache.layout(1).new.flatten().tolist() == [6] * 6


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize(
    "change", [{"prompt": "another thing"}, {"negative_prompt": "other"}, {"prompt": "y", "guidance_scale": 1.0}]
)
def test_words_changed_before_anything_was_finished_are_as_if_said_from_the_beginning(
    controls: bool, change: dict[str, Any]
) -> None:
    given = {"steps": 3, "guidance_scale": 2.0 if "negative_prompt" in change else 1.0}
    parts = [video(1), video(4), video(4), video(4)] if controls else [None] * 4
    with rollout(**given) as model:
        made = []
        for early in (False, True):
            session = model.open("x")
            if early:
                session.update(**change)
            out = [chunk for part in parts[:2] for chunk in session.generate(part)]
            assert not out
            if not early:
                session.update(**change)
                session.finalise()
                assert [item.step for item in session._flying] == [2, 1]
            out += [chunk for part in parts[2:] for chunk in session.generate(part)]
            made.append(torch.cat([chunk.latents for chunk in [*out, *session.flush()]], dim=2))
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-5)


def test_chunks_in_flight_keep_nothing_of_the_old_words_but_what_is_finished() -> None:
    """Two videos that differ in what is in flight, and not in finished frames, go on alike."""
    with rollout(steps=3) as model:
        made = []
        for other in (0.0, 1.0):
            session = model.open("x")
            for _ in range(3):
                session.generate()
            for item in session._flying:
                item.x = item.x + other
            session.update(prompt="the last word")
            session.finalise()
            made.append(torch.cat([item.x for item in session._flying], dim=2))
    assert torch.equal(made[0], made[1])


def test_a_context_of_steps_goes_on_with_what_is_in_flight() -> None:
    with rollout(steps=3, context=Context(kind="steps")) as model:
        session = model.open("x")
        session.generate()
        session.generate()
        before = [item.x.clone() for item in session._flying]
        session.update(prompt="another thing")
        session.finalise()
        assert all(torch.equal(item.x, was) for item, was in zip(session._flying, before, strict=True))


@pytest.mark.parametrize("times", [0, 2])
def test_the_first_chunk_of_new_words_is_what_the_decoder_remembers(times: int) -> None:
    with rollout(steps=1, batched=False, context=Context(redecode=times)) as model:
        session = model.open("x")
        made = [chunk for _ in range(3) for chunk in session.generate()]
        session.update(prompt="another thing")
        made += [chunk for _ in range(2) for chunk in session.generate()]
        codec = StreamingVAE(model.vae)
        for chunk in made:
            latents = codec.unscaled(chunk.latents)
            if chunk.number == 3:
                with torch.inference_mode():
                    for _ in range(times):
                        codec.decode(latents)
            with torch.inference_mode():
                expected = codec.decode(latents)
            assert expected is not None
            assert torch.equal(chunk.pixels, expected.float().mul(0.5).add(0.5).clamp(0, 1))


def test_what_fails_while_chunks_begin_again_leaves_nothing_half_done() -> None:
    with rollout(steps=3) as model:
        session = model.open("x")
        session.generate()
        session.generate()
        session.update(prompt="another thing")

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.pipe.transformer.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            session.finalise()
        handle.remove()
        assert session.in_flight == 0 and session.restarts == 1
        assert [len(session.generate()) for _ in range(3)] == [0, 0, 1]
