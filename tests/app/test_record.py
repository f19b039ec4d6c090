"""The record of measurements: its figures, its keys and its trip through a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastdiff.quality import Interval
from fastdiff_app.console import number, table
from fastdiff_app.record import Record, Row, percentile


def test_percentile_is_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=17))
    for percent in (0, 5, 50, 95, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_ratio_says_how_many_times_faster_than_the_first_row() -> None:
    record = Record(
        "example", [Row.timed("slow", [30.0, 10.0, 20.0]), Row.timed("fast", [5.0]), Row("absent", note="x")]
    )
    record.finish()
    assert [row.ratio for row in record.rows] == [1.0, 4.0, None]
    assert record.row("slow").ms_median == 20.0
    with pytest.raises(KeyError):
        record.row("missing")


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    row = Row.timed("one", [1.0, 2.0], nfe=4, peak_bytes=7, quality={"colour": Interval(0.5, 0.25, 0.75, 8)}, note="n")
    record = Record("example", [row, Row("two", note="not installed")]).finish()
    path = tmp_path / "r.json"
    record.save(path)
    assert Record.read(path) == record
    found = json.loads(path.read_text())
    assert list(found) == ["name", "created", "commit", "machine", "rows"]
    assert {"cpu", "threads", "load", "gpu", "torch", "diffusers"} <= set(found["machine"])
    assert list(found["rows"][0]) == ["method", "ms_median", "ms_p95", "ratio", "nfe", "peak_bytes", "quality", "note"]
    assert found["rows"][0]["quality"] == {"colour": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}}


def test_a_table_has_a_line_for_every_row_and_a_column_for_every_figure() -> None:
    rows = [Row.timed("one", [2.0], quality={"colour": Interval.exact(1)}), Row("two", note="not installed")]
    console = Console(width=80)
    with console.capture() as printed:
        console.print(table(Record("example", rows).finish()))
    heading, *lines = [line for line in printed.get().splitlines() if line.strip(" ─")]
    assert heading.split() == ["method", "ms", "times", "faster", "colour"]
    assert [line.split() for line in lines] == [["one", "2.0", "1.00", "1"], ["two"], ["two:", "not", "installed"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (0.98765, "0.988"), (12.34, "12.3"), (1e-7, "1.0e-07"), (123456, "123456"), (-3e-18, "0")],
)
def test_numbers_have_the_digits_one_reads(value: float, text: str) -> None:
    assert number(value) == text
