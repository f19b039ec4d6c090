"""Batch jobs handed out by others, and the service; through Ray itself where it is installed."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastdiff_pipelines.batch import BatchJob, Item
from fastdiff_pipelines.batch import job as job_module
from fastdiff_pipelines.batch.items import Common, identity
from fastdiff_pipelines.batch.manifest import Manifest
from fastdiff_pipelines.batch.outputs import has_kind, read_about
from fastdiff_pipelines.batch.serving import Kitchen
from fastdiff_pipelines.batch.settings import Settings, Work
from fastdiff_pipelines.batch.worker import Worker


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_items: Any) -> BatchJob:
    """A job of 20 items whose model is found without being there."""
    monkeypatch.setattr(job_module, "resolve_model", lambda name: (Path("nowhere"), "fake@1"))
    return BatchJob(batch_items(20), tmp_path / "out", devices=["cpu"], workers=2, batch=4)


def test_handed_out_work_is_handed_out_until_all_is_settled(fake_job: BatchJob, fake_maker: Any) -> None:
    passes: list[int] = []

    def hand_out(path: Path, names: list[str]) -> Iterator[dict[str, str]]:
        passes.append(len(names))
        worker = Worker(Work.load(path), fake_job.folder, fake_maker())
        # a cluster that loses the second half of every pass
        for start in range(0, (len(names) + 1) // 2, 4):
            yield worker.process(names[start : start + 4])

    summary = fake_job.run_with(hand_out)
    assert (summary.done, summary.left, summary.is_complete) == (20, 0, True)
    assert passes == [20, 8, 4]
    assert fake_job.run_with(hand_out).skipped == 20
    assert len(passes) == 3


def test_requests_that_come_together_are_made_together_by_bucket(fake_maker: Any, tmp_path: Path) -> None:
    maker = fake_maker()
    kitchen = Kitchen(Settings("nowhere", Common("fake@1")), maker, "cpu")
    rows = [{"prompt": "a"}, {"prompt": "b", "size": 32}, {"prompt": "a"}, {"prompt": "nan"}]
    items = [kitchen.read(row) for row in rows]
    answers = kitchen.make(items)
    assert [len(call) for call in maker.calls] == [3, 1, 1]
    assert [answer.status for answer in answers] == [200, 200, 200, 500]
    assert answers[0] == answers[2]
    assert "NotFinite" in answers[3].error
    for item, answer in zip(items[:3], answers, strict=False):
        assert answer.id == identity(item, kitchen.settings.common)
        assert has_kind(answer.data, "png")
    (tmp_path / "a.png").write_bytes(answers[1].data)
    assert read_about(tmp_path / "a.png")["height"] == 32


@pytest.mark.parametrize("row", [[], {"steps": 3}, {"prompt": "a", "adapters": ["x"]}, {"prompt": "a", "size": "-1"}])
def test_requests_for_the_impossible_are_refused(fake_maker: Any, row: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Kitchen(Settings("nowhere", Common("fake@1")), fake_maker(), "cpu").read(row)


def _local_maker() -> Callable[[Settings, str], Any]:
    """Defined inside a function, so that it travels to Ray's processes by value."""
    import numpy as np

    from fastdiff_pipelines.batch.maker import Made

    class Maker:
        def __call__(self, items: Sequence[Item], is_aborted: Callable[[], bool]) -> Made:
            return Made([np.random.default_rng(item.seed).random((16, 16, 3)) for item in items], {"call": 0.01})

        def relieve(self) -> None: ...
        def restore(self) -> None: ...

    return lambda settings, device: Maker()


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    """A cluster of four logical CPUs."""
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'fastdiff[ray]'")
    from fastdiff_pipelines.batch.on_ray import cluster

    with cluster():
        yield ray


@pytest.mark.slow
def test_through_ray_every_file_is_the_same(ray_cluster: Any, fake_job: BatchJob, tmp_path: Path) -> None:
    from fastdiff_pipelines.batch.on_ray import run_on_ray

    killed: list[int] = []

    def killing(now: Any) -> None:
        if now.done and not killed:
            cards = (fake_job.folder / "job" / "claims").glob("card-*")
            killed.extend(json.loads(card.read_text())["process"] for card in cards)
            for process in killed:
                os.kill(process, signal.SIGKILL)

    summary = run_on_ray(fake_job, _local_maker(), killing)
    assert (summary.done, summary.left) == (20, 0)
    assert killed
    alone = BatchJob(fake_job.asked, tmp_path / "alone", devices=["cpu"], workers=1)
    alone.run_here(_local_maker()(alone.settings, "cpu"))
    for one in (fake_job, alone):
        view = Manifest(one.folder / "job")
        view.refresh()
        assert (len(view.done), view.repeated) == (20, 0)
    files = [{path.name: path.read_bytes() for path in one.folder.glob("*.png")} for one in (fake_job, alone)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_serve_answers_with_the_file(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve  # pyright: ignore[reportMissingImports]

    from fastdiff_pipelines.batch.serving import deployment

    settings = Settings("nowhere", Common("fake@1"), batch=4)
    serve.start(http_options={"host": "127.0.0.1", "port": 0})
    handle = serve.run(deployment(serve, settings, "cpu", 0.2, 16, _local_maker()), name="pictures")

    async def ask() -> list[Any]:
        items = [Item("a", seed=number) for number in range(6)]
        return list(await asyncio.gather(*(handle.together.remote(item) for item in items)))

    answers = asyncio.run(ask())
    assert all(has_kind(answer.data, "png") for answer in answers)
    assert len({answer.id for answer in answers}) == 6
    serve.shutdown()
