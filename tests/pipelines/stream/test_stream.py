"""The stream against one frame at a time, in float64 on a toy network."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff_pipelines import SequentialStream, Stream

exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

GUIDANCE = [("none", 1.0, 1.0), ("full", 2.5, 1.0), ("self", 1.4, 0.7), ("onetime", 1.4, 0.7), ("onetime", 1.4, 1.0)]
SAMPLERS = [
    ("epsilon", "lcm"),
    ("epsilon", "tcd"),
    ("v_prediction", "ddim"),
    ("v_prediction", "dpm"),
    ("sample", "lcm"),
    ("flow_prediction", "euler"),
    ("flow_prediction", "lcm"),
]


def pixels(outputs):
    return torch.stack([output.pixels for output in outputs])


def assert_same(stream, reference, frames):
    found, expected = list(stream.run(frames)), list(reference.run(frames))
    assert [output.frame_id for output in found] == list(range(len(frames)))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        exactly(one.pixels, other.pixels)


@pytest.mark.parametrize(("guidance", "scale", "delta"), GUIDANCE)
@pytest.mark.parametrize(("prediction", "sampler"), SAMPLERS)
def test_every_frame_is_what_it_would_be_alone(make_toy, clip, toy_size, prediction, sampler, guidance, scale, delta):
    options: dict[str, Any] = dict(
        sampler=sampler, guidance=guidance, guidance_scale=scale, delta=delta, strength=0.7, negative_prompt="grey"
    )
    stream = Stream(make_toy(prediction), "red", **options, **toy_size)
    assert_same(stream, SequentialStream(make_toy(prediction), "red", **options, **toy_size), clip[:6])


@pytest.mark.parametrize("noise", ["fixed", "fresh", "blended"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("buffer", [1, 2, 3])
def test_buffers_steps_and_noises(make_toy, clip, toy_size, buffer, steps, noise):
    options: dict[str, Any] = dict(steps=steps, noise=noise, strength=0.8, seed=5)
    stream = Stream(make_toy(), "red", frame_buffer=buffer, **options, **toy_size)
    assert_same(stream, SequentialStream(make_toy(), "red", **options, **toy_size), clip[:7])


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("buffer", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("guidance", ["none", "onetime"])
def test_as_many_out_as_in(make_toy, clip, toy_size, count, buffer, pad, guidance):
    options: dict[str, Any] = dict(steps=3, guidance=guidance, guidance_scale=1.0 if guidance == "none" else 2.0)
    pipe = make_toy()
    stream = Stream(pipe, "red", frame_buffer=buffer, pad=pad, **options, **toy_size)
    assert_same(stream, SequentialStream(make_toy(), "red", **options, **toy_size), clip[:count])
    report = stream.report()
    assert report.frames_in == report.frames_out == count and report.frames_in_flight == 0
    negatives = count if guidance == "onetime" else 0
    assert report.rows_computed == 3 * count + negatives
    assert report.rows_computed + report.rows_padded == sum(pipe.unet.batches)
    if pad:
        assert set(pipe.unet.batches) <= {3 * buffer + (buffer if guidance == "onetime" else 0)}
    else:
        assert report.rows_padded == 0


def test_a_running_stream_makes_one_call_per_frame(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=4, **toy_size)
    counts = [len(stream.push(frame)) for frame in clip[:8]]
    assert counts == [0, 0, 0, 1, 1, 1, 1, 1]
    assert pipe.unet.batches == [1, 2, 3, 4, 4, 4, 4, 4]
    assert [output.frame_id for output in stream.flush()] == [5, 6, 7]
    assert pipe.unet.batches[8:] == [3, 2, 1]
    assert stream.flush() == [] and len(pipe.unet.batches) == 11


@pytest.mark.parametrize(("guidance", "rows"), [("none", 3), ("self", 3), ("onetime", 4), ("full", 6)])
def test_rows_per_call_by_guidance(make_toy, clip, toy_size, guidance, rows):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=3, guidance=guidance, guidance_scale=1.5, **toy_size)
    for frame in clip[:5]:
        stream.push(frame)
    assert pipe.unet.batches[-1] == rows
    stream.update(prompt="blue", negative_prompt="dark")
    for frame in clip[5:]:
        stream.push(frame)
    assert pipe.unet.batches[-1] == rows


def test_rows_do_not_leak(make_toy, clip, toy_size):
    options: dict[str, Any] = dict(guidance="onetime", guidance_scale=1.5, steps=4, noise="fresh")
    one = list(Stream(make_toy(), "red", **options, **toy_size).run(clip))
    other = list(clip)
    other[5] = 255 - clip[5]
    two = list(Stream(make_toy(), "red", **options, **toy_size).run(other))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.pixels, b.pixels) == (a.frame_id != 5)


def test_two_streams_on_one_pipeline_do_not_meet(make_toy, clip, toy_size):
    pipe = make_toy()
    settings: list[dict[str, Any]] = [
        dict(prompt="red", steps=3),
        dict(prompt="blue", steps=2, noise="fresh", guidance="none"),
    ]
    alone = [list(Stream(make_toy(), **each, **toy_size).run(clip)) for each in settings]
    streams = [Stream(pipe, **each, **toy_size) for each in settings]
    found: list[list[Any]] = [[], []]
    for frame in clip:
        for outputs, stream in zip(found, streams, strict=True):
            outputs += stream.push(frame)
    for outputs, stream, expected in zip(found, streams, alone, strict=True):
        outputs += stream.flush()
        assert torch.equal(pixels(outputs), pixels(expected))


def test_a_still_scene_gives_a_still_picture(make_toy, clip, toy_size):
    still = list(Stream(make_toy(), "red", **toy_size).run([clip[0]] * 6))
    assert all(torch.equal(output.pixels, still[0].pixels) for output in still)
    reseeded = list(Stream(make_toy(), "red", seed=1, **toy_size).run([clip[0]]))
    assert not torch.equal(reseeded[0].pixels, still[0].pixels)
    restless = list(Stream(make_toy(), "red", noise="fresh", **toy_size).run([clip[0]] * 6))
    assert not torch.equal(restless[0].pixels, restless[1].pixels)


def test_blended_noise_has_two_ends(make_toy, clip, toy_size):
    def run(**options):
        return pixels(Stream(make_toy(), "red", steps=2, **options, **toy_size).run(clip[:3]))

    exactly(run(noise="blended", blend=0.0), run(noise="fixed"))
    exactly(run(noise="blended", blend=1.0), run(noise="fresh"))


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "lcm"), ("flow_prediction", "euler")])
@pytest.mark.parametrize("guidance", ["none", "full", "onetime"])
def test_text_to_image_streams(make_toy, toy_size, prediction, sampler, guidance):
    options: dict[str, Any] = dict(sampler=sampler, strength=1.0, noise="fresh", guidance=guidance, guidance_scale=1.5)
    stream = Stream(make_toy(prediction), "red", **options, **toy_size)
    assert_same(stream, SequentialStream(make_toy(prediction), "red", **options, **toy_size), [None] * 6)


def test_frames_in_any_layout_are_the_same_frame(make_toy, clip, toy_size):
    from PIL import Image

    stream = Stream(make_toy(), "red", steps=1, **toy_size)
    array = clip[0]
    floats = torch.from_numpy(array).permute(2, 0, 1).double() / 127.5 - 1
    layouts = [array, torch.from_numpy(array), Image.fromarray(array), floats, np.asfortranarray(array)]
    found = pixels(stream.run(layouts))
    exactly(found, found[:1].expand_as(found))


def test_an_output_says_what_it_is(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=2, **toy_size)
    outputs = stream.push(clip[0], frame_id="a", captured=1.0) + stream.push(clip[1], "b") + stream.flush()
    assert [output.frame_id for output in outputs] == ["a", "b"]
    first = outputs[0]
    assert first.pixels.shape == (3, 16, 16) and first.pixels.min() >= 0 and first.pixels.max() <= 1
    assert first.image.shape == (16, 16, 3) and first.image.dtype == np.uint8
    assert np.array_equal(first.image, (first.pixels.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8))
    assert first.settings.prompt == "red" and not first.repeated
    timings = first.timings
    assert timings.captured == 1.0 and outputs[1].timings.age_ms is None
    assert timings.pushed <= timings.entered <= timings.finished
    assert timings.age_ms == pytest.approx((timings.finished - 1.0) * 1000)


def test_warming_up_leaves_no_trace(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=3, noise="fresh", frame_buffer=2, **toy_size)
    stream.warmup()
    assert pipe.unet.batches == [6]
    report = stream.report()
    assert report.denoiser_calls == report.rows_computed == report.frames_in == report.encodes == 0
    options: dict[str, Any] = dict(steps=3, noise="fresh")
    assert_same(stream, SequentialStream(make_toy(), "red", **options, **toy_size), clip[:5])


def test_clearing_begins_again(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=3, noise="fresh", **toy_size)
    before = list(stream.run(clip[:4]))
    stream.push(clip[5])
    stream.clear()
    assert stream.in_flight == 0 and stream.flush() == []
    assert torch.equal(pixels(stream.run(clip[:4])), pixels(before))
    assert stream.report().frames_lost == 1


def test_a_run_left_early_can_be_flushed(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=3, **toy_size)
    for output in stream.run(clip):
        assert output.frame_id == 0
        break
    assert [output.frame_id for output in stream.flush()] == [1, 2]
