"""One worker and several: resume, sharing, crashes at every step, stopping (points 3 to 7, 9, 10, 14)."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff_pipelines.batch import outputs
from fastdiff_pipelines.batch import worker as worker_module
from fastdiff_pipelines.batch.claims import Claims, started_at, tidy
from fastdiff_pipelines.batch.errors import OUTPUT, Broken, Cancelled, JobError
from fastdiff_pipelines.batch.items import Item
from fastdiff_pipelines.batch.maker import Made
from fastdiff_pipelines.batch.manifest import Manifest
from fastdiff_pipelines.batch.outputs import read_about
from fastdiff_pipelines.batch.stop import Stop
from fastdiff_pipelines.batch.worker import Worker


def _view(folder: Path) -> Manifest:
    view = Manifest(folder / "job")
    view.refresh()
    return view


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: outputs.sha256(path.read_bytes()) for path in folder.glob("[!.]*.png")}


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in (*folder.glob(".part-*"), *(folder / "job" / "claims").iterdir())]


def test_everything_is_made_once_and_noted(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    maker = fake_maker()
    worker = batch_worker(batch_items(10), maker, batch=4)
    worker.run()
    view = _view(tmp_path)
    assert set(view.done) == set(worker.work.items)
    assert [len(call) for call in maker.calls] == [4, 4, 2]
    for name, line in view.done.items():
        item = worker.work.items[name]
        path = tmp_path / line["path"]
        assert (line["sha256"], line["bytes"]) == (outputs.sha256(path.read_bytes()), path.stat().st_size)
        assert (line["seed"], line["attempts"], line["class"]) == (item.seed, 1, "tolerance")
        assert {"denoise", "write"} == set(line["seconds"])
        about = read_about(path)
        assert (about["id"], about["prompt"], about["seed"]) == (name, item.prompt, item.seed)
        assert {"torch", "diffusers", "fastdiff"} <= set(line["versions"])
    assert _leftovers(tmp_path) == []


def test_batch_size_one_is_noted_as_bitwise(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    batch_worker(batch_items(3), fake_maker(), batch=1).run()
    assert {line["class"] for line in _view(tmp_path).done.values()} == {"bitwise"}


def test_only_what_is_missing_or_damaged_is_made_again(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    items = batch_items(6)
    batch_worker(items, fake_maker()).run()
    before = _hashes(tmp_path)
    victims = sorted(tmp_path.glob("*.png"))[:3]
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:-1])
    data = bytearray(victims[2].read_bytes())
    data[len(data) // 2] ^= 1
    victims[2].write_bytes(data)
    maker = fake_maker()
    batch_worker(items, maker).run()
    assert sum(map(len, maker.calls)) == 2
    maker = fake_maker()
    batch_worker(items, maker, verify="hash").run()
    assert sum(map(len, maker.calls)) == 1
    assert _hashes(tmp_path) == before
    maker = fake_maker()
    batch_worker(items, maker, verify="hash").run()
    assert maker.calls == []


def test_more_jobs_into_the_same_folder_make_only_what_is_new(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    batch_worker(batch_items(4), fake_maker()).run()
    maker = fake_maker()
    batch_worker(batch_items(7), maker).run()
    assert sum(map(len, maker.calls)) == 3
    assert len(_hashes(tmp_path)) == 7


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_and_order_change_nothing(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path, count: int
) -> None:
    batch_worker(batch_items(24), fake_maker(), tmp_path / "alone", batch=1).run()
    shuffled = batch_items(24)
    random.Random(count).shuffle(shuffled)
    workers = [batch_worker(shuffled, fake_maker(), tmp_path / "shared", batch=1, workers=count) for _ in range(count)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _hashes(tmp_path / "shared") == _hashes(tmp_path / "alone")
    view = _view(tmp_path / "shared")
    assert (len(view.done), view.repeated) == (24, 0)
    assert _leftovers(tmp_path / "shared") == []


def test_buckets_are_never_mixed_in_a_call(batch_worker: Any, fake_maker: Any, batch_items: Any) -> None:
    items = [*batch_items(5), *batch_items(5, height=32, width=16), *batch_items(3, steps=4)]
    random.Random(0).shuffle(items)
    maker = fake_maker()
    batch_worker(items, maker, batch=4).run()
    assert all(len({item.bucket for item in call}) == 1 for call in maker.calls)
    assert Counter(map(len, maker.calls)) == {4: 2, 1: 2, 3: 1}


def test_a_failure_is_final_for_this_run_and_tried_again_by_the_next(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        if any(item.prompt == "picture 2" for item in items):
            raise RuntimeError("bad luck")

    maker = fake_maker(trouble)
    batch_worker(batch_items(4), maker, attempts=2).run()
    batch_worker(batch_items(4), maker, attempts=2).run()
    assert sum(call[0].prompt == "picture 2" for call in maker.calls if len(call) == 1) == 2
    view = _view(tmp_path)
    line = next(iter(view.failed.values()))
    assert (line["error"], line["message"], len(view.done)) == ("RuntimeError", "bad luck", 3)
    batch_worker(batch_items(4), fake_maker(), since=line["time"] + 1).run()
    view = _view(tmp_path)
    assert (len(view.done), view.failed) == (4, {})


def _stopping(stop: Stop, times: int, maker: Any) -> Any:
    """A maker during whose second call the user asks `times` times to stop."""

    class Maker(maker):
        def __call__(self, items: Sequence[Item], is_aborted: Callable[[], bool]) -> Made:
            made = super().__call__(items, is_aborted)
            if len(self.calls) == 2:
                for _ in range(times):
                    stop.ask()
            if is_aborted():
                raise Cancelled
            return made

    return Maker()


@pytest.mark.parametrize(("times", "finished"), [(1, 6), (2, 3)])
def test_stopping_once_finishes_the_batch_and_twice_gives_it_up(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path, times: int, finished: int
) -> None:
    stop = Stop()
    batch_worker(batch_items(10), _stopping(stop, times, fake_maker), batch=3, stop=stop).run()
    assert len(_view(tmp_path).done) == finished
    assert _leftovers(tmp_path) == []
    maker = fake_maker()
    batch_worker(batch_items(10), maker, batch=3).run()
    assert sum(map(len, maker.calls)) == 10 - finished
    assert len(_view(tmp_path).done) == 10


def test_a_claim_lost_while_the_process_slept_makes_no_second_line(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    items = batch_items(2)
    thief = batch_worker(items, fake_maker(), name="thief")

    def asleep(group: Sequence[Item], measures: list[str]) -> None:
        if not any(tmp_path.glob("*.png")):
            # as if this process had been stopped for longer than its lease
            for path in (tmp_path / "job" / "claims").iterdir():
                path.with_suffix(".1").write_text("")
            thief.process(thief.work.items)
            thief.claims.look()
            for name in thief.work.items:
                thief.claims.held[name] = 1
            thief._left = set(items and thief.work.items)
            thief._make(list(thief.work.items))

    batch_worker(items, fake_maker(asleep), name="sleeper").run()
    view = _view(tmp_path)
    assert (len(view.done), view.repeated) == (2, 0)
    assert {line["worker"] for line in view.done.values()} == {"thief"}


@pytest.mark.skipif(started_at(os.getpid()) is None, reason="needs /proc to see which processes live")
def test_over_what_workers_died_is_tried_alone_and_at_last_given_up(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    worker = batch_worker(batch_items(5), fake_maker(), attempts=3)
    names = list(worker.work.items)
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    ghost = Claims(tmp_path / "job" / "claims", "ghost")
    card = ghost._card.replace(str(os.getpid()), str(ended.pid))
    for name, deaths in zip(names, (0, 1, 2, 3), strict=False):
        if deaths:
            (tmp_path / "job" / "claims" / f"{name}.{deaths - 1}").write_text(card)
    worker.run()
    view = _view(tmp_path)
    assert {name: line["error"] for name, line in view.failed.items()} == {names[3]: "WorkerDied"}
    assert "3 workers died" in view.failed[names[3]]["message"]
    assert set(view.done) == set(names) - {names[3]}
    assert sorted(view.done[name]["batch"] for name in names if name != names[3]) == [1, 1, 2, 2]
    assert _leftovers(tmp_path) == []


def test_a_broken_device_leaves_its_claims_for_others_to_see(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        raise Broken("device-side assert")

    with pytest.raises(Broken):
        batch_worker(batch_items(3), fake_maker(trouble)).run()
    assert len(list((tmp_path / "job" / "claims").glob("*.0"))) == 3
    assert _view(tmp_path).done == {}


def test_a_full_disk_is_one_error_and_fails_no_item(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = worker_module.write_whole
    written = []

    def filling(path: Path, data: bytes, durable: bool = True) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, data, durable)

    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "write_whole", filling)
        with pytest.raises(JobError, match="the disk is full; free some space") as caught:
            batch_worker(batch_items(5), fake_maker(), batch=1).run()
    assert caught.value.code == OUTPUT
    view = _view(tmp_path)
    assert (len(view.done), view.failed) == (2, {})
    assert _leftovers(tmp_path) == []
    batch_worker(batch_items(5), fake_maker(), batch=1).run()
    assert len(_view(tmp_path).done) == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_is_survived(batch_worker: Any, batch_items: Any, fake_maker: Any, small_disk: Path) -> None:
    items = batch_items(30, height=64, width=64)
    with pytest.raises(JobError, match="the disk is full"):
        batch_worker(items, fake_maker(), small_disk, batch=1).run()
    view = _view(small_disk)
    assert 5 < len(view.done) < 30
    assert (view.failed, view.damaged) == ({}, 0)
    for line in view.done.values():
        assert outputs.sha256((small_disk / line["path"]).read_bytes()) == line["sha256"]


def _dies_at(count: int, run: Callable[[], object]) -> bool:
    """Runs in a child that is killed at its n-th operation on the disk; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = [count]

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **others: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    # not even `finally` runs, as with kill -9
                    os._exit(9)
                return function(*arguments, **others)

            return call

        for name in ("link", "mkdir", "open", "write", "fsync", "replace", "unlink", "close"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("count", "batch"), [(2, 1), (3, 3)])
def test_killed_at_every_step_nothing_is_lost_or_doubled(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path, count: int, batch: int
) -> None:
    items = batch_items(count)
    batch_worker(items, fake_maker(), tmp_path / "whole").run()
    expected = _hashes(tmp_path / "whole")

    def work(folder: Path) -> list[list[Item]]:
        maker = fake_maker()
        batch_worker(items, maker, folder, batch=batch).run()
        return maker.calls

    died, step = True, 0
    while died:
        folder = tmp_path / str(step)
        died = _dies_at(step, partial(work, folder))
        before = len(_view(folder).done)
        calls = work(folder)
        view = _view(folder)
        assert _hashes(folder) == expected
        assert (len(view.done), view.repeated, view.damaged) == (count, 0, 0)
        assert sum(map(len, calls)) == count - before
        tidy(folder / "job" / "claims", view.done)
        assert list((folder / "job" / "claims").iterdir()) == []
        step += 1
    assert step > 20


def test_handed_out_work_is_done_once(batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path) -> None:
    items = [*batch_items(4), *batch_items(2, steps=3)]
    one, two = batch_worker(items, fake_maker(), name="one"), batch_worker(items, fake_maker(), name="two")
    names = list(one.work.items)
    assert one.claims.take(names[5]) == 0
    assert two.process(names) == {**dict.fromkeys(names, "done"), names[5]: "elsewhere"}
    assert one.process(names[:5]) == dict.fromkeys(names[:5], "done")
    assert len(one.attempts.make.calls) == 0
    one.claims.release([names[5]])
    assert two.process(names[5:]) == {names[5]: "done"}
    assert (len(_view(tmp_path).done), _view(tmp_path).repeated) == (6, 0)


def test_a_format_that_cannot_hold_an_item_fails_only_that_item(
    batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path
) -> None:
    items = [*batch_items(2), *(replace(item, frames=3) for item in batch_items(1, prompt="clip"))]
    batch_worker(items, fake_maker(), format="jpg").run()
    view = _view(tmp_path)
    assert len(view.done) == 2
    assert "one picture" in next(iter(view.failed.values()))["message"]


def test_pixels_reach_the_file(batch_worker: Any, batch_items: Any, fake_maker: Any, tmp_path: Path) -> None:
    from PIL import Image

    worker: Worker = batch_worker(batch_items(3), fake_maker())
    worker.run()
    for name, line in _view(tmp_path).done.items():
        with Image.open(tmp_path / line["path"]) as image:
            expected = np.rint(fake_maker.pixels(worker.work.items[name]) * 255)
            assert np.array_equal(np.asarray(image), expected)
