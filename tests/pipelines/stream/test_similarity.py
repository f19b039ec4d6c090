"""The similarity filter: its chance, its measure, and what a stream does with a skipped frame."""

import numpy as np
import pytest
import torch

from fastdiff_pipelines import Similarity, Stream
from fastdiff_pipelines.similarity import SimilarityFilter, similarity, summary


def scene(seed=0, size=64, low=0.0, high=255.0):
    """A smooth random scene, float [size, size, 3] in 0..255."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[0]
    return (low + (high - low) * smooth.permute(1, 2, 0)).numpy()


def frame(values):
    return torch.from_numpy(np.clip(np.round(values), 0, 255).astype(np.uint8))


def alike(one, other):
    return similarity(summary(frame(one)), summary(frame(other)))


def test_the_chance_is_linear_above_the_threshold():
    settings = Similarity(threshold=0.9)
    assert [settings.chance(c) for c in (-1.0, 0.5, 0.9, 1.0)] == [0.0, 0.0, 0.0, 1.0]
    assert settings.chance(0.95) == pytest.approx(0.5) and settings.chance(0.925) == pytest.approx(0.25)
    assert Similarity(threshold=1.0).chance(1.0) == 0.0


@pytest.mark.parametrize("most", [0, 1, 3, 10])
def test_equal_frames_are_processed_once_in_every_most_plus_one(most):
    filter = SimilarityFilter(Similarity(0.98, most))
    decisions = [filter.skips(frame(scene())) for _ in range(5 * (most + 1))]
    assert decisions == ([False] + [True] * most) * 5


def test_a_frame_processed_by_chance_starts_the_count_again():
    """The published filter counts on, so a forced frame may follow a processed one."""
    filter = SimilarityFilter(Similarity(0.98, 3))
    still, other = frame(scene()), frame(scene(1))
    assert [filter.skips(f) for f in (still, still, still)] == [False, True, True]
    assert not filter.skips(other)
    assert [filter.skips(other) for _ in range(4)] == [True, True, True, False]


def test_the_duty_has_its_closed_form(monkeypatch):
    """At a chance p of skipping and m skips at most, a processed frame comes every (1 - p^(m+1)) / (1 - p)."""
    monkeypatch.setattr("fastdiff_pipelines.similarity.similarity", lambda kept, cells: 0.9)
    filter, count = SimilarityFilter(Similarity(0.0, 10, seed=1)), 20000
    cells = frame(scene(size=16))
    processed = sum(not filter.skips(cells) for _ in range(count))
    duty = (1 - 0.9) / (1 - 0.9**11)
    assert processed / count == pytest.approx(duty, abs=4 * (duty * (1 - duty) / count) ** 0.5)


def test_draws_are_seeded():
    def decisions(seed):
        filter = SimilarityFilter(Similarity(2 * near - 1, 100, seed))  # a chance of a half
        return [filter.skips(two[k % 2]) for k in range(60)]

    two = [frame(scene()), frame(scene() + 60 * (scene(1) / 255 - 0.5))]
    near = similarity(summary(two[0]), summary(two[1]))
    assert decisions(0) == decisions(0) != decisions(1)
    assert 10 < sum(decisions(0)) < 50


def test_a_threshold_of_one_never_skips():
    filter = SimilarityFilter(Similarity(1.0))
    assert not any(filter.skips(frame(scene())) for _ in range(5))


def test_brightness_does_not_matter_and_content_does():
    dark = scene(low=40, high=90)
    assert alike(dark, dark + 100) == pytest.approx(1.0, abs=1e-3)
    panned = np.roll(scene(low=0, high=38), 20, axis=1)  # 15 % brightness: plain cosine calls this the same frame
    assert alike(scene(low=0, high=38), panned) < 0.7
    bright = np.roll(scene(low=200, high=255), 20, axis=1)
    assert alike(scene(low=200, high=255), bright) < 0.7


def test_sensor_noise_is_not_motion_and_a_small_thing_is():
    grey = np.full((64, 64, 3), 128.0)
    rng = np.random.default_rng(0)
    noisy = [grey + rng.normal(0, 1.3, grey.shape) for _ in range(2)]
    assert alike(*noisy) > 0.99
    moved = scene().copy()
    moved[8:20, 8:20] = 255 - moved[8:20, 8:20]  # 3.5 % of the picture
    assert alike(scene(), moved) < 0.98


def test_floats_and_bytes_are_summarised_alike():
    values = frame(scene())
    floats = values.permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(summary(values), summary(floats), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("buffer", [1, 2])
def test_skipped_frames_repeat_and_flying_ones_drain(make_toy, clip, toy_size, buffer):
    pipe = make_toy()
    stream = Stream(pipe, "red", steps=3, frame_buffer=buffer, similarity=Similarity(0.98, 100), **toy_size)
    frames = [clip[0], clip[1], *[clip[2]] * 6]
    found = [output for one in frames for output in stream.push(one)]
    assert stream.in_flight == 0, "a still scene leaves nothing behind in the stream"
    assert [output.frame_id for output in found] == list(range(8))
    assert [output.repeated for output in found] == [False] * 3 + [True] * 5
    plain = list(Stream(make_toy(), "red", steps=3, **toy_size).run(clip[:3]))
    for output in found:
        assert torch.equal(output.pixels, plain[min(output.frame_id, 2)].pixels)
    report = stream.report()
    assert report.frames_repeated == 5 and report.rows_computed == 9
    idle = len(pipe.unet.batches)
    stream.push(clip[2])
    assert len(pipe.unet.batches) == idle, "an idle stream computes nothing"


def test_motion_after_a_rest_shows_no_old_frame(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=3, similarity=0.98, **toy_size)
    found = [output for one in [clip[0]] * 5 + [clip[1]] * 5 for output in stream.push(one)] + stream.flush()
    assert [output.frame_id for output in found] == list(range(10))
    plain = list(Stream(make_toy(), "red", steps=3, **toy_size).run(clip[:2]))
    assert all(torch.equal(output.pixels, plain[output.frame_id // 5].pixels) for output in found)


def test_an_update_makes_a_still_scene_new(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=1, similarity=0.98, **toy_size)
    assert [stream.push(clip[0])[0].repeated for _ in range(3)] == [False, True, True]
    stream.update(prompt="blue")
    (output,) = stream.push(clip[0])
    assert not output.repeated and output.settings.prompt == "blue"


@pytest.mark.parametrize(
    "bad", [{"threshold": -0.1}, {"threshold": float("nan")}, {"most_skips": -1}, {"most_skips": 1.5}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"threshold|most_skips"):
        Similarity(**bad)
