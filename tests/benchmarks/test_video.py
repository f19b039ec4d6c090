"""`bench video` and `bench moving` run end to end on an untrained model, and say what they cannot know."""

import pytest

from benchmarks import moving, video
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
    monkeypatch.setattr(video, "_embedded", lambda: (pipe, "random weights"))
    monkeypatch.setattr(video, "_timed", lambda pipe, chunks: [video.Row("fastdiff", 1.0)])
    record = video.run()
    assert [row.note for row in record.rows] == ["random weights"] * 7
    assert all(not row.quality for row in record.rows[1:])


def test_moving_has_its_rows(pipe, monkeypatch):
    monkeypatch.setattr(moving, "STEPS", 2)
    record = moving.run(prompts=3, batch=2, pipe=pipe)
    assert [row.method for row in record.rows] == ["renders", "autoencoder", "mini-wan", "rollout", "shuffled"]
    assert record.row("renders").quality["shape"].value == 1.0
    assert "psnr" in record.row("autoencoder").quality
    for row in record.rows:
        assert {"direction", "track_error_px", "permanence", "flicker"} <= set(row.quality)
