"""The worker processes of this machine: started, watched, started again when they die, told to stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastdiff_pipelines.batch.errors import INPUT, MODEL, OUTPUT, PLAN, JobError
from fastdiff_pipelines.batch.settings import Settings

_FATAL = (INPUT, MODEL, PLAN, OUTPUT)
# what a worker gets to finish its batch when the job ends for another reason than the user's wish
_GRACE_S = 30


@dataclass
class _Member:
    number: int
    device: str
    log: Path
    process: subprocess.Popen[bytes]


class Crew:
    """As many workers as the settings say; use as a context manager, which leaves none behind.

    Args:
        work: the file `Work.save` wrote.
        on_death: told in one line when a worker died and what comes of it.
    """

    def __init__(self, work: Path, settings: Settings, on_death: Callable[[str], None] = lambda line: None):
        self.work, self.settings, self.on_death = work, settings, on_death
        self.members: list[_Member] = []
        self.deaths = 0
        self._in_vain = 0

    def __enter__(self) -> "Crew":
        for number in range(self.settings.workers):
            device = self.settings.devices[number % len(self.settings.devices)]
            log = self.work.parent / f"worker-{number}.log"
            log.unlink(missing_ok=True)
            self.members.append(_Member(number, device, log, self._start(device, log)))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for one in self.members:
            try:
                one.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()

    def watch(self, progressed: bool, is_stopping: bool) -> bool:
        """Looks after the workers once; False when none is running any more.

        Args:
            progressed: whether anything was finished or given up since the last look.
            is_stopping: whether dead workers are to stay dead.

        Raises:
            JobError: a worker said why none of them can go on, or they die again and again with nothing done.
        """
        if progressed:
            self._in_vain = 0
        for one in list(self.members):
            code = one.process.poll()
            if code is None:
                continue
            self.members.remove(one)
            if code in _FATAL:
                raise JobError(code, _last_error(one.log))
            if code:
                self._died(one, code, is_stopping)
        return bool(self.members)

    def _died(self, one: _Member, code: int, is_stopping: bool) -> None:
        self.deaths += 1
        self._in_vain += 1
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        said = _last_error(one.log)
        line = f"worker {one.number} {why}{f' ({said})' if said else ''}"
        if is_stopping:
            self.on_death(line)
            return
        if self._in_vain > self.settings.workers * (self.settings.attempts + 1):
            raise JobError(1, f"workers die again and again, the last: {line}; see {one.log}")
        self.on_death(f"{line}; its work is taken over")
        one.process = self._start(one.device, one.log)
        self.members.append(one)

    def stop(self) -> None:
        """Passes one request to stop on to every worker."""
        for one in self.members:
            if one.process.poll() is None:
                one.process.terminate()

    def _start(self, device: str, log: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "fastdiff_pipelines.batch.worker", str(self.work), "--device", device]
        environment = dict(os.environ)
        if self.settings.threads:
            environment["OMP_NUM_THREADS"] = str(self.settings.threads)
        with log.open("ab") as file:
            return subprocess.Popen(
                [*command, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
            )


def _last_error(log: Path) -> str:
    """The last line of a log that says what was wrong; empty where none does."""
    try:
        lines = log.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    said = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return said[-1].removeprefix("error: ")[:400] if said else ""
