"""Counts and times of a job, computed from its manifest: as JSON, and as text that Prometheus reads."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def metrics(done: Iterable[dict[str, Any]], failed: Iterable[dict[str, Any]], skipped: int = 0) -> dict[str, Any]:
    """Sums up manifest lines.

    Args:
        done: lines of all outputs of a job, those of earlier runs included, so that counters never fall.
        failed: lines of items given up in this run.
        skipped: how many outputs were there before it.

    Returns:
        "items" by what became of them, "tries" (calls an item took part in), "retried" (items that took more than
        one), "errors" by class, "seconds" by stage (per output: count, sum and cumulative "buckets" by upper bound),
        "bytes" written, "peak_bytes" by device, "classes" of reproducibility.
    """
    done, failed = list(done), list(failed)
    stages: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for line in done:
        for stage, seconds in line["seconds"].items():
            stages.setdefault(stage, []).append(seconds)
        if line["peak_bytes"] is not None:
            peaks[line["device"]] = max(peaks.get(line["device"], 0), line["peak_bytes"])
    return {
        "items": {"done": len(done), "failed": len(failed), "skipped": skipped},
        "tries": sum(line["attempts"] for line in (*done, *failed)),
        "retried": sum(line["attempts"] > 1 for line in (*done, *failed)),
        "errors": dict(Counter(line["error"] for line in failed)),
        "seconds": {stage: _histogram(values) for stage, values in sorted(stages.items())},
        "bytes": sum(line["bytes"] for line in done),
        "peak_bytes": peaks,
        "classes": dict(Counter(line["class"] for line in done)),
    }


def _histogram(values: list[float]) -> dict[str, Any]:
    buckets = {str(bound): sum(value <= bound for value in values) for bound in _BOUNDS_S}
    return {"count": len(values), "sum": sum(values), "buckets": buckets}


def prometheus(found: dict[str, Any]) -> str:
    """What `metrics` gave in the text format of Prometheus, for its textfile collector."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.append(f"# HELP fastdiff_batch_{name} {text}")
        lines.append(f"# TYPE fastdiff_batch_{name} {kind}")
        lines.extend(f"fastdiff_batch_{name}{labels} {value:g}" for labels, value in samples)

    def labelled(label: str, values: dict[str, float]) -> Iterable[tuple[str, float]]:
        return ((f'{{{label}="{_escaped(key)}"}}', value) for key, value in values.items())

    family("items_total", "counter", "Items by what became of them.", labelled("state", found["items"]))
    family("tries_total", "counter", "Calls that items took part in.", [("", found["tries"])])
    family("retried_total", "counter", "Items that took more than one try.", [("", found["retried"])])
    family("errors_total", "counter", "Items given up, by error.", labelled("error", found["errors"]))
    family("written_bytes_total", "counter", "Bytes of outputs.", [("", found["bytes"])])
    family("peak_bytes", "gauge", "Most memory held, by device.", labelled("device", found["peak_bytes"]))
    samples = []
    for stage, histogram in found["seconds"].items():
        mark = f'stage="{_escaped(stage)}"'
        samples += [(f'_bucket{{{mark},le="{bound}"}}', count) for bound, count in histogram["buckets"].items()]
        samples.append((f'_bucket{{{mark},le="+Inf"}}', histogram["count"]))
        samples += [(f"_sum{{{mark}}}", histogram["sum"]), (f"_count{{{mark}}}", histogram["count"])]
    family("seconds", "histogram", "Seconds of each stage for one output.", samples)
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
