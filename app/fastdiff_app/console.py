"""What the user sees while something runs: progress on stderr, results on stdout."""

import sys

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastdiff_app.record import Record

# tables piped into a file or a log are not folded
WIDE = 200
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = Console(highlight=False, soft_wrap=True, stderr=True)


class _Rate(ProgressColumn):
    """Finished pieces per second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}")


def progress(unit: str = "fps") -> Progress:
    """A bar with count, rate and remaining time; where stderr is no terminal, only its last state is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=err,
        transient=not err.is_terminal,
    )


SHORT = {"first_frame_ms": "first ms", "max_abs_difference": "max diff"}


def table(record: Record) -> Group:
    """The rows of a record with every figure they hold, and their notes beneath."""
    shown = dict.fromkeys(name for row in record.rows for name in row.quality)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("method", no_wrap=True)
    for heading in ("ms", "times faster", *(SHORT.get(name, name.replace("_", " ")) for name in shown)):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in record.rows:
        grid.add_row(
            row.method,
            "" if row.ms_median is None else f"{row.ms_median:.1f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            *(number(row.quality[name].value) if name in row.quality else "" for name in shown),
        )
    notes = [Text(f"{row.method}: {row.note}") for row in record.rows if row.note]
    return Group(grid, *notes)


def number(value: float) -> str:
    """A figure with as many digits as one reads; what float64's rounding leaves of nothing is 0."""
    if abs(value) < 1e-15:
        return "0"
    if 0.001 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:.0f}"
