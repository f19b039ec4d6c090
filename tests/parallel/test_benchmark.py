"""The benchmark's rows are there, and what must be exact is."""

import pytest
import torch

from benchmarks import gpu, parallel
from benchmarks.record import Record
from fastdiff.miniature import untrained
from fastdiff.parallel.patch import PatchParallel


@pytest.mark.slow
def test_strips_of_the_embedded_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def few(ranks: int) -> dict[str, PatchParallel]:
        return {
            f"sync-{ranks}": PatchParallel(),
            f"partial-{ranks}-0.1": PatchParallel("partial", portion=0.1, warmup=2),
        }

    monkeypatch.setattr(parallel, "plans", few)
    record = parallel.run(prompts=1, steps=9, pipe=untrained(), shapes=False)
    assert [row.method for row in record.rows] == ["single", "sync-2", "partial-2-0.1", "sync-4", "partial-4-0.1"]
    for row in record.rows[1:]:
        assert row.quality, row.note
        assert row.quality["psnr"].n == 1
    sync, partial = record.row("sync-4").quality, record.row("partial-4-0.1").quality
    assert sync["max_abs_difference"].value < 1e-3 < partial["max_abs_difference"].value
    assert 0 < partial["bytes"].value < sync["bytes"].value
    record.save(tmp_path / "parallel.json")
    parallel.plot(Record.read(tmp_path / "parallel.json"), tmp_path / "parallel.png")
    assert (tmp_path / "parallel.png").stat().st_size > 1000


def test_strip_efficiency_runs_on_shrunken_shapes():
    rows = list(gpu.SUITES["parallel"](gpu.place(shrunken=True)))
    timed = [row for row in rows if "inefficiency" in row.quality]
    assert any("1/2 of the rows" in row.method for row in timed)
    assert all(row.quality["inefficiency"].value > 0 for row in timed)


def test_a_middle_rank_without_neighbours_does_the_real_work():
    """The stand-in answers with this rank's own rows, so that shapes and operations are those of the real thing."""
    echo = parallel._Echo(4, torch.device("cpu"))
    own = torch.ones(1, 2)
    assert [part.sum() for part in echo.gather("x", own, [(1, 2), (1, 3), (1, 2), (1, 2)]).wait().values()] == [
        2,
        0,
        2,
        2,
    ]
