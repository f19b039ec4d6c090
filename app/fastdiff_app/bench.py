"""`fastdiff bench`: runs a benchmark of the checkout and writes its record."""

import importlib
import sys
from pathlib import Path

from fastdiff_app.console import out, table
from fastdiff_app.failures import ExitCode, Failure, one_line, require_torch
from fastdiff_app.outputs import check_writable

CHECKOUT = Path(__file__).resolve().parents[2]
# modules of benchmarks/ that are not benchmarks themselves
_SUPPORT = (
    "attention_kernels",
    "attention_quality",
    "card",
    "chromium",
    "contenders",
    "embedded",
    "full_size",
    "gpu_cache",
    "kept",
    "more_cards",
    "overview",
    "page",
    "record",
    "readme",
    "slow_line",
    "slowed",
    "sparse_linear",
    "students",
    "viewers",
)


def names() -> list[str]:
    """The benchmarks this checkout has; none where fastdiff is installed without one."""
    folder = CHECKOUT / "benchmarks"
    return sorted(path.stem for path in folder.glob("[a-z]*.py") if path.stem not in _SUPPORT)


def bench(name: str, target: Path | None, full: bool, only: str | None) -> None:
    """Runs one benchmark, prints its table, and writes its JSON where asked."""
    known = names()
    if not known:
        raise Failure(ExitCode.MISSING, "benchmarks need a checkout of fastdiff and its .venv (git clone, make test)")
    if name not in known:
        raise Failure(ExitCode.USAGE, f"no benchmark is called {name!r}; there are {', '.join(known)}")
    require_torch()
    if target:
        check_writable(target, (".json",))
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    module = importlib.import_module(f"benchmarks.{name}")
    if only is not None and name != "gpu":
        raise Failure(ExitCode.USAGE, "--only chooses a suite of the gpu benchmark")
    try:
        record = module.run(full=full, **({"only": only} if name == "gpu" else {}))
    except ValueError as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error
    out.print(table(record))
    if target:
        record.save(target)
        out.print(str(target), markup=False)
