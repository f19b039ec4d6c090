"""A batch job: many outputs from one model, which can be killed at any moment and started again with nothing lost."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.claims import tidy
from fastdiff_pipelines.batch.crew import Crew
from fastdiff_pipelines.batch.errors import INPUT, JobError
from fastdiff_pipelines.batch.identity import resolve_model
from fastdiff_pipelines.batch.items import Common, Item, file_name, identity, with_seeds
from fastdiff_pipelines.batch.maker import Maker, load
from fastdiff_pipelines.batch.manifest import Manifest
from fastdiff_pipelines.batch.metrics import metrics, prometheus
from fastdiff_pipelines.batch.notes import is_there
from fastdiff_pipelines.batch.outputs import check_folder, output_error, remove_parts, write_whole
from fastdiff_pipelines.batch.progress import Pace, Progress
from fastdiff_pipelines.batch.settings import WITHIN, Settings, Work
from fastdiff_pipelines.batch.sheet import Card, contact_sheet
from fastdiff_pipelines.batch.stop import Stop
from fastdiff_pipelines.batch.worker import Worker

_LOOK_S = 0.25
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Summary:
    """What became of a job.

    Attributes:
        done: outputs finished in this run; skipped: outputs that were there before it.
        failed: for each item given up in this run its id and its line of the manifest.
        aliases: how many items were asked for more than once, counting all but the first.
        left: items that nobody finished, because the job was told to stop.
        deaths: workers that died.
    """

    done: int
    skipped: int
    failed: dict[str, dict[str, Any]]
    aliases: int
    left: int
    seconds: float
    deaths: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every output is there."""
        return not self.left and not self.failed


class BatchJob:
    """Outputs for a list of items, in a folder.

    ```python
    jobs = read_jobs(Path("jobs.jsonl"))
    summary = BatchJob(jobs.items, Path("out")).run()
    ```

    The same job started again does what is left. Several started at once, on any machines that share the folder,
    divide the work between them.

    Args:
        items: what to make; those without a seed get one from `seed` and their content.
        folder: for the outputs; `folder`/job holds the manifest and all else.
        model: a diffusers folder, a hub id, or None for the embedded model.
        plan: a `fastdiff.Plan`, a preset's name or accelerations; None for none.
        dtype, format: see `items.Common`.
        batch, attempts, lease_s, verify: see `settings.Settings`.
        workers: processes; None takes one for each GPU, or on a CPU as many as the memory allows, at most one a core.
        devices: None takes all GPUs, or the CPU.

    Raises:
        JobError: there is nothing to do, no such model, or the folder cannot be written.
        ValueError: a setting is impossible.
    """

    def __init__(
        self,
        items: Sequence[Item],
        folder: Path | str,
        *,
        model: str | None = None,
        plan: Any = None,
        dtype: str = "auto",
        format: str = "png",
        seed: int = 0,
        batch: int = 8,
        workers: int | None = None,
        devices: Sequence[str] | None = None,
        attempts: int = 3,
        lease_s: float = 60.0,
        verify: str = "size",
    ):
        if not items:
            raise JobError(INPUT, "there is nothing to do: no items")
        self.folder = Path(folder)
        check_folder(self.folder / WITHIN)
        where, name = resolve_model(model)
        chosen = tuple(devices) if devices else _devices()
        count = workers or _workers(where, chosen)
        self.settings = Settings(
            model=str(where),
            common=Common(name, _plan_text(plan), dtype, format),
            batch=batch,
            workers=count,
            threads=max(1, (os.cpu_count() or 1) // count) if chosen[0] == "cpu" else 0,
            devices=chosen,
            attempts=attempts,
            lease_s=lease_s,
            verify=verify,
            since=time.time(),
        )
        self.asked = with_seeds(items, seed)
        self.work = Work.of(self.settings, self.asked)

    def ids(self) -> list[str]:
        """The id of every item asked for, in their order; equal items have equal ids."""
        return [identity(item, self.settings.common) for item in self.asked]

    def path(self, name: str) -> Path:
        """Where the output of an id lies once it is done."""
        return self.folder / file_name(self.work.items[name], name, self.settings.common.format)

    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_note: Callable[[str], None] = lambda line: None,
        stop: Stop | None = None,
    ) -> Summary:
        """Starts the workers and stays until all is done, or until `stop` is asked and they have stopped.

        Args:
            on_progress: told several times a second where the job stands.
            on_note: told in one line what the user should know, such as that a worker died.

        Raises:
            JobError: no worker can go on. What was finished stays.
        """
        stop = stop or Stop()
        ledger = _Ledger(self)
        deaths = passed_on = 0
        if ledger.left():
            with Crew(self.work.save(self.folder), self.settings, on_note) as crew:
                progressed = False
                while crew.watch(progressed, stop.is_asked()):
                    while passed_on < stop.asked:
                        crew.stop()
                        passed_on += 1
                    progressed = ledger.look()
                    on_progress(ledger.pace.now())
                    time.sleep(_LOOK_S)
                deaths = crew.deaths
        return self._finish(ledger, deaths, on_progress)

    def run_here(
        self,
        make: Maker | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        stop: Stop | None = None,
        device: str | None = None,
        closes: bool = True,
    ) -> Summary:
        """Works in this process, as each rank that torchrun starts does.

        Args:
            make: the model; None loads it.
            closes: whether to write metrics and contact sheet; one rank is enough.

        Raises:
            JobError, Broken: as `Worker.run`.
        """
        stop = stop or Stop()
        ledger = _Ledger(self)
        device = device or self.settings.devices[0]
        if ledger.left():

            def look() -> None:
                ledger.look()
                on_progress(ledger.pace.now())

            make = make or load(self.settings, device)
            Worker(self.work, self.folder, make, device, stop, on_batch=look).run()
        return self._finish(ledger, 0, on_progress, closes)

    def run_with(
        self,
        hand_out: Callable[[Path, list[str]], Iterator[dict[str, str]]],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Summary:
        """Lets somebody else's scheduler hand out the work, such as `on_ray.hand_out`.

        Args:
            hand_out: given the job's file and ids of one pass, has `Worker.process` run somewhere on each of them and
                gives what it returned. Passes are repeated until nothing is in other hands.
        """
        ledger = _Ledger(self)
        path = self.work.save(self.folder) if ledger.left() else None
        while path is not None and (names := ledger.open()):
            before = ledger.left()
            for _ in hand_out(path, names):
                ledger.look()
                on_progress(ledger.pace.now())
            ledger.look()
            if ledger.left() == before:
                # held by workers that may be dead; their leases end
                time.sleep(min(self.settings.lease_s, _PATIENCE_S))
        return self._finish(ledger, 0, on_progress)

    def _finish(
        self, ledger: "_Ledger", deaths: int, on_progress: Callable[[Progress], None], closes: bool = True
    ) -> Summary:
        ledger.look()
        on_progress(ledger.pace.now())
        summary = ledger.summary(deaths)
        if closes:
            try:
                self._write_results(ledger, summary)
            except OSError as error:
                raise output_error(self.folder, error) from error
        return summary

    def _write_results(self, ledger: "_Ledger", summary: Summary) -> None:
        within = self.folder / WITHIN
        write_whole(within / "metrics.json", json.dumps(summary.metrics, indent=2).encode())
        write_whole(within / "metrics.prom", prometheus(summary.metrics).encode())
        if not summary.left:
            tidy(within / "claims", self.work.items)
        if not any((within / "claims").glob("*")):
            remove_parts(self.folder)
        rate = f"{summary.done / summary.seconds:.2f}" if summary.done else "none made"
        numbers = {
            "outputs": str(summary.done + summary.skipped),
            "failed": str(len(summary.failed)),
            "there before": str(summary.skipped),
            "a second": rate,
        }
        if summary.left:
            numbers["still to do"] = str(summary.left)
        note = f"Model {self.settings.common.model}. Each file carries its parameters; job/ holds the manifest."
        page = contact_sheet(self.folder, self.folder.resolve().name, numbers, ledger.cards(), note)
        write_whole(self.folder / "index.html", page.encode("utf-8", "replace"))


class _Ledger:
    """A job's view of the manifest during one run."""

    def __init__(self, job: BatchJob):
        self.job = job
        self.manifest = Manifest(job.folder / WITHIN)
        self.manifest.refresh()
        for name in job.work.items:
            line = self.manifest.done.get(name)
            if line and not is_there(job.folder, line, job.settings.verify):
                self.manifest.forget(name)
        self.skipped = {name for name in job.work.items if name in self.manifest.done}
        self.pace = Pace(job.work.items, self.skipped, job.settings.workers)
        self.begun = time.perf_counter()

    def look(self) -> bool:
        """Takes in what is new; whether anything is."""
        fresh = self.manifest.refresh()
        for line in fresh:
            self.pace.take(line)
        return bool(fresh)

    def failed(self) -> dict[str, dict[str, Any]]:
        """Items given up in this run."""
        found = {name: self.manifest.failed.get(name) for name in self.job.work.items}
        since = self.job.settings.since
        return {name: line for name, line in found.items() if line is not None and line["time"] >= since}

    def left(self) -> int:
        """Items neither done nor given up in this run."""
        return len(self.open())

    def open(self) -> list[str]:
        """Ids of what is left, in the order they are worked on."""
        settled = self.manifest.done.keys() | self.failed().keys()
        return [name for name in self.job.work.items if name not in settled]

    def summary(self, deaths: int) -> Summary:
        """What became of the job so far."""
        items = self.job.work.items
        made = {name: self.manifest.done[name] for name in items if name in self.manifest.done}
        failed = self.failed()
        return Summary(
            done=len(made.keys() - self.skipped),
            skipped=len(self.skipped),
            failed=failed,
            aliases=len(self.job.asked) - len(items),
            left=self.left(),
            seconds=time.perf_counter() - self.begun,
            deaths=deaths,
            metrics=metrics(made.values(), failed.values(), len(self.skipped)),
        )

    def cards(self) -> list[Card]:
        """For the contact sheet, in the order that was asked for."""
        failed = self.failed()
        cards = []
        for name in dict.fromkeys(self.job.ids()):
            item = self.job.work.items[name]
            size = (f"{item.width}x{item.height}",) if item.height else ()
            clip = (f"{item.frames} frames",) if item.frames else ()
            facts = (f"seed {item.seed}", *size, *clip, f"{item.steps} steps")
            if name in self.manifest.done:
                cards.append(Card(item.prompt, facts, self.job.folder / self.manifest.done[name]["path"]))
            elif name in failed:
                cards.append(Card(item.prompt, facts, None, f"{failed[name]['error']}: {failed[name]['message']}"))
        return cards


def _plan_text(plan: Any) -> str:
    from fastdiff import Plan

    return (Plan() if plan is None else Plan.of(plan)).to_json()


def _devices() -> tuple[str, ...]:
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cpu",)


def _workers(model: Path, devices: tuple[str, ...]) -> int:
    """One for each GPU; on a CPU one a core, as long as their weights take less than a quarter of the free memory."""
    if devices[0] != "cpu":
        return len(devices)
    # float32 in memory may be twice what float16 takes on the disk
    weights = 2 * sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1
    return max(1, min(os.cpu_count() or 1, free // 4 // max(weights, 1)))
