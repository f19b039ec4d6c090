"""What was measured, on what, and when: the one JSON every command and benchmark writes.

``{"name", "created", "commit", "machine": {cpu, threads, load, gpu, torch, diffusers}, "rows": [{"method",
"ms_median", "ms_p95", "ratio", "nfe", "peak_bytes", "quality": {metric: {"value", "low", "high", "n"}}, "note"}]}``
where `ratio` says how many times faster a row is than the first one, and None stands for what was not measured.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from fastdiff_app.outputs import write_json

if TYPE_CHECKING:
    from fastdiff.quality import Interval


@dataclass
class Row:
    """One method of a comparison. A row that could not run has only its `method` and the reason in `note`."""

    method: str
    ms_median: float | None = None
    ms_p95: float | None = None
    ratio: float | None = None
    nfe: int | None = None
    peak_bytes: int | None = None
    quality: "dict[str, Interval]" = field(default_factory=dict)
    note: str = ""

    @classmethod
    def timed(cls, method: str, milliseconds: Sequence[float], **others: Any) -> Self:
        """A row from single measurements in milliseconds."""
        return cls(method, median(milliseconds), percentile(milliseconds, 95), **others)


@dataclass
class Record:
    """A named set of rows with the machine they were measured on."""

    name: str
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    commit: str | None = field(default_factory=lambda: commit())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def row(self, method: str) -> Row:
        """The row of this method; KeyError where there is none."""
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(method)

    def finish(self) -> Self:
        """Fills in the ratios that are still open and the machine's load now, after the measurements."""
        first = self.rows[0].ms_median if self.rows else None
        for row in self.rows:
            if row.ratio is None and first and row.ms_median:
                row.ratio = first / row.ms_median
        self.machine["load_after"] = load()
        return self

    def save(self, path: Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The JSON's content, in the documented order of keys."""
        return {
            "name": self.name,
            "created": self.created,
            "commit": self.commit,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        from fastdiff.quality import Interval

        found = json.loads(path.read_text("utf-8"))
        rows = [
            Row(**{**row, "quality": {name: Interval(**value) for name, value in row["quality"].items()}})
            for row in found["rows"]
        ]
        return cls(found["name"], rows, found["machine"], found["commit"], found["created"])


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of `values` lie, by linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def load() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """This machine in words and numbers, without its name or any path."""
    import diffusers
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" behind it where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
