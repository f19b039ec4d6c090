"""`bench batch`: many pictures of the embedded model, as people loop over prompts and as a batch job makes them.

Rows:
    naive: `for prompt in prompts: pipe(prompt)` in one process with all threads, each picture saved.
    fastdiff: a batch job with one worker a core and batches of one; the same prompts, seeds and steps.
        `max_abs_difference` is between its pixels (0..1, before rounding) and the naive loop's with one thread, and
        `different` counts files that are not the bytes that loop gives.
    fastdiff-8: the same with batches of eight under the plan "exact": faster, and no longer bit for bit, because
        matrix products of another size round otherwise.
    killed: a job of 200 pictures whose processes are killed (kill -9) at random moments, one worker or all at once, and
        which is started again where all are gone. `redone` counts pictures begun by a worker that died and made by
        another; with batches of one it may be as large as `worker_deaths`, never larger. `times_undisturbed` is its
        time over that of the same job without kills.
    ray: a killed job handed out by Ray.

`ms_median` is the time between two pictures of the whole machine: from the moment the models are loaded to the last
picture, divided by the pictures; `with_start_ms` counts the loading too. Rounds take turns.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import fastdiff
from benchmarks.record import Record, Row, could_not_run
from fastdiff.miniature import world
from fastdiff.quality import Interval
from fastdiff.runtime.prompt_cache import PromptCache
from fastdiff_pipelines.batch import BatchJob, Item
from fastdiff_pipelines.batch.attempts import to_bytes
from fastdiff_pipelines.batch.items import to_row, with_seeds
from fastdiff_pipelines.batch.maker import DiffusersMaker
from fastdiff_pipelines.batch.manifest import Manifest
from fastdiff_pipelines.batch.notes import Notes
from fastdiff_pipelines.batch.outputs import encode, sha256

WORKERS, STEPS = 2, 20
# for each row of a job: pictures in a batch, and the plan
WAYS: dict[str, tuple[int, fastdiff.Plan]] = {
    "fastdiff": (1, fastdiff.Plan((PromptCache(),))),
    "fastdiff-8": (8, fastdiff.Plan.of("exact")),
}
COMPARED = 16
KILLED_ITEMS, KILLED_STEPS, KILLS = 200, 6, 12
WAIT_S = 600


def prompts(count: int, steps: int) -> list[Item]:
    """Captions of random scenes, each with its seed."""
    rng = np.random.default_rng(6)
    return with_seeds([Item(world.caption(world.random_scene(rng)), steps=steps) for _ in range(count)], 6)


def run(full: bool = False) -> Record:
    """Runs the benchmark; `full` takes three times as many pictures and rounds."""
    items = prompts(96 if full else 32, STEPS)
    record = Record("batch")
    with tempfile.TemporaryDirectory() as folder:
        record.rows += _throughput(items, 6 if full else 2, Path(folder))
        record.rows.append(_killed(Path(folder)))
        try:
            record.rows.append(_through_ray(Path(folder)))
        except ModuleNotFoundError as error:
            record.rows.append(could_not_run("ray", f'{error.name} is not installed: pip install "fastdiff[ray]"'))
        except (RuntimeError, OSError) as error:
            record.rows.append(could_not_run("ray", error))
    return record.finish()


def _throughput(items: Sequence[Item], rounds: int, folder: Path) -> list[Row]:
    naive: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    pipe = _pipe()
    _naive(pipe, items[:2], folder / "warm")
    for number in range(rounds):
        naive += _naive(pipe, items, folder / f"naive-{number}")
        for name, times in taken.items():
            times.append(_job_ms(_job(items, name, folder / f"{name}-{number}")))
    note = f"{len(items)} pictures, {STEPS} steps, {rounds} rounds"
    rows = [Row.timed("naive", naive, note=f"{torch.get_num_threads()} threads, {note}")]
    with _one_thread():
        expected = [_picture(pipe, item) for item in items[:COMPARED]]
        for name, times in taken.items():
            loaded, whole = zip(*times, strict=True)
            row = Row.timed(name, loaded, note=f"{WORKERS} workers, batches of {WAYS[name][0]}, {note}")
            row.quality = {"with_start_ms": Interval(float(np.median(whole)), min(whole), max(whole), len(whole))}
            row.quality |= _compare(_job(items, name, folder / f"{name}-0"), items[:COMPARED], expected)
            rows.append(row)
    return rows


def _pipe() -> Any:
    pipe = fastdiff.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture(pipe: Any, item: Item) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(item.seed or 0)
    options = dict(num_inference_steps=item.steps, guidance_scale=item.guidance, output_type="np")
    return pipe(item.prompt, generator=generator, **options).images[0]


def _naive(pipe: Any, items: Sequence[Item], folder: Path) -> list[float]:
    """Milliseconds of each picture."""
    folder.mkdir()
    taken = []
    for number, item in enumerate(items):
        start = time.perf_counter()
        pixels = to_bytes(_picture(pipe, item))
        (folder / f"{number}.png").write_bytes(encode(pixels, "png", {"prompt": item.prompt}))
        taken.append((time.perf_counter() - start) * 1000)
    return taken


def _job(items: Sequence[Item], name: str, folder: Path) -> BatchJob:
    batch, plan = WAYS[name]
    return BatchJob(items, folder, devices=["cpu"], workers=WORKERS, batch=batch, plan=plan)


def _job_ms(job: BatchJob) -> tuple[float, float]:
    """Milliseconds between two pictures: from loaded models on, and from the start of the job."""
    start = time.time()
    summary = job.run()
    if not summary.is_complete:
        raise RuntimeError(f"the job left {summary.left} pictures and failed at {len(summary.failed)}")
    view = Manifest(job.folder / "job")
    view.refresh()
    end = max(line["time"] for line in view.done.values())
    logs = [log.read_text("utf-8").splitlines() for log in (job.folder / "job").glob("worker-*.log")]
    ready = min(float(line.split()[1]) for log in logs for line in log if line.startswith("ready "))
    return (end - ready) * 1000 / len(view.done), (end - start) * 1000 / len(view.done)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(job: BatchJob, some: Sequence[Item], expected: Sequence[np.ndarray]) -> dict[str, Interval]:
    """Largest difference of a job's pixels to the naive loop's, and how many of its files are other bytes."""
    plan = fastdiff.Plan.from_json(job.settings.common.plan) if job.settings.common.plan else fastdiff.Plan()
    make = DiffusersMaker(Path(job.settings.model), plan)
    size = job.settings.batch
    made = [one for at in range(0, len(some), size) for one in make(some[at : at + size], lambda: False).pixels]
    difference = max(float(np.abs(one - other).max()) for one, other in zip(made, expected, strict=True))
    notes = Notes(job.settings, "cpu", "bench")
    different = 0
    for name, item, pixels in zip(job.ids(), some, expected, strict=False):
        different += job.path(name).read_bytes() != encode(to_bytes(pixels), "png", notes.about(name, item))
    return {
        "max_abs_difference": Interval.exact(difference, len(some)),
        "different": Interval.exact(different, len(some)),
    }


def _write_jobs(items: Sequence[Item], path: Path) -> None:
    keys = ("prompt", "seed", "steps")
    path.write_text("\n".join(json.dumps({key: to_row(item)[key] for key in keys}) for item in items), "utf-8")


def _start(jobs: Path, folder: Path) -> psutil.Popen:
    words = [sys.executable, "-m", "fastdiff_app.cli", "batch", str(jobs), "-o", str(folder)]
    options = ["--workers", str(WORKERS), "--batch-size", "1", "--progress", "none"]
    return psutil.Popen([*words, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _killed(folder: Path) -> Row:
    items = prompts(KILLED_ITEMS, KILLED_STEPS)
    _write_jobs(items, folder / "jobs.jsonl")
    started = time.perf_counter()
    if _start(folder / "jobs.jsonl", folder / "whole").wait(WAIT_S):
        return could_not_run("killed", "the job without kills did not end well")
    whole_s = time.perf_counter() - started
    rng = random.Random(6)
    # the moments, as numbers of finished pictures and then a part of a second
    moments = sorted(rng.sample(range(1, KILLED_ITEMS - 5), KILLS))
    view = Manifest(folder / "killed" / "job")
    started = time.perf_counter()
    job = _start(folder / "jobs.jsonl", folder / "killed")
    kills = deaths = 0
    while kills < KILLS or job.poll() is None:
        if time.perf_counter() - started > WAIT_S:
            job.kill()
            return could_not_run("killed", f"not finished after {WAIT_S} s and {kills} kills")
        view.refresh()
        if kills < KILLS and len(view.done) >= moments[kills]:
            time.sleep(rng.random())
            died = _kill(job, rng, everyone=kills % 3 == 2)
            kills += died > 0
            deaths += died
        if kills < KILLS and job.poll() is not None:
            job = _start(folder / "jobs.jsonl", folder / "killed")
        time.sleep(0.1)
    while job.wait(WAIT_S) != 0 and time.perf_counter() - started < WAIT_S:
        job = _start(folder / "jobs.jsonl", folder / "killed")
    quality = _damage(folder / "killed", folder / "whole", kills) | {"worker_deaths": Interval.exact(deaths, kills)}
    seconds = time.perf_counter() - started
    note = f"{KILLED_ITEMS} pictures, {kills} kills; {seconds:.0f} s, without kills {whole_s:.0f} s"
    quality["times_undisturbed"] = Interval.exact(seconds / whole_s)
    return Row("killed", quality=quality, note=note)


def _kill(job: psutil.Popen, rng: random.Random, everyone: bool) -> int:
    """Kills one worker, or the job with all its workers; how many workers that were."""
    with suppress(psutil.NoSuchProcess):
        workers = [child for child in job.children() if child.is_running()]
        victims = [job, *workers] if everyone else [rng.choice(workers)] if workers else []
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        if everyone:
            job.wait()
        return len(victims) - everyone if victims else 0
    return 0


def _damage(folder: Path, whole: Path, kills: int) -> dict[str, Interval]:
    """What the kills cost: pictures lost, doubled, different, and done again."""
    found, expected = Manifest(folder / "job"), Manifest(whole / "job")
    found.refresh()
    expected.refresh()
    different = sum(
        sha256((folder / line["path"]).read_bytes()) != expected.done[name]["sha256"]
        for name, line in found.done.items()
        if name in expected.done
    )
    figures = {
        "lost": len(expected.done.keys() - found.done.keys()),
        "duplicated": found.repeated,
        "different": different,
        "redone": sum(line["deaths"] for line in found.done.values()),
        "damaged_lines": found.damaged,
    }
    return {name: Interval.exact(value, kills) for name, value in figures.items()}


def _through_ray(folder: Path) -> Row:
    from fastdiff_pipelines.batch.on_ray import run_on_ray

    items = prompts(KILLED_ITEMS, KILLED_STEPS)
    job = BatchJob(items, folder / "ray", devices=["cpu"], workers=WORKERS, batch=1, plan="exact")
    rng = random.Random(7)
    moments = sorted(rng.sample(range(1, KILLED_ITEMS - 5), KILLS))
    kills = 0

    def killing(now: Any) -> None:
        nonlocal kills
        if kills < KILLS and now.done >= moments[kills]:
            cards = [card.read_text("utf-8") for card in (folder / "ray" / "job" / "claims").glob("card-*")]
            alive = [number for card in cards if psutil.pid_exists(number := json.loads(card)["process"])]
            for number in rng.sample(alive, min(1, len(alive))):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(number).kill()
                    kills += 1

    summary = run_on_ray(job, on_progress=killing)
    quality = _damage(folder / "ray", folder / "whole", kills)
    note = f"{KILLED_ITEMS} pictures, {kills} kills, {summary.seconds:.0f} s with the cluster's start"
    return Row("ray", quality=quality, note=note)
