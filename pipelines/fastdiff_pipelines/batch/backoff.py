"""How many items fit into one call: found by running out of memory, remembered, and tried upwards again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.outputs import write_whole

_SETTLED = 16


@dataclass
class _Cap:
    """`fits` is the largest batch that went well since, `fails` the smallest that did not, `limit` what is tried."""

    limit: int
    fits: int = 0
    fails: int | None = None
    streak: int = 0


class Caps:
    """The largest batch for each kind of work.

    A batch that runs out of memory halves the limit; after some full batches in a row the limit goes half way up to
    the smallest batch known to fail, so that it settles on the largest that fits. Long after, one more is tried:
    other programs may have given memory back.

    Args:
        most: never more than this.
        path: where limits are remembered between runs, or None. They are hints: a lost or damaged file costs nothing.
        streak: full batches in a row before more is tried.
    """

    def __init__(self, most: int, path: Path | None = None, streak: int = 4):
        if most < 1:
            raise ValueError(f"the largest batch must be at least 1, not {most}")
        self.most, self.path, self.streak = most, path, streak
        self._caps: dict[str, _Cap] = {}
        self._remembered = self._read()

    def limit(self, key: str) -> int:
        """The largest batch to try now; `key` names shape, plan and device."""
        return self._cap(key).limit

    def fitted(self, key: str, size: int) -> None:
        """A batch of this size went well."""
        cap = self._cap(key)
        cap.fits = max(cap.fits, size)
        if size < cap.limit:
            return
        cap.streak += 1
        higher = self.most if cap.fails is None else (cap.limit + cap.fails) // 2
        if higher > cap.limit:
            if cap.streak >= self.streak:
                cap.limit, cap.streak = min(higher, self.most), 0
        elif cap.fails is not None and cap.streak >= _SETTLED * self.streak:
            cap.fails = None if cap.limit >= self.most else cap.limit + 2

    def ran_out(self, key: str, size: int) -> None:
        """A batch of this size did not fit; every later limit is below it."""
        cap = self._cap(key)
        cap.fails = size if cap.fails is None else min(cap.fails, size)
        if cap.fits >= size:
            # what went well before no longer does, so nothing is known about smaller ones either
            cap.fits = 0
        cap.limit = max(1, min(cap.limit, max(size // 2, cap.fits)))
        cap.streak = 0
        self._write()

    def _cap(self, key: str) -> _Cap:
        if key not in self._caps:
            limit = self._remembered.get(key)
            if isinstance(limit, int) and not isinstance(limit, bool) and 1 <= limit < self.most:
                self._caps[key] = _Cap(limit, fails=limit + 1)
            else:
                self._caps[key] = _Cap(self.most)
        return self._caps[key]

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text("utf-8")) if self.path else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        if self.path is None:
            return
        self._remembered = self._read() | {key: cap.limit for key, cap in self._caps.items() if cap.fails is not None}
        write_whole(self.path, json.dumps(self._remembered, indent=1, sort_keys=True).encode())
