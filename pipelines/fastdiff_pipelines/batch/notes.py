"""The lines of the manifest, and the parameters an output carries inside."""

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.attempts import Done, Failed
from fastdiff_pipelines.batch.items import Item, digest
from fastdiff_pipelines.batch.outputs import has_kind, sha256
from fastdiff_pipelines.batch.settings import Settings


class Notes:
    """What one worker writes down about its outcomes.

    Attributes:
        plan: 12 digits that stand for the plan.
    """

    def __init__(self, settings: Settings, device: str, worker: str):
        self.common = settings.common
        self.plan = digest(settings.common.plan)[:12]
        self._same = {
            "worker": worker,
            "device": device,
            "threads": settings.threads,
            "plan": self.plan,
            "versions": {name: _version(name) for name in ("fastdiff", "torch", "diffusers")},
        }

    def about(self, name: str, item: Item) -> dict[str, Any]:
        """Everything that is needed to make an output again; the same for the same output on any machine."""
        common = self.common
        return {
            **item.content(),
            "adapters": [[Path(one.source).name, one.scale, one.content] for one in item.adapters],
            "seed": item.seed,
            "model": common.model,
            "plan": common.plan,
            "dtype": common.dtype,
            "id": name,
            "made_with": f"fastdiff {_version('fastdiff')}",
        }

    def done(self, name: str, one: Done, path: str, data: bytes, write_s: float, deaths: int) -> dict[str, Any]:
        """The line of a finished output; `deaths` counts the workers that died with it in hand before.

        Its `class` says what a second run gives: "bitwise" the same bytes (made alone: same plan, device, threads and
        versions), "tolerance" the same up to rounding, "altered" where saving memory changed how it was made.
        """
        alone = "bitwise" if one.batch == 1 else "tolerance"
        share = {stage: round(seconds / one.batch, 6) for stage, seconds in one.seconds.items()}
        return {
            "status": "done",
            "id": name,
            "path": path,
            "sha256": sha256(data),
            "bytes": len(data),
            "seed": one.item.seed,
            "attempts": one.attempts,
            "batch": one.batch,
            "deaths": deaths,
            "class": "altered" if one.measures else alone,
            "measures": list(one.measures),
            "seconds": share | {"write": round(write_s, 6)},
            "peak_bytes": one.peak_bytes,
            "time": time.time(),
            **self._same,
        }

    def failed(self, name: str, one: Failed) -> dict[str, Any]:
        """The line of an item that was given up in this run; the next run tries it again."""
        return {
            "status": "failed",
            "id": name,
            "error": one.error,
            "message": one.message,
            "attempts": one.attempts,
            "time": time.time(),
            **self._same,
        }


def is_there(folder: Path, line: dict[str, Any], verify: str) -> bool:
    """Whether the output a manifest line speaks of still is what it was, by its size or ("hash") by its bytes."""
    path = folder / line["path"]
    try:
        if path.stat().st_size != line["bytes"]:
            return False
        kind = path.suffix[1:]
        if verify == "hash":
            return sha256(path.read_bytes()) == line["sha256"]
        with path.open("rb") as file:
            return has_kind(file.read(12), kind)
    except OSError:
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
