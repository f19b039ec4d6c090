"""What is finished: append-only lines, one file for each worker, read as one.

A line is written and synced after the output it speaks of lies under its final name, so a line that is there can be
trusted. A process killed while writing leaves at most one torn line at the end of its own file, which readers skip;
no two processes ever write to one file.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.items import canonical


class Part:
    """The manifest file of one worker; made with the first line.

    Args:
        folder: where all parts of a job lie.
        worker: unique for this process, now and later (`claims.worker_name`).
    """

    def __init__(self, folder: Path, worker: str):
        self.path = folder / f"part-{worker}.jsonl"

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Adds lines and returns when they are on the disk. All of them, or in an error none.

        Raises:
            OSError: they could not be written (the disk is full, say).
        """
        data = "".join(f"{canonical(line)}\n" for line in lines).encode("utf-8", "surrogatepass")
        new = not self.path.exists()
        with self.path.open("ab") as file:
            before = file.tell()
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, before)
                raise
        if new:
            sync_folder(self.path.parent)


class Manifest:
    """All parts of a folder as one; `refresh` reads only what is new.

    Attributes:
        done: id to the latest line, of finished outputs.
        failed: id to the latest line that says why not; not those that were done after all.
        repeated: how often an output was finished again; 0 unless a lease was too short or a file was deleted.
        damaged: whole lines that make no sense, which only a broken disk or a foreign hand can cause.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.repeated = 0
        self.damaged = 0
        self._read: dict[str, int] = {}

    def refresh(self) -> list[dict[str, Any]]:
        """Takes in what was added since and returns it."""
        fresh = []
        for path in sorted(self.folder.glob("part-*.jsonl")):
            fresh += self._lines(path)
        for line in fresh:
            self._take(line)
        return fresh

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        start = self._read.get(path.name, 0)
        try:
            if path.stat().st_size <= start:
                return []
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return []
        # what follows the last line end is torn, or still being written
        whole = data.rfind(b"\n") + 1
        self._read[path.name] = start + whole
        found = []
        for text in data[:whole].splitlines():
            try:
                line = json.loads(text)
                if line["status"] not in ("done", "failed") or not isinstance(line["id"], str):
                    raise ValueError
                found.append(line)
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
        return found

    def _take(self, line: dict[str, Any]) -> None:
        name = line["id"]
        if line["status"] == "failed":
            if name not in self.done:
                self.failed[name] = line
        else:
            self.repeated += name in self.done
            self.done[name] = line
            self.failed.pop(name, None)

    def forget(self, name: str) -> None:
        """The output is gone, so it is not done."""
        self.done.pop(name, None)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable, where the system can (Windows cannot)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
