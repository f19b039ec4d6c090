"""What a long benchmark has measured so far, in a file under out/, so that it can be stopped and gone on with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from fastdiff_app.outputs import write_json

ROOT = RESULTS.parents[1]


def digest(*parts: Any, sources: tuple[str, ...] = ()) -> str:
    """SHA-256 over settings and over the source files that patterns from the checkout's root match."""
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for pattern in sources:
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def read(name: str, key: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What was kept under a name by the same settings and sources; None where there is nothing of that kind."""
    path = (folder or ROOT / "out") / f"{name}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def write(name: str, key: str, content: dict[str, Any], folder: Path | None = None) -> None:
    """Keep something, whole or not at all."""
    path = (folder or ROOT / "out") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, **content})
