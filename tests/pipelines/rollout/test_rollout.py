"""Sessions as people use them: sources that misbehave, consumers that stop, prompts that change, memory that stays."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.acceleration import Unsupported
from fastdiff.miniature.families import family
from fastdiff_pipelines.latest import Captured
from fastdiff_pipelines.live.virtual import VirtualClock
from fastdiff_pipelines.rollout import ChunkRollout, Context, Motion
from fastdiff_pipelines.slots import NotFinite
from tests.pipelines.rollout.tiny import SIZE, TinyPipe, rollout, video


def shapes(frames) -> list[int]:
    return [len(part) for part in frames]


def test_text_to_video_without_end() -> None:
    with rollout() as model:
        made = list(itertools.islice(model("a red circle"), 5))
        assert shapes(made) == [1, 4, 4, 4, 4] and made[0].dtype == np.uint8 and made[0].shape[1:] == (SIZE, SIZE, 3)
        two = next(model(["a red circle", "a blue square"], chunk=2))
        assert two.shape == (2, 5, SIZE, SIZE, 3)
        again = list(itertools.islice(model("a red circle"), 5))
        assert all(np.array_equal(one, other) for one, other in zip(made, again, strict=True))
        assert not np.array_equal(made[1], next(itertools.islice(model("a red circle", seed=1), 1, None)))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("count", [1, 3, 13, 15])
def test_video_to_video_gives_as_many_frames_as_it_takes(batched: bool, count: int) -> None:
    with rollout() as model:
        session = model.open("a red circle", batched=batched)
        made = list(session.run(video(count)))
    assert sum(len(chunk) for chunk in made) == count
    assert [chunk.first_frame for chunk in made] == [0, *range(1, count, 4)]
    summary = session.ledger.summary()
    assert summary["frames"] == {"in": count, "shown": count, "repeated": 0, "dropped": {}}


def test_a_low_strength_stays_with_the_control_frames() -> None:
    controls = video(9)
    with rollout() as model:
        plain = model.open("")
        admitted = plain._admit(controls[:1])
        encoded = None if admitted is None else plain._codec.encode(admitted)
        assert encoded is not None
        near, far = (next(iter(model.open("", strength=s).run(controls))).latents for s in (0.01, 0.9))
        truth = plain._codec.scaled(encoded)
    assert (near - truth).norm() < 0.1 * (far - truth).norm()


@pytest.mark.parametrize("noise", ["fixed", "fresh", "warped"])
@pytest.mark.parametrize("storage", ["native", "int8", "float8"])
def test_kinds_of_noise_and_storage(noise: str, storage: str) -> None:
    with rollout() as model:
        made = list(model("a red circle", video(9), noise=noise, storage=storage, motion=Motion()))
    assert shapes(made) == [1, 4, 4]


def test_fixed_noise_of_a_still_scene_is_the_same_every_time() -> None:
    with rollout(context=Context(frames=1), noise="fixed", strength=0.7) as model:
        session = model.open("a red circle", batched=False)
        used = [session._noise.chunk(number, 1, 4) for number in range(3)]
        assert torch.equal(used[0], used[2])
        fresh = model.open("a red circle", noise="fresh")._noise
        assert not torch.equal(fresh.chunk(0, 1, 4), fresh.chunk(1, 1, 4))
        assert torch.equal(fresh.chunk(1, 1, 4), fresh.chunk(1, 1, 4))


def test_interleaved_sessions_are_two_solo_ones_and_leave_the_pipeline_as_it_was() -> None:
    pipe = TinyPipe()
    x, time, text = torch.randn(1, 4, 3, 2, 2), torch.tensor([500.0]), pipe.encode_prompt(["x"])[0]
    before = pipe.transformer(x, time, text, return_dict=False)[0]
    with ChunkRollout(pipe, height=SIZE, width=SIZE) as model:
        solo = [list(model(prompt, video(13, seed))) for prompt, seed in (("red", 0), ("blue", 1))]
        first, second = model("red", video(13, 0)), model("blue", video(13, 1))
        made: list[list[np.ndarray]] = [[], []]
        for _ in range(4):
            for number, one in ((1, second), (0, first)):
                made[number].append(next(one))
        assert torch.equal(pipe.transformer(x, time, text, return_dict=False)[0], before)
    for one, other in zip(made, solo, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(pipe.transformer(x, time, text, return_dict=False)[0], before)
    assert all("processor" not in module.__dict__ or module.processor.__class__.__name__ == "WanAttnProcessor"
               for module in pipe.transformer.modules())  # fmt: skip


def test_prompts_change_from_the_next_chunk_on() -> None:
    with rollout() as model:
        changes = [None, None, {"prompt": "a blue square"}, None, None, None]
        switched = list(model("a red circle", changes, batched=False))
        plain = list(model("a red circle", chunks=5, batched=False))
    same = [np.array_equal(one, other) for one, other in zip(switched, plain, strict=True)]
    assert same == [True, True, False, False, False]


def test_prompts_are_encoded_as_the_pipeline_does_without_their_padding() -> None:
    from fastdiff.miniature import wan

    pipe = wan.untrained()
    words = ["a big red circle moving right quickly on a plain white background", "a blue square"]
    whole, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=512)
    with ChunkRollout(pipe, height=32, width=32) as model:
        text = model.encode(words)
    shown = text.embeds.shape[1]
    assert shown + text.padding == 512 and shown <= 48
    torch.testing.assert_close(text.embeds, whole[:, :shown], rtol=0, atol=1e-5)
    assert not whole[:, shown:].any()


def test_accelerations_hold_inside_a_rollout() -> None:
    from fastdiff.miniature import wan

    pipe = wan.untrained()
    with ChunkRollout(pipe, height=32, width=32, steps=2) as model:
        plain = list(model("a red circle", chunks=2))
        from fastdiff.caching.forecast import Forecast

        with (
            fastdiff.accelerate(pipe, [Forecast()]),
            pytest.raises(Unsupported, match="remove it from the plan for streaming"),
        ):
            next(model("a red circle"))
        assert np.array_equal(next(model("a red circle")), plain[0])
        session = model.open("a red circle")
        with fastdiff.accelerate(pipe, fastdiff.Plan()):
            session.generate()
        with fastdiff.accelerate(pipe, [Forecast()]), pytest.raises(Unsupported, match="remove it from the plan"):
            session.generate()


class TestBadStreams:
    @pytest.mark.parametrize("batched", [True, False])
    def test_a_frame_of_another_size(self, batched: bool) -> None:
        frames = [*video(5), *video(1, size=8), *video(8, seed=2)]
        with rollout() as model:
            running = model("x", frames, batched=batched)
            with pytest.raises(ValueError, match="resize it"):
                list(running)
            session = model.open("x", batched=batched)
            kept = list(session.run(frames, on_bad="drop"))
            assert sum(len(chunk) for chunk in kept) == 13
            assert session.ledger.summary()["frames"]["dropped"] == {"broken": 1}
            clean = list(model("x", [*frames[:5], *frames[6:]], batched=batched))
        assert all(np.array_equal(one.frames[0], other) for one, other in zip(kept, clean, strict=True))

    def test_values_that_are_not_finite(self) -> None:
        bad = torch.zeros(3, SIZE, SIZE)
        bad[0, 0, 0] = torch.nan
        with rollout() as model:
            session = model.open("x")
            with pytest.raises(ValueError, match="finite"):
                session.generate([bad])
            assert sum(len(chunk) for chunk in session.run([bad, *video(5), bad], on_bad="drop")) == 5
            assert session.ledger.drops["broken"] == 2

    def test_capture_times_that_run_backwards(self) -> None:
        times = [0.0, 1.0, 2.0, 1.5, 3.0, 4.0]
        frames = [Captured(i, frame, at) for i, (frame, at) in enumerate(zip(video(6), times, strict=True))]
        with rollout() as model:
            session = model.open("x")
            assert sum(len(chunk) for chunk in session.run(frames, on_bad="drop")) == 5
            assert session.ledger.summary()["frames"]["dropped"] == {"backwards": 1}
            with pytest.raises(ValueError, match=r"taken at 1\.5 came after 2\.0"):
                list(model("x", frames))

    def test_a_clock_that_runs_backwards(self) -> None:
        ticks = itertools.chain([10.0, 11.0, 12.0], itertools.repeat(3.0))
        with rollout() as model:
            session = model.open("x", clock=lambda: next(ticks), target_ms=1000)
            list(session.run(None, 3))
            summary = session.ledger.summary()
        assert summary["clock_went_back"] > 0 and summary["age_ms"]["p50"] >= 0 and summary["frames"]["shown"] == 9

    def test_a_consumer_that_stops_reading_costs_nothing(self) -> None:
        taken = []

        def source():
            for number, frame in enumerate(video(100)):
                taken.append(number)
                yield frame

        with rollout() as model:
            running = model("x", source(), batched=False)
            next(running)
            next(running)
            assert len(taken) == 5
            running.close()
            assert len(taken) == 5

    @pytest.mark.parametrize("kind", ["rolling", "steps", "last", "clean"])
    def test_cancelled_in_the_middle_of_a_chunk(self, kind: str) -> None:
        with rollout(context=Context(kind=kind), batched=kind in ("rolling", "steps")) as model:
            expected = list(model("x", chunks=3))
            session = model.open("x")
            running = session.run(None)
            next(running)
            calls = itertools.count()

            def stop(*_):
                if next(calls) == 1:
                    raise KeyboardInterrupt

            handle = model.pipe.transformer.blocks[1].register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                list(itertools.islice(running, 2))
            handle.remove()
            assert session.in_flight == 0 and session._memory.cache.held(0) == 0
            assert all(np.array_equal(a, b) for a, b in zip(model("x", chunks=3), expected, strict=True))
            (first, *_) = session.run(None, 2)
            assert len(first) == 1

    def test_a_model_that_gives_nan(self) -> None:
        with rollout(batched=False) as model:
            session = model.open("x")
            session.generate()
            bias = model.pipe.transformer.proj_out.bias
            good = bias.clone()
            bias.fill_(torch.nan)
            with pytest.raises(NotFinite, match="chunk 1"):
                session.generate()
            bias.copy_(good)
            (chunk,) = session.generate()
            assert len(chunk) == 1 and torch.isfinite(chunk.pixels).all()

    def test_a_video_keeps_to_its_kind(self) -> None:
        with rollout() as model:
            session = model.open("x")
            session.generate()
            with pytest.raises(ValueError, match="began from noise"):
                session.generate(video(4))
            session.restart()
            with pytest.raises(ValueError, match="1 to 1 control frames, got 4"):
                session.generate(video(4))
            session.generate(video(1))
            session.close()
            session.close()
            with pytest.raises(RuntimeError, match="closed"):
                session.generate()


@pytest.mark.parametrize(
    "options", [{"kind": "steps"}, {"kind": "rolling"}, {"batched": False, "kind": "clean", "recache_every": 5}]
)
def test_memory_is_flat(options: dict) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(item.nbytes for item in gc.get_objects() if type(item) is torch.Tensor)

    with rollout(steps=2) as model:
        session = model.open("x", sinks=1, evict_below=0.3, **options)
        running = session.run(None)
        for _ in range(10):
            next(running)
        held, everything = session.nbytes, tensors()
        for _ in range(60):
            next(running)
        assert session.nbytes == held
        assert tensors() - everything <= 4096


def test_ledger_counts_deadlines_and_jitter_of_chunks() -> None:
    clock = VirtualClock()
    with rollout(steps=2, batched=False) as model:
        session = model.open("x", fps=4.0, target_ms=500, clock=clock)
        wait = itertools.cycle([0.4, 1.2])
        model.pipe.transformer.register_forward_hook(lambda *_: clock.advance(next(wait) / 2))
        cost = []
        for chunk in session.run(None, 6):
            cost.append(sum(chunk.stages.values()))
        summary = session.ledger.summary()
    assert cost == pytest.approx([800] * 6)
    assert summary["chunks"] == 6 and summary["first_frame_ms"] == pytest.approx(800)
    assert summary["deadline"] == {"target_ms": 500, "missed": 21, "rate": 1.0}
    assert summary["chunk_ms"] == pytest.approx(800) and summary["jitter_ms_p95"] == pytest.approx(0, abs=1e-6)
    assert summary["late_frames"] == 3 + 2 + 1  # frame j is due j / 4 s after the first, chunk n comes 0.8 n s after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"noise": "pink"}, "'fresh', 'fixed', 'warped'"),
        ({"sampler": "heun"}, "'renoise', 'euler'"),
        ({"sigmas": (0.5, 0.7), "steps": 2}, "2 falling levels"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"kind": "clean"}, "batched=False"),
        ({"chunk": 9}, "chunks of 9 latent frames"),
        ({"strength": "0.5"}, "strength='0.5'"),
        ({"sigmas": 0.5, "steps": 1}, "1 falling levels"),
        ({"batched": "no"}, "batched='no' must be True or False"),
        ({"negative_prompt": None}, "negative_prompt=None must be a text"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": "16"}, "fps='16'"),
        ({"target_ms": -3}, "target_ms=-3"),
        ({"sinks": 4}, "sinks=4"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(options: dict, message: str) -> None:
    with rollout() as model, pytest.raises(ValueError, match=message):
        model("x", **options)


def test_names_that_are_no_setting_and_pipelines_without_video_are_refused() -> None:
    with rollout() as model:
        with pytest.raises(TypeError, match="speed is no setting"):
            model("x", speed=3)
        with pytest.raises(TypeError, match="frames cannot be changed live"):
            model.open("x").update(frames=3)
        with pytest.raises(ValueError, match="keeps their number"):
            model.open("x").update(prompts=("a", "b"))
        with pytest.raises(Unsupported, match="already"):
            ChunkRollout(model.pipe, height=SIZE, width=SIZE)
        with pytest.raises(ValueError, match="go by control frames"):
            next(model("x", noise="warped"))
    with pytest.raises(Unsupported, match="no WanTransformer3DModel"):
        ChunkRollout(family("flux"))
    for height, width in ((0, SIZE), (SIZE, 0)):
        with pytest.raises(ValueError, match="8 to 8192 pixels, got 0"):
            ChunkRollout(TinyPipe(), height=height, width=width)


def test_a_closed_rollout_and_a_closed_session_say_so_and_hold_nothing() -> None:
    model = rollout()
    session, other = model.open("x"), model.open("x")
    session.generate()
    cache = weakref.ref(session._memory.cache)
    assert session.nbytes > 0
    session.close()
    gc.collect()
    assert session.nbytes == 0 and cache() is None
    with pytest.raises(RuntimeError, match="this rollout is closed"):
        session.restart()
    model.close()
    with pytest.raises(RuntimeError, match="the rollout of this session is closed"):
        other.generate()
    other.close()
