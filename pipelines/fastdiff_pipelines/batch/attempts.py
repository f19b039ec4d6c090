"""Gets every item of a batch made, or says why not: less at once when memory runs out, bisection when one item spoils
the others, a bounded number of tries for each."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdiff_pipelines.batch.backoff import Caps
from fastdiff_pipelines.batch.errors import Broken, Cancelled, JobError, one_line
from fastdiff_pipelines.batch.items import Item
from fastdiff_pipelines.batch.maker import Made, Maker, is_out_of_memory

if TYPE_CHECKING:
    import numpy as np

# wrong settings stay wrong, so they are not tried again
_FINAL = (ValueError, TypeError, NotImplementedError)


@dataclass
class Done:
    """An item that was made: `pixels` uint8 [H, W, 3] or [F, H, W, 3], `batch` how many were made in the same call,
    `measures` what had to be done to fit it into memory."""

    item: Item
    pixels: "np.ndarray"
    attempts: int
    batch: int
    measures: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


@dataclass
class Failed:
    """An item nothing helped: the class and message of its last error."""

    item: Item
    error: str
    message: str
    attempts: int


def to_bytes(pixels: "np.ndarray") -> "np.ndarray":
    """Float in 0..1 to uint8, rounded."""
    import numpy as np

    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


@dataclass
class _Refused:
    """What is kept of an exception: not the exception itself, whose traceback holds on to the memory of the call."""

    error: str
    message: str
    is_memory: bool
    is_final: bool


class Attempts:
    """Runs batches of one worker.

    Args:
        make: the model.
        caps: what fits into memory; remembers between batches.
        key: names shape, plan and device of an item for `caps`.
        most: tries an item gets alone before it is given up; measures against lack of memory are not counted.
        is_aborted: asked between calls, and by the model between steps.
    """

    def __init__(
        self,
        make: Maker,
        caps: Caps,
        key: Callable[[Item], str],
        most: int = 3,
        is_aborted: Callable[[], bool] = lambda: False,
    ):
        self.make, self.caps, self.key, self.most, self.is_aborted = make, caps, key, most, is_aborted
        self._tries: dict[int, int] = {}
        self._alone: dict[int, int] = {}
        # measures against lack of memory: those in force, how many a key is given, how many have helped it
        self._measures: list[str] = []
        self._given: dict[str, int] = {}
        self._helped: dict[str, int] = {}

    def run(self, items: Sequence[Item]) -> Iterator[Done | Failed]:
        """Every item exactly once, as soon as it is known what became of it.

        Raises:
            Cancelled, Broken, JobError: what was not given yet stays undone.
        """
        self._tries = {id(item): 0 for item in items}
        self._alone = dict(self._tries)
        waiting = [list(items)]
        while waiting:
            group = waiting.pop()
            limit = self.caps.limit(self.key(group[0]))
            if len(group) > limit:
                waiting += [group[limit:], group[:limit]]
                continue
            if self.is_aborted():
                raise Cancelled
            yield from self._call(group, waiting)

    def _call(self, group: list[Item], waiting: list[list[Item]]) -> Iterator[Done | Failed]:
        key = self.key(group[0])
        self._ease(self._given.get(key, 0))
        for item in group:
            self._tries[id(item)] += 1
            self._alone[id(item)] += len(group) == 1
        made = self._make(group)
        if isinstance(made, Made):
            self.caps.fitted(key, len(group))
            self._helped[key] = len(self._measures)
            yield from self._sorted(group, made, waiting)
        elif made.is_memory:
            self.caps.ran_out(key, len(group))
            yield from self._with_less(key, group, waiting, made)
        elif len(group) > 1:
            half = len(group) // 2
            waiting += [group[half:], group[:half]]
        elif made.is_final or self._alone[id(group[0])] >= self.most:
            yield Failed(group[0], made.error, made.message, self._tries[id(group[0])])
        else:
            waiting.append(group)

    def _make(self, group: list[Item]) -> Made | _Refused:
        try:
            return self.make(group, self.is_aborted)
        except (Cancelled, Broken, JobError):
            raise
        except Exception as error:
            # whatever a model raises is the fate of these items, not of the job
            final = isinstance(error, _FINAL)
            return _Refused(type(error).__name__, one_line(error), is_out_of_memory(error), final)

    def _sorted(self, group: list[Item], made: Made, waiting: list[list[Item]]) -> Iterator[Done | Failed]:
        import numpy as np

        for item, pixels in zip(group, made.pixels, strict=True):
            tries = self._tries[id(item)]
            if np.isfinite(pixels).all():
                measures = tuple(self._measures)
                yield Done(item, to_bytes(pixels), tries, len(group), measures, made.seconds, made.peak_bytes)
            elif len(group) > 1:
                waiting.append([item])
            else:
                # the same numbers give the same NaN, so one lonely try is enough
                yield Failed(item, "NotFinite", "the model gave NaN or infinity; try float32, or no plan", tries)

    def _with_less(
        self, key: str, group: list[Item], waiting: list[list[Item]], refused: _Refused
    ) -> Iterator[Done | Failed]:
        _free_memory()
        if len(group) > 1:
            waiting.append(group)
            return
        wanted = len(self._measures) + 1
        if self._ease(wanted):
            self._given[key] = wanted
            self._alone[id(group[0])] -= 1
            waiting.append(group)
            return
        tried = f" (even with {' and '.join(self._measures)})" if self._measures else ""
        # others of this kind may fit without what did not help this one
        self._given[key] = self._helped.get(key, 0)
        message = f"does not fit into memory{tried}; take a smaller size ({refused.message})"
        yield Failed(group[0], "OutOfMemory", message, self._tries[id(group[0])])

    def _ease(self, count: int) -> bool:
        """Puts exactly `count` measures in force; False when there are not so many."""
        if len(self._measures) > count:
            self.make.restore()
            self._measures.clear()
        while len(self._measures) < count:
            measure = self.make.relieve()
            if measure is None:
                return False
            self._measures.append(measure)
        return True


def _free_memory() -> None:
    gc.collect()
    # a model that ran out of a device's memory has imported torch
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
