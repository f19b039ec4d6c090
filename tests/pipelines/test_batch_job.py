"""Whole jobs: summaries, progress, metrics, contact sheet, worker processes (points 10 to 12 and the real thing)."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff_pipelines.batch import BatchJob, Item, JobError, Progress, Stop, crew
from fastdiff_pipelines.batch import job as job_module
from fastdiff_pipelines.batch.errors import MODEL
from fastdiff_pipelines.batch.items import Common
from fastdiff_pipelines.batch.metrics import metrics, prometheus
from fastdiff_pipelines.batch.progress import Pace
from fastdiff_pipelines.batch.settings import Settings
from fastdiff_pipelines.batch.sheet import Card, contact_sheet


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job finds a model without one being there."""
    monkeypatch.setattr(job_module, "resolve_model", lambda name: (Path("nowhere"), "fake@1"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Workers of these jobs use one thread; torch's setting here is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("fake_model")
def test_a_job_says_what_became_of_everything(fake_maker: Any, tmp_path: Path) -> None:
    items = [Item("one", seed=1), Item("two"), Item("one", seed=1), Item("nan")]
    job = BatchJob(items, tmp_path, devices=["cpu"], workers=1)
    seen: list[Progress] = []
    summary = job.run_here(fake_maker(), seen.append)
    assert (summary.done, summary.skipped, summary.aliases, summary.left) == (2, 0, 1, 0)
    assert not summary.is_complete
    assert [line["error"] for line in summary.failed.values()] == ["NotFinite"]
    assert (seen[-1].total, seen[-1].done, seen[-1].failed, seen[-1].left_s) == (3, 2, 1, 0.0)
    ids = job.ids()
    assert ids[0] == ids[2]
    assert job.path(ids[0]).is_file()
    # the failed one is tried again, what is there is not
    again = BatchJob(items[:3], tmp_path, devices=["cpu"], workers=1).run_here(fake_maker())
    assert (again.done, again.skipped, again.is_complete) == (0, 2, True)
    assert json.loads((tmp_path / "job" / "metrics.json").read_text())["items"]["done"] == 2


@pytest.mark.usefixtures("fake_model")
def test_a_job_does_not_run_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no items"):
        BatchJob([], tmp_path)
    wrongs: list[dict[str, Any]] = [
        {"batch": 0},
        {"attempts": 0},
        {"format": "gif"},
        {"verify": "luck"},
        {"lease_s": 0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BatchJob([Item("p")], tmp_path, devices=["cpu"], **wrong)


def _line(name: str, status: str = "done", **others: Any) -> dict[str, Any]:
    same = {"attempts": 1, "bytes": 10, "peak_bytes": 5, "device": "cpu", "class": "bitwise"}
    return {"id": name, "status": status, "seconds": {"denoise": 2.0}, **same, **others}


def test_remaining_time_counts_each_shape_at_its_own_pace() -> None:
    small = {f"s{number}": Item("p", seed=number, height=64, width=64, steps=10) for number in range(4)}
    large = {f"l{number}": Item("p", seed=number, height=128, width=128, steps=10) for number in range(4)}
    pace = Pace(small | large, ["s0"], workers=2)
    assert pace.left_s(1.0) is None
    pace.take(_line("s1"))
    pace.take(_line("s1"))
    pace.take(_line("elsewhere"))
    # two small ones at 2 s, four large ones not met yet at four times that, by two workers
    assert pace.left_s(1.0) == pytest.approx((2 * 2 + 4 * 8) / 2)
    pace.take(_line("l0", seconds={"denoise": 5.0}))
    assert pace.left_s(1.0) == pytest.approx((2 * 2 + 3 * 5) / 2)
    # where waiting and loading took as long again, the rest will too
    assert pace.left_s(7.0) == pytest.approx((2 * 2 + 3 * 5) / 2 * 2)
    pace.take(_line("s2", "failed", error="E"))
    now = pace.now()
    assert (now.total, now.done, now.skipped, now.failed) == (8, 2, 1, 1)


def test_metrics_are_the_sums_of_the_lines() -> None:
    done = [_line("a", attempts=2), _line("b", peak_bytes=7, seconds={"denoise": 0.2, "write": 0.02})]
    found = metrics(done, [_line("c", "failed", error='Odd "name"', attempts=3)], skipped=4)
    assert found["items"] == {"done": 2, "failed": 1, "skipped": 4}
    assert (found["tries"], found["retried"], found["bytes"], found["peak_bytes"]) == (6, 2, 20, {"cpu": 7})
    denoise = found["seconds"]["denoise"]
    assert (denoise["count"], denoise["sum"], denoise["buckets"]["0.3"], denoise["buckets"]["3.0"]) == (2, 2.2, 1, 2)
    text = prometheus(found)
    assert 'fastdiff_batch_items_total{state="done"} 2' in text
    assert 'fastdiff_batch_errors_total{error="Odd \\"name\\""} 1' in text
    assert 'fastdiff_batch_seconds_bucket{stage="denoise",le="+Inf"} 2' in text
    sample = re.compile(r'[a-z_]+(\{[a-z]+="(\\.|[^"\\])*"(,[a-z]+="[^"]*")*\})? [0-9.e+]+')
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in text.splitlines())


class _Page(HTMLParser):
    """What a page loads and links to."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                self.loaded.append(value or "")
            if name == "href":
                self.linked.append(value or "")


def test_the_contact_sheet_needs_no_other_file_and_takes_no_orders_from_prompts(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    evil = '<script>alert("x")</script> $title ${cards}'
    cards = [
        Card(evil, ("seed 1",), tmp_path / "a.png"),
        Card("gone", ("seed 2",), tmp_path / "gone.png"),
        Card("bad", ("seed 3",), None, "OutOfMemory: <b>"),
    ]
    text = contact_sheet(tmp_path, "a & b", {"outputs": "1"}, cards, "a note", most=5)
    page = _Page(text)
    assert page.tags.count("script") == 1
    assert page.tags.count("figure") == 3
    assert page.linked == ["a.png"]
    assert all(one.startswith("data:image/webp;base64,") for one in page.loaded)
    assert len(page.loaded) == 1
    assert "&lt;script&gt;" in text
    assert "OutOfMemory: &lt;b&gt;" in text
    assert "The first 1 of 2 are shown" in contact_sheet(tmp_path, "t", {}, cards, most=1)


def _crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: list[str], notes: list[str]) -> crew.Crew:
    """A crew whose workers run these lines of Python, one after another."""

    def start(self: crew.Crew, device: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, "-c", scripts.pop(0)], stdout=file, stderr=file)

    monkeypatch.setattr(crew.Crew, "_start", start)
    return crew.Crew(tmp_path / "work", Settings("m", Common("m"), workers=1, attempts=1), notes.append)


def _watch(team: crew.Crew, progressed: bool = False) -> None:
    with team:
        while team.watch(progressed, False):
            team.members[0].process.wait()


def test_what_no_worker_can_mend_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('noise'); print('error: cannot load it', file=sys.stderr); sys.exit(5)"
    with pytest.raises(JobError, match=r"^cannot load it$") as caught:
        _watch(_crew(tmp_path, monkeypatch, [script], []))
    assert caught.value.code == MODEL


def test_a_killed_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    team = _crew(tmp_path, monkeypatch, ["import os; os.kill(os.getpid(), 9)", "pass"], notes)
    _watch(team)
    assert team.deaths == 1
    assert notes == ["worker 0 was killed by SIGKILL; its work is taken over"]


def test_workers_that_only_die_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = ["raise ValueError('odd')"] * 9
    with pytest.raises(JobError, match=r"die again and again.*ValueError: odd"):
        _watch(_crew(tmp_path, monkeypatch, scripts, []))
    assert len(scripts) == 6
    # as long as each of them gets something done, they may go on dying
    scripts = ["raise ValueError('odd')"] * 8 + ["pass"]
    _watch(_crew(tmp_path, monkeypatch, scripts, []), progressed=True)
    assert scripts == []


def _processes(folder: Path) -> list[int]:
    found = []
    for path in (folder / "job" / "claims").glob("card-*"):
        try:
            found.append(json.loads(path.read_text())["process"])
        except (FileNotFoundError, ValueError):
            continue
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.png")}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_stopped_then_killed_the_job_ends_with_the_same_bytes(tmp_path: Path) -> None:
    from fastdiff.miniature import untrained

    untrained().save_pretrained(tmp_path / "model")
    items = [Item(f"a circle number {number}", steps=6) for number in range(8)]

    def job(name: str, workers: int) -> BatchJob:
        return BatchJob(
            items,
            tmp_path / name,
            model=str(tmp_path / "model"),
            devices=["cpu"],
            workers=workers,
            batch=1,
            plan="exact",
        )

    stop, killed = Stop(), []

    def stopping(now: Progress) -> None:
        if now.done and not stop.asked:
            stop.ask()

    def killing(now: Progress) -> None:
        if now.done and not killed:
            killed.extend(_processes(tmp_path / "out")[:1])
            for process in killed:
                os.kill(process, signal.SIGKILL)

    first = job("out", 2).run(stopping, stop=stop)
    assert 0 < first.done < 8
    assert first.left == 8 - first.done
    notes: list[str] = []
    second = job("out", 2).run(killing, notes.append)
    assert (second.done, second.skipped, second.left) == (8 - first.done, first.done, 0)
    assert second.deaths == len(killed)
    assert all("SIGKILL" in note for note in notes)
    # two workers on two cores get one thread each; so does this one
    os_count = os.cpu_count() or 1
    alone = job("alone", min(2, os_count)).run_here()
    assert alone.is_complete
    assert _files(tmp_path / "out") == _files(tmp_path / "alone")
    assert list((tmp_path / "out" / "job" / "claims").iterdir()) == []


@pytest.mark.usefixtures("one_thread")
def test_a_batch_is_its_items_alone_up_to_rounding(tmp_path: Path) -> None:
    from fastdiff import Plan
    from fastdiff.miniature import untrained
    from fastdiff_pipelines.batch.maker import DiffusersMaker

    untrained().save_pretrained(tmp_path / "model")
    torch.set_num_threads(1)
    make = DiffusersMaker(tmp_path / "model", Plan())
    words = ("a red circle", "a very large blue square at the top left on a green background", "ring")
    items = [Item(prompt, "blur" if number else "", seed=number, steps=4) for number, prompt in enumerate(words)]
    together = make(items, lambda: False).pixels
    reversed_order = make(items[::-1], lambda: False).pixels[::-1]
    pipe: Any = untrained()
    pipe.set_progress_bar_config(disable=True)
    for item, one, other in zip(items, together, reversed_order, strict=True):
        alone = make([item], lambda: False).pixels[0]
        plain = pipe(
            item.prompt,
            negative_prompt=item.negative,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(item.seed or 0),
            output_type="np",
        ).images[0]
        assert (alone == plain).all()
        assert abs(one - plain).max() <= 2e-6
        assert abs(other - plain).max() <= 2e-6


def _abort(after: int) -> Callable[[], bool]:
    left = [after]

    def asked() -> bool:
        left[0] -= 1
        return left[0] < 0

    return asked


def test_the_model_stops_between_steps_and_works_on_after(tmp_path: Path) -> None:
    from fastdiff import Plan
    from fastdiff.miniature import untrained
    from fastdiff_pipelines.batch.errors import Cancelled
    from fastdiff_pipelines.batch.maker import DiffusersMaker

    untrained().save_pretrained(tmp_path / "model")
    make = DiffusersMaker(tmp_path / "model", Plan.of("exact"))
    items: Sequence[Item] = [Item("p", seed=1, steps=4)]
    before = make(items, lambda: False).pixels[0]
    calls = []
    make.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(Cancelled):
        make(items, _abort(1))
    assert len(calls) == 2
    assert (make(items, lambda: False).pixels[0] == before).all()
    assert make.relieve() == "tiled decoding"
    assert make.relieve() is None
    make.restore()
    assert (make(items, lambda: False).pixels[0] == before).all()
    with pytest.raises(ValueError, match="num_frames"):
        make([Item("p", seed=1, frames=4)], lambda: False)
