"""`bench attention` on shrunken sizes: its rows are there, and a method that keeps everything changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, attention_kernels, attention_quality, gpu, sparse_linear
from benchmarks.record import Record, Row, could_not_run
from fastdiff.attention.linear import load
from fastdiff.miniature import flow, untrained
from fastdiff.quality import Interval


@pytest.mark.slow
def test_rows_are_there_and_keeping_all_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    pipe: Any = untrained(0)
    pipe.set_progress_bar_config(disable=True)
    subject = attention_quality.Subject(pipe, size=64, block=16, trained=128)
    methods = {"plain": dict(far="none"), "fastdiff": dict(far="tracked"), "all": dict(far="none", density=0.999)}
    monkeypatch.setattr(attention_quality, "METHODS", methods)
    monkeypatch.setattr(attention, "mini_sd", lambda pipe: subject)
    monkeypatch.setattr(attention_quality, "PERCENTS", (50,))
    monkeypatch.setattr(attention_quality, "STEPS", 4)
    monkeypatch.setattr(attention, "PERCENTS", (50,))
    monkeypatch.setattr(attention, "TURNS", 1)
    record = attention.run(prompts=1, tokens=(600,), pipe=pipe)
    speed = [f"{way}-600-{dtype}" for dtype in ("fp32", "bf16") for way in ("sdpa", "sparse-50")]
    quality = ["dense-quality", *(f"{method}-quality-50" for method in (*methods, "sla"))]
    small = ["dense-64px-quality", "top-k-64px-quality-90", "sla-64px-quality-90"]
    assert [row.method for row in record.rows] == speed + quality + small
    assert record.row("plain-quality-50").quality["over_plain"].value == 0
    assert record.row("all-quality-50").quality["layer_l1"].value < 1e-4
    assert record.row("all-quality-50").quality["relative_l1"].value < 1e-4
    assert record.row("fastdiff-quality-50").quality["relative_l1"].value > 1e-4
    assert 0.5 < record.row("fastdiff-quality-50").quality["density"].value < 1
    assert not any("TokenOrder" in row.note or "order alone" in row.note for row in record.rows)


def _random_dit() -> Any:
    parts: Any = untrained(0)
    return flow.pipeline(parts.vae, parts.text_encoder, flow.transformer())


def _random_wan() -> Any:
    return pytest.importorskip("fastdiff.miniature.wan").untrained(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending", "make"), [("mini-dit", "-dit", _random_dit), ("mini-wan", "-video", _random_wan)]
)
def test_rows_of_the_other_models_are_there_once_they_ship(
    name: str, ending: str, make: Any, monkeypatch: pytest.MonkeyPatch
):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(attention_quality, "load_pipeline", lambda model, task: pipe)
    monkeypatch.setattr(attention_quality.fastdiff, "load", lambda model: pipe)
    monkeypatch.setattr(attention_quality.miniature, "path", lambda model: Path())
    monkeypatch.setattr(attention_quality, "METHODS", {"plain": dict(far="none"), "fastdiff": dict(far="tracked")})
    monkeypatch.setattr(attention_quality, "PERCENTS", (75,))
    monkeypatch.setattr(attention_quality, "OTHERS", {name: attention_quality.OTHERS[name]})
    monkeypatch.setattr(attention_quality, "STEPS", 4)
    rows = {row.method: row for row in attention_quality.other_rows(1)}
    assert list(rows) == [f"{one}{ending}" for one in ("dense-quality", "plain-quality-75", "fastdiff-quality-75")]
    for method in ("plain", "fastdiff"):
        row = rows[f"{method}-quality-75{ending}"]
        assert not row.note
        assert 0 < row.quality["relative_l1"].value < float("inf")
        assert row.quality["layer_l1"].value > 0
        assert 0.2 < row.quality["density"].value < 1


def test_a_model_that_does_not_ship_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> Path:
        raise FileNotFoundError(name)

    monkeypatch.setattr(attention_quality.miniature, "path", absent)
    rows = list(attention_quality.other_rows(1))
    assert ["mini-dit" in rows[0].note, "mini-wan" in rows[1].note] == [True, True]


@torch.no_grad()
def test_sparse_is_dense_when_all_blocks_are_chosen():
    q, k, v = torch.randn(3, 1, 2, 700, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention.sparse(q, k, v, 1.0), expected, rtol=0, atol=1e-5)


def test_kernel_suite_runs_on_a_shrunken_shape():
    record = gpu.run(only="attention", shrunken=True)
    # other people's kernels are not for CPUs
    missing = {row.method.split()[1] for row in record.rows if row.note}
    assert missing <= {"cudnn", "flash", "sageattention", *(f"flex-sparse-{percent}" for percent in (50, 75, 90))}
    assert [row.method for row in record.rows][:5] == [
        f"small {way}" for way in ("sdpa", "cudnn", "flash", "routed", "exact")
    ]
    assert len(record.rows) == 12 + 3 * len(attention_kernels.PERCENTS)
    assert all(row.quality["bit_stable"].value == 1 for row in record.rows if not row.note)
    assert all(record.row(f"small {way}").quality["relative_l1"].value < 0.15 for way in ("exact", "int8", "int8_fp8"))


def test_weights_of_sparse_linear_attention_are_shipped_for_both_sizes():
    for size, settings in sparse_linear.SETTINGS.items():
        assert load(sparse_linear.weights(size))[0] == settings


def test_the_plot_is_drawn_where_a_method_has_no_figures(tmp_path: Path):
    record = Record("attention")
    for percent in attention.PERCENTS:
        record.rows.append(Row.timed(f"sparse-{percent}-1024-fp32", [1.0, 2.0], ratio=2.0))
        record.rows.append(Row.timed(f"fastdiff-quality-{percent}", [1.0]))
        record.rows[-1].quality |= {"psnr": Interval.exact(30.0), "density": Interval.exact(1 - percent / 100)}
        record.rows.append(could_not_run(f"sla-quality-{percent}", "not trained"))
        record.rows.append(Row.timed(f"fastdiff-quality-{percent}-dit", [1.0]))
        record.rows[-1].quality |= {"psnr": Interval.exact(30.0), "density": Interval.exact(1 - percent / 100)}
    attention.plot(record, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
