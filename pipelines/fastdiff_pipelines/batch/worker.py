"""One worker: claim a batch, make it, write it, note it, give the claims back; until nothing is left or it shall stop.

Any number of workers share a job through its folder and need not know of each other.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.attempts import Attempts, Done, Failed
from fastdiff_pipelines.batch.backoff import Caps
from fastdiff_pipelines.batch.claims import Claims, worker_name
from fastdiff_pipelines.batch.errors import Broken, Cancelled, JobError, one_line
from fastdiff_pipelines.batch.items import Item, file_name
from fastdiff_pipelines.batch.maker import Maker
from fastdiff_pipelines.batch.manifest import Manifest, Part, sync_folder
from fastdiff_pipelines.batch.notes import Notes, is_there
from fastdiff_pipelines.batch.outputs import encode, output_error, write_whole
from fastdiff_pipelines.batch.settings import WITHIN, Work
from fastdiff_pipelines.batch.stop import Stop

BROKEN = 75
_IDLE_S = 0.2


class Worker:
    """Works on a job.

    Args:
        work: what to do.
        folder: where the outputs go; the job's own files lie in `folder`/job.
        make: the model.
        device: its name, for records and for what fits into its memory.
        stop: asked between batches and between steps.
        name: unique; None makes one up.
        idle: called while all that is left is in other hands.
        on_batch: called after each batch.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        make: Maker,
        device: str = "cpu",
        stop: Stop | None = None,
        name: str | None = None,
        idle: Callable[[], None] = lambda: time.sleep(_IDLE_S),
        on_batch: Callable[[], None] = lambda: None,
    ):
        self.work, self.folder, self.device, self.idle, self.on_batch = work, folder, device, idle, on_batch
        self.stop = stop or Stop()
        self.name = name or worker_name()
        within = folder / WITHIN
        (within / "claims").mkdir(parents=True, exist_ok=True)
        self.manifest = Manifest(within)
        self.part = Part(within, self.name)
        self.claims = Claims(within / "claims", self.name, work.settings.lease_s)
        self.caps = Caps(work.settings.batch, within / "caps.json")
        self.attempts = Attempts(make, self.caps, self._key, work.settings.attempts, self.stop.is_aborted)
        self._order = list(work.items)
        self._start = 0
        self._left: set[str] = set()
        self._surveyed = False
        self.notes = Notes(work.settings, device, self.name)

    def run(self) -> None:
        """Works until every item is done or failed, or `stop` is asked.

        Raises:
            JobError: outputs cannot be written.
            Broken: this process is of no use any more; its claims stay, so that others see over what it broke.
        """
        self._survey()
        try:
            with self._heartbeat():
                self._work()
        finally:
            self.claims.close()

    def _work(self) -> None:
        while not self.stop.is_asked():
            batch = self._claim()
            if batch:
                self._make(batch)
                self.on_batch()
            elif self._left:
                self.idle()
            else:
                return

    def process(self, names: Iterable[str]) -> dict[str, str]:
        """Works on some items, for callers that hand out work themselves.

        Returns:
            For each id "done", "failed", or "elsewhere" when another worker has it.
        """
        names = list(names)
        if self._surveyed:
            self._refresh()
            self.claims.look()
        else:
            self._survey()
        with self._heartbeat():
            held = self._recheck([name for name in names if name in self._left and self._take(name)])
            for bucket in dict.fromkeys(self.work.items[name].bucket for name in held):
                self._make([name for name in held if self.work.items[name].bucket == bucket])
        self._refresh()
        done = self.manifest.done
        return {name: "elsewhere" if name in self._left else "done" if name in done else "failed" for name in names}

    def _survey(self) -> None:
        """What is left, by the manifest and by the files themselves."""
        self.manifest.refresh()
        for name in self._order:
            line = self.manifest.done.get(name)
            if line and not is_there(self.folder, line, self.work.settings.verify):
                self.manifest.forget(name)
        self._left = {name for name in self._order if not self._is_settled(name)}
        self._surveyed = True
        self.claims.look()

    def _is_settled(self, name: str) -> bool:
        if name in self.manifest.done:
            return True
        line = self.manifest.failed.get(name)
        return line is not None and line["time"] >= self.work.settings.since

    def _key(self, item: Item) -> str:
        return f"{self.device} {self.notes.plan} {item.height}x{item.width}x{item.frames} {bool(item.adapters)}"

    def _refresh(self) -> None:
        for line in self.manifest.refresh():
            if self._is_settled(line["id"]):
                self._left.discard(line["id"])

    def _claim(self) -> list[str]:
        """The next items of one bucket that are nobody's, as many as fit."""
        self._refresh()
        self.claims.look()
        while self._start < len(self._order) and self._order[self._start] not in self._left:
            self._start += 1
        batch: list[str] = []
        room = 1
        for place in range(self._start, len(self._order)):
            name = self._order[place]
            item = self.work.items[name]
            if batch and (len(batch) >= room or item.bucket != self.work.items[batch[0]].bucket):
                break
            deaths = self.claims.generation(name) if name in self._left else None
            # over whatever a worker died, it is tried alone
            if deaths is None or (batch and deaths) or not self._take(name):
                continue
            batch.append(name)
            if deaths:
                break
            # at the end, a smaller batch leaves something to do for the others
            share = -(-len(self._left) // self.work.settings.workers)
            room = max(1, min(self.caps.limit(self._key(self.work.items[batch[0]])), share))
        return self._recheck(batch)

    def _recheck(self, batch: list[str]) -> list[str]:
        """Drops what was finished between looking and claiming."""
        self._refresh()
        gone = [name for name in batch if name not in self._left]
        self.claims.release(gone)
        return [name for name in batch if name in self._left]

    def _take(self, name: str) -> bool:
        """Claims an item; one that too many workers died over is given up instead."""
        deaths = self.claims.take(name)
        if deaths is None:
            return False
        if deaths < self.work.settings.attempts:
            return True
        if self._recheck([name]):
            message = f"{deaths} workers died while making it"
            self._commit([name], [Failed(self.work.items[name], "WorkerDied", message, deaths)])
        return False

    def _make(self, batch: list[str]) -> None:
        items = [self.work.items[name] for name in batch]
        outcomes: list[Done | Failed] = []
        try:
            for outcome in self.attempts.run(items):
                outcomes.append(outcome)
        except Cancelled:
            self._commit(batch, outcomes)
        except Broken:
            self._commit(batch, outcomes, keep=True)
            self.claims.abandon()
            raise
        except BaseException:
            self.claims.release(batch)
            raise
        else:
            self._commit(batch, outcomes)

    def _commit(self, batch: list[str], outcomes: list[Done | Failed], keep: bool = False) -> None:
        """Writes outputs, then their lines, then gives the claims back; in this order a crash costs work, never truth.

        Args:
            batch: the claims to give back; `keep` keeps those without an outcome.
        """
        names = {id(self.work.items[name]): name for name in batch}
        self._refresh()
        path = self.folder
        lines = []
        try:
            for one in outcomes:
                name = names[id(one.item)]
                # somebody may have finished it while this process was stopped for longer than the lease
                if name in self._left and not self.claims.is_lost(name):
                    path = self.folder / file_name(one.item, name, self.work.settings.common.format)
                    lines.append(self._line(name, one, path))
            path = self.folder
            sync_folder(path)
            path = self.part.path
            if lines:
                self.part.append(lines)
        except OSError as error:
            raise output_error(path, error) from error
        finally:
            self._refresh()
            self.claims.release([names[id(one.item)] for one in outcomes] if keep else batch)

    def _line(self, name: str, one: Done | Failed, path: Path) -> dict[str, Any]:
        if isinstance(one, Failed):
            return self.notes.failed(name, one)
        begun = time.perf_counter()
        try:
            about = self.notes.about(name, one.item)
            data = encode(one.pixels, self.work.settings.common.format, about, one.item.fps)
        except ValueError as error:
            return self.notes.failed(name, Failed(one.item, type(error).__name__, one_line(error), one.attempts))
        write_whole(path, data, durable=False)
        return self.notes.done(name, one, path.name, data, time.perf_counter() - begun, self.claims.held[name])

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Keeps the claims alive for the length of a block, and watches whether anybody still wants the work."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(min(self.claims.lease_s / 4, 1.0)):
                self.claims.beat()
                self.stop.check_parent()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def main() -> None:
    """`python -m fastdiff_pipelines.batch.worker WORK --device cpu`: what a job starts for each of its workers."""
    parser = argparse.ArgumentParser(prog="fastdiff_pipelines.batch.worker")
    parser.add_argument("work", type=Path, help="a file written by Work.save")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parent", type=int, default=None, help="stop once this process is gone")
    chosen = parser.parse_args()
    stop = Stop(chosen.parent)
    # Ctrl-C reaches every process of a terminal; whoever started this one passes it on as SIGTERM, so it counts once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop.watch([signal.SIGTERM])
    try:
        start(Work.load(chosen.work), chosen.work.parent.parent, chosen.device, stop)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Broken as error:
        print(f"error: {chosen.device} cannot be used any more: {error}", file=sys.stderr)
        sys.exit(BROKEN)


def start(work: Work, folder: Path, device: str, stop: Stop) -> None:
    """Loads the model in this process and works until the job is done.

    Raises:
        JobError, Broken: as `Worker.run`.
    """
    from fastdiff_pipelines.batch.maker import load

    make = load(work.settings, device)
    print(f"ready {time.time():.3f}", flush=True)
    Worker(work, folder, make, device, stop).run()


if __name__ == "__main__":
    main()
