"""Warm starts in a stream: fewer rows for frames that show little new, and nothing else changed."""

from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.sampling.warm_start import WarmStart
from fastdiff_pipelines import Stream

SETTINGS: dict[str, Any] = dict(steps=4, strength=0.8)


def _pixels(outputs: list[Any]) -> torch.Tensor:
    return torch.stack([output.pixels for output in outputs])


def test_the_same_frame_again_takes_one_step(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", warm_start=True, **SETTINGS, **toy_size)
    found = list(stream.run([clip[0]] * 4))
    assert stream.report().warm_starts == 0  # they entered before the first was finished
    found += list(stream.run([clip[0]] * 3))
    report = stream.report()
    assert [output.frame_id for output in found] == list(range(7))
    assert (report.warm_starts, report.steps_saved) == (3, 9)
    assert report.rows_computed == 4 * 4 + 3
    assert "3 started warm and left out 9 steps" in str(report)


@pytest.mark.parametrize("sampler", ["lcm", "dpm", "ddim"])
@pytest.mark.parametrize("guidance", ["none", "onetime", "self", "full"])
def test_with_no_tolerance_new_frames_are_exactly_cold(make_toy, clip, toy_size, sampler, guidance):
    settings = dict(SETTINGS, sampler=sampler, guidance=guidance, guidance_scale=1.5)
    cold = Stream(make_toy(), "red", **settings, **toy_size)
    warm = Stream(make_toy(), "red", warm_start=WarmStart(tolerance=0.0), **settings, **toy_size)
    torch.testing.assert_close(_pixels(list(warm.run(clip))), _pixels(list(cold.run(clip))), rtol=0, atol=1e-12)
    assert warm.report().warm_starts == 0


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim", "dpm"])
@pytest.mark.parametrize("guidance", ["none", "onetime", "full"])
def test_a_network_that_knows_the_answer_gives_it_from_a_warm_start_too(make_toy, clip, toy_size, sampler, guidance):
    """Its clean estimate is a function of the prompt alone, so every start must end at the same picture."""

    def network(sample: Any, told: Any, words: Any) -> Any:
        answer = torch.tanh(words.mean(dim=1))[:, :, None, None]
        products = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        products = torch.cumprod(1 - products, 0)[told.long().flatten()].view(-1, 1, 1, 1)
        return (sample - products.sqrt() * answer) / (1 - products).sqrt()

    settings = dict(SETTINGS, sampler=sampler, guidance=guidance, guidance_scale=1.0)
    frames = [clip[0], clip[0], np.roll(clip[0], 1, axis=1), clip[0]]
    cold = Stream(make_toy(network=network), "red", **settings, **toy_size)
    warm = Stream(make_toy(network=network), "red", warm_start=WarmStart(5.0), **settings, **toy_size)
    expected = _pixels([output for frame in frames for output in cold.run([frame])])
    found = _pixels([output for frame in frames for output in warm.run([frame])])
    assert warm.report().warm_starts >= 2
    # TCD stops at timestep 0, where a little of the noise is left
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 if sampler == "tcd" else 5e-3)


def test_after_so_many_warm_frames_comes_a_cold_one(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", warm_start=WarmStart(refresh=2), **SETTINGS, **toy_size)
    rows = []
    for _ in range(7):
        before = stream.report().rows_computed
        list(stream.run([clip[0]]))
        rows.append(stream.report().rows_computed - before)
    assert rows == [4, 1, 1, 4, 1, 1, 4]


def test_new_settings_a_cleared_stream_and_a_frame_from_words_start_cold(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", warm_start=True, **SETTINGS, **toy_size)
    list(stream.run([clip[0]]))
    stream.update(prompt="blue")
    list(stream.run([clip[0]]))
    stream.clear()
    list(stream.run([clip[0]]))
    assert stream.report().warm_starts == 0
    list(stream.run([clip[0]]))
    assert stream.report().warm_starts == 1
    stream.update(warm_start=False)
    list(stream.run([clip[0]]))
    stream.update(warm_start=True, strength=1.0)
    list(stream.run([None, None]))
    assert stream.report().warm_starts == 1


def test_a_padded_stream_keeps_its_shape_and_answers_sooner(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", warm_start=True, pad=True, **SETTINGS, **toy_size)
    list(stream.run([clip[0]]))
    pipe.unet.batches.clear()
    outputs = stream.push(clip[0])
    assert len(outputs) == 1
    assert pipe.unet.batches == [4]


def test_a_lost_frame_is_not_started_from(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", warm_start=True, **SETTINGS, **toy_size)
    broken = pipe.unet.forward
    pipe.unet.forward = lambda sample, *args, **kwargs: (torch.full_like(sample, float("nan")),)
    with pytest.raises(ArithmeticError):
        list(stream.run([clip[0]]))
    pipe.unet.forward = broken
    found = list(stream.run([clip[0]]))
    assert stream.report().warm_starts == 0
    assert torch.isfinite(found[0].pixels).all()
