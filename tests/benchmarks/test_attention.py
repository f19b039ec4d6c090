"""`bench attention` on shrunken sizes: its rows are there, and a method that keeps everything changes nothing."""

from typing import Any

import pytest
import torch

from benchmarks import attention, gpu
from fastdiff.miniature import untrained


@pytest.mark.slow
def test_rows_are_there_and_keeping_all_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    pipe: Any = untrained(0)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(attention, "SIZE", 64)
    monkeypatch.setattr(attention, "STEPS", 4)
    monkeypatch.setattr(attention, "PERCENTS", (50,))
    monkeypatch.setattr(attention, "TURNS", 1)
    monkeypatch.setattr(attention, "METHODS", {"fastdiff": dict(far="tracked"), "all": dict(far="none", density=0.999)})
    record = attention.run(prompts=1, tokens=(600,), pipe=pipe)
    speed = [f"{way}-600-{dtype}" for dtype in ("fp32", "bf16") for way in ("sdpa", "sparse-50")]
    quality = ["dense-quality", "fastdiff-quality-50", "all-quality-50", "sla-quality-50"]
    assert [row.method for row in record.rows] == speed + quality
    assert record.row("all-quality-50").quality["relative_l1"].value < 1e-4
    assert record.row("fastdiff-quality-50").quality["relative_l1"].value > 1e-4
    assert 0.5 < record.row("fastdiff-quality-50").quality["density"].value < 1


@torch.no_grad()
def test_sparse_is_dense_when_all_blocks_are_chosen():
    q, k, v = torch.randn(3, 1, 2, 700, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention.sparse(q, k, v, 1.0), expected, rtol=0, atol=1e-5)


def test_kernel_suite_runs_on_a_shrunken_shape():
    record = gpu.run(only="attention", shrunken=True)
    assert [row.note for row in record.rows] == [""] * len(record.rows)
    assert [row.method for row in record.rows][:5] == [
        f"small {way}" for way in ("sdpa", "exact", "int8", "int8_fp8", "pre-pass")
    ]
    assert len(record.rows) == 5 + 2 * len(attention.PERCENTS)
    assert all(row.quality["bit_stable"].value == 1 for row in record.rows)
