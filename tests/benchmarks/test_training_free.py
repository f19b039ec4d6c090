"""The benchmark of what needs no training: its figures on pictures whose answer is known, and its rows on few."""

from typing import Any

import pytest

from benchmarks import training_free


@pytest.mark.slow
def test_a_warm_stream_computes_fewer_rows(pipe: Any):
    import diffusers

    made: Any = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    rows = {row.method: row for row in training_free.measure_warm_start(1, frames=9, pipe=made)}
    assert rows["cold-stream"].quality["rows_per_frame"].value == 4
    assert rows["warm-stream-still"].quality["rows_per_frame"].value < 4
    assert rows["cold-stream"].quality["psnr"].value == 100
