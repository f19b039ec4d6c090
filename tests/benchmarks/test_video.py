"""`bench video` and `bench moving` run end to end on an untrained model, and say what they cannot know."""

import pytest

from benchmarks import drift, moving, switch, video
from fastdiff.miniature import wan

ROWS = ["whole-clip", "whole-clip-equal", "sequential", "sliding-window", "fastdiff"]


@pytest.fixture(scope="module")
def pipe():
    pipe = wan.untrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_video_has_its_rows(pipe, monkeypatch):
    monkeypatch.setattr(video, "MARKS", (2, 3, 5))
    monkeypatch.setattr(video, "WHOLE_STEPS", 3)
    monkeypatch.setattr(video, "STREAMED", 12)
    record = video.run(pipe=pipe, chunks=40, rollouts=2)
    drifting = [f"{name}-chunk-{mark}" for name in ("fastdiff", "sequential") for mark in (2, 3, 5)]
    assert [row.method for row in record.rows] == [*ROWS, *drifting]
    assert "attribute_difference" in record.row("fastdiff-chunk-5").quality
    for row in record.rows[:5]:
        assert row.ms_median
        assert {"first_frame_ms", "fps"} <= set(row.quality)
    assert {"jitter_ms_p95", "late", "bytes_per_chunk"} <= set(record.row("fastdiff").quality)
    assert record.row("whole-clip").quality["first_frame_ms"].value > (record.row("whole-clip").ms_median or 0)
    assert {"attribute", "track_error_px"} <= set(record.rows[-1].quality)
    assert "attribute_change" in record.rows[-1].quality


def test_without_weights_speed_is_measured_and_quality_is_not(pipe, monkeypatch):
    monkeypatch.setattr(video, "embedded", lambda: (pipe, "random weights"))
    monkeypatch.setattr(video, "_timed", lambda pipe, chunks: [video.Row("fastdiff", 1.0)])
    record = video.run()
    assert [row.note for row in record.rows] == ["random weights"] * 7
    assert all(not row.quality for row in record.rows[1:])


def test_moving_has_its_rows(pipe, monkeypatch):
    monkeypatch.setattr(moving, "STEPS", 2)
    record = moving.run(prompts=3, batch=2, pipe=pipe)
    rolled, moved = ["rollout", "rollout-student"], ["buffer-16", "buffer-4", "buffer-student"]
    assert [row.method for row in record.rows] == ["renders", "autoencoder", "mini-wan", *rolled, *moved, "shuffled"]
    assert record.row("renders").quality["shape"].value == 1.0
    assert "psnr" in record.row("autoencoder").quality
    for row in record.rows:
        if not row.quality:
            assert row.method.endswith("student"), row
            assert "not trained yet" in row.note
            continue
        assert {"direction", "track_error_px", "permanence", "flicker"} <= set(row.quality)


@pytest.mark.slow
def test_drift_has_every_setting_at_every_mark(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(drift, "MARKS", (2, 4, 5))
    record, names = drift.run(pipe=pipe, rollouts=2), [*drift.SETTINGS, drift.CEILING]
    assert [row.method for row in record.rows] == [f"{name}-{mark}" for name in names for mark in (2, 4, 5)]
    for row in record.rows:
        assert ("attribute_change" in row.quality) == (not row.method.endswith("-2"))
        assert 0 <= row.quality["attribute"].value <= 1
    drift.plot(record, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 1000


def test_drift_of_an_untrained_model_is_not_measured(pipe, monkeypatch):
    monkeypatch.setattr(video, "embedded", lambda: (pipe, "random weights"))
    record = drift.run()
    assert {row.note for row in record.rows} == {"random weights"}
    assert not any(row.quality for row in record.rows)


@pytest.mark.slow
def test_a_switch_has_its_rows_and_another_colour(pipe):
    scenes = drift.scenes_of(40)
    for old, new in zip(scenes, switch.recoloured(scenes), strict=True):
        assert new.things[0].colour not in (old.things[0].colour, old.background)
        assert (new.things[0].shape, new.motion) == (old.things[0].shape, old.motion)
    record = switch.run(pipe=pipe, rollouts=2)
    assert [row.method for row in record.rows] == [f"{name}-{n}" for name in switch.SETTINGS for n in switch.AFTER]
    for row in record.rows:
        assert row.quality["new_colour"].value + row.quality["old_colour"].value <= 1
