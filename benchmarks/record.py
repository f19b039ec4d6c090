"""What benchmarks share: the record every command writes (`fastdiff_app.record`), and where results are kept."""

from pathlib import Path

from fastdiff_app.failures import one_line
from fastdiff_app.record import Record, Row, percentile

__all__ = ["RESULTS", "Record", "Row", "could_not_run", "percentile"]

RESULTS = Path(__file__).resolve().parent / "results"


def could_not_run(method: str, reason: BaseException | str) -> Row:
    """The row of a method that gave no result: it stands in the table with the reason."""
    return Row(method, note=reason if isinstance(reason, str) else f"{type(reason).__name__}: {one_line(reason)}")
