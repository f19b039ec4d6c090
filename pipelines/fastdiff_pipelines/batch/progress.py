"""How far a job is and when it will be done, from the manifest alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from fastdiff_pipelines.batch.items import Item

_RECENT = 0.1


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
        total: items; done: finished in this run; skipped: finished before it; failed: given up in this run.
        per_second: outputs a second over this run; None before the first.
        left_s: seconds until the end as far as one can tell; None before the first output.
    """

    total: int
    done: int
    skipped: int
    failed: int
    elapsed_s: float
    per_second: float | None
    left_s: float | None

    def row(self) -> dict[str, Any]:
        """As one line of JSON for machines."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


class Pace:
    """Learns how long an item of each bucket takes, recent ones counting most.

    Args:
        items: id to item, of the whole job.
        skipped: ids finished before this run.
        workers: how many work at a time.
    """

    def __init__(self, items: dict[str, Item], skipped: Iterable[str], workers: int):
        self.items, self.workers = items, workers
        self._skipped = set(skipped)
        self._settled = set(self._skipped)
        self._done = self._failed = 0
        self._seconds: dict[Any, float] = {}
        self._costs = {item.bucket: item.cost for item in items.values()}
        self._left = Counter(item.bucket for name, item in items.items() if name not in self._skipped)
        self._begun = perf_counter()

    def take(self, line: dict[str, Any]) -> None:
        """Counts a line of the manifest that was added during this run."""
        name = line["id"]
        if name not in self.items or name in self._settled:
            return
        self._settled.add(name)
        bucket = self.items[name].bucket
        self._left[bucket] -= 1
        if line["status"] == "failed":
            self._failed += 1
            return
        self._done += 1
        seconds = sum(line["seconds"].values())
        known = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = known + _RECENT * (seconds - known)

    def now(self) -> Progress:
        """Where the job stands now."""
        elapsed = perf_counter() - self._begun
        rate = self._done / elapsed if self._done and elapsed > 0 else None
        return Progress(
            len(self.items), self._done, len(self._skipped), self._failed, elapsed, rate, self.left_s(elapsed)
        )

    def left_s(self, elapsed: float) -> float | None:
        """Remaining items of each bucket times their time; buckets not met yet are scaled by their cost.

        The sum is corrected by what the items finished so far took in truth, waiting and loading included.
        """
        if not self._seconds:
            return None
        unit = sum(self._seconds.values()) / sum(self._costs[bucket] for bucket in self._seconds)
        each = {bucket: self._seconds.get(bucket, unit * self._costs[bucket]) for bucket in self._left}
        met = sum(each[self.items[name].bucket] for name in self._settled - self._skipped)
        ahead = sum(each[bucket] * count for bucket, count in self._left.items())
        truth = elapsed * self.workers / met if met else 1.0
        return ahead / self.workers * max(1.0, truth)
