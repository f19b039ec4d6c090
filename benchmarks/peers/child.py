"""A peer's own process: bytes in, bytes out, and its last words when it dies."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from benchmarks.peers.environments import python_of


class Child:
    """`worker` run by the environment of the peer `name`, with a folder of its own; a context manager.

    Raises:
        FileNotFoundError: that environment is not made; the message says how.
        ChildProcessError: by `ask` and the readers, when the process ended; the message ends with what it said.
    """

    def __init__(self, name: str, worker: Path):
        self._name, self._worker = name, worker
        self._python = python_of(name)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="fastdiff-peer-")
        self.folder = Path(self._folder.name)
        self._errors = (self.folder / "errors.txt").open("w+", encoding="utf-8")

    def start(self, *arguments: str) -> None:
        """Runs the worker; what it needs in `folder` lies there by now."""
        # -P: the worker's own folder must not hide the peer's modules
        self._process = subprocess.Popen(
            [str(self._python), "-P", str(self._worker), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, content: bytes) -> None:
        """Writes to its input."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(content)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def read(self, length: int) -> bytes:
        """Exactly so many bytes of its answer."""
        assert self._process is not None and self._process.stdout is not None
        got = self._process.stdout.read(length)
        if len(got) != length:
            self._fail()
        return got

    def line(self) -> str:
        """One line of its answer."""
        assert self._process is not None and self._process.stdout is not None
        got = self._process.stdout.readline()
        if not got:
            self._fail()
        return got.decode()

    def _fail(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise ChildProcessError(f"{self._name} stopped: {said[-1] if said else self._process.returncode}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
        self._errors.close()
        self._folder.cleanup()
