"""What goes wrong is said once and clearly, and the stream goes on."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.miniature.families import family
from fastdiff_pipelines import LatestFrame, NotFinite, SequentialStream, Stream


def pixels(outputs):
    return torch.stack([output.pixels for output in outputs])


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.zeros((16, 8, 3), np.uint8), ValueError, r"must be \[16, 16, 3\] for this stream, got \[16, 8, 3\]"),
        (np.zeros((16, 16), np.uint8), ValueError, r"must be \[16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.float32), ValueError, r"must be \[3, 16, 16\]"),
        (np.zeros((16, 16, 3), np.int32), TypeError, "uint8"),
        (np.full((3, 16, 16), np.nan), ValueError, "be finite"),
        (np.full((3, 16, 16), 255.0), ValueError, r"must lie in \[-1, 1\]"),
        (object(), TypeError, "got object"),
        (None, ValueError, "needs strength=1.0"),
    ],
)
def test_a_bad_frame_changes_nothing(make_toy, clip, toy_size, frame, error, message):
    stream = Stream(make_toy(), "red", noise="fresh", **toy_size)
    found = stream.push(clip[0])
    with pytest.raises(error, match=message):
        stream.push(frame)
    found += [*stream.push(clip[1]), *stream.flush()]
    plain = Stream(make_toy(), "red", noise="fresh", **toy_size)
    assert torch.equal(pixels(found), pixels(plain.run(clip[:2])))


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=0),
        dict(steps=True),
        dict(strength=1.5),
        dict(frame_buffer=0),
        dict(capacity=0),
        dict(guidance="most"),
        dict(noise="none"),
        dict(height=4),
        dict(timesteps=[]),
        dict(timesteps=[2000]),
        dict(blend=2),
        dict(similarity=-1),
    ],
    ids=str,
)
def test_absurd_settings_are_refused(make_toy, toy_size, options):
    with pytest.raises(ValueError, match="must"):
        Stream(make_toy(), "red", **{**toy_size, **options})


def test_self_guidance_needs_a_frame(make_toy, toy_size):
    stream = Stream(make_toy(), "red", strength=1.0, guidance="self", guidance_scale=1.4, **toy_size)
    with pytest.raises(ValueError, match='choose "onetime"'):
        stream.push(None)


def _poisoned(clip):
    """A network that answers NaN for rows made from the second frame, told by its noise-free bias."""

    def network(x, told, words):
        return torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 50, float("nan"), torch.tanh(x))

    return network


def test_nan_loses_its_own_frame_only(make_toy, clip, toy_size):
    pipe = make_toy("epsilon", _poisoned(clip))
    stream = Stream(pipe, "red", steps=3, frame_buffer=2, **toy_size)
    frames = list(clip[:6])
    encode = pipe.vae.encode
    seen = []

    def poison(images):
        encoded = encode(images)
        for i in range(len(images)):
            seen.append(1)
            if len(seen) == 2:
                encoded.latents[i] += 1000
        return encoded

    pipe.vae.encode = poison
    found, failures = [], []
    for frame in frames:
        try:
            found += stream.push(frame)
        except NotFinite as error:
            failures.append(str(error))
    found += stream.flush()
    assert len(failures) == 1 and "denoiser produced NaN or infinity for frame 1" in failures[0]
    assert [output.frame_id for output in found] == [0, 2, 3, 4, 5]
    plain = list(Stream(make_toy("epsilon", _poisoned(clip)), "red", steps=3, **toy_size).run(frames))
    for output in found:
        torch.testing.assert_close(output.pixels, plain[output.frame_id].pixels, rtol=1e-12, atol=1e-12)
    report = stream.report()
    assert (report.frames_in, report.frames_out, report.frames_lost, report.frames_in_flight) == (6, 5, 1, 0)


def test_nan_from_the_autoencoder_is_told_apart(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=1, **toy_size)
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, return_dict=True: (decode(latents)[0] * float("nan"),)
    with pytest.raises(NotFinite, match="autoencoder produced NaN for frame 0 from finite latents"):
        stream.push(clip[0])
    pipe.vae.decode = decode
    assert stream.push(clip[1])[0].frame_id == 1
    with pytest.raises(NotFinite):
        SequentialStream(make_toy("epsilon", lambda x, t, words: x / 0), "red", **toy_size).push(clip[0])


@pytest.mark.parametrize("part", ["unet", "encode", "decode"])
def test_a_model_that_raises_leaves_the_others_in_flight(make_toy, clip, toy_size, part):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=3, noise="fresh", **toy_size)
    found = [output for frame in clip[:4] for output in stream.push(frame)]
    owner, name = (pipe.unet, "forward") if part == "unet" else (pipe.vae, part)
    working = getattr(owner, name)

    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    setattr(owner, name, broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.push(clip[4])
    setattr(owner, name, working)
    found += [output for frame in clip[5:8] for output in stream.push(frame)] + stream.flush()
    lost = 2 if part == "decode" else 4  # the one it was decoding, or the one that was entering
    assert [output.frame_id for output in found] == [k for k in range(8) if k != lost]
    plain = list(Stream(make_toy(), "red", steps=3, noise="fresh", **toy_size).run(clip[:8]))
    for output in found:
        torch.testing.assert_close(output.pixels, plain[output.frame_id].pixels, rtol=1e-12, atol=1e-12)
    assert stream.report().frames_lost == 1


def test_a_step_cache_cannot_serve_a_stream():
    pipe = family("flux")
    with (
        fastdiff.accelerate(pipe, fastdiff.Plan((DiffusersCache("first_block"),))),
        pytest.raises(fastdiff.Unsupported, match="every call of a stream holds other frames"),
    ):
        Stream(pipe, "a red circle", sampler="euler", height=64, width=64)


def test_a_stream_over_an_accelerated_pipeline(clip):
    """The stream calls the pipeline's modules as they are, before, under and after a plan."""
    from PIL import Image

    frames = [Image.fromarray(frame).resize((64, 64)) for frame in clip[:3]]
    pipe = family("sdxl")

    def run():
        return pixels(Stream(pipe, "a red circle", steps=2, height=64, width=64).run(frames))

    plain = run()
    with fastdiff.accelerate(pipe, fastdiff.Plan.preset("exact")) as handle:
        torch.testing.assert_close(run(), plain, rtol=0, atol=1e-5)
        assert len(handle.report().rows) > 0
    assert torch.equal(run(), plain)


def test_latest_wins():
    source = LatestFrame()
    for k in range(5):
        source.put(k)
    taken = source.get(timeout=1)
    assert taken is not None and (taken.frame_id, taken.frame) == (4, 4)
    with pytest.raises(TimeoutError):
        source.get(timeout=0)
    source.put("a", frame_id="x", captured=2.5)
    source.close()
    taken = list(source)
    assert [(one.frame_id, one.frame, one.captured) for one in taken] == [("x", "a", 2.5)]
    assert source.put_count == source.taken_count + source.dropped_count == 6
    with pytest.raises(RuntimeError, match="closed"):
        source.put("b")


def test_latest_wins_across_threads(make_toy, clip, toy_size):
    """Whatever the timing: order is kept, and every frame is taken or dropped."""
    import threading

    source, stream = LatestFrame(), Stream(make_toy(), "red", steps=2, **toy_size)

    def camera():
        for k in range(60):
            source.put(clip[k % 10], frame_id=k)
        source.close()

    thread = threading.Thread(target=camera)
    thread.start()
    found = [output for one in source for output in stream.push(one.frame, one.frame_id, one.captured)]
    found += stream.flush()
    thread.join()
    ids = [output.frame_id for output in found]
    assert ids == sorted(set(ids)) and ids[-1] == 59
    assert len(ids) + source.dropped_count == 60
    assert all((output.timings.age_ms or 0) >= output.timings.latency_ms for output in found)
