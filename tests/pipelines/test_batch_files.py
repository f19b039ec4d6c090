"""Manifests, claims and outputs: what lies on the disk (points 3, 4, 5, 7 of the contract of batch jobs)."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastdiff_pipelines.batch import claims as claims_module
from fastdiff_pipelines.batch import manifest as manifest_module
from fastdiff_pipelines.batch import outputs
from fastdiff_pipelines.batch.claims import Claims, host_identity, started_at, worker_name
from fastdiff_pipelines.batch.errors import JobError
from fastdiff_pipelines.batch.manifest import Manifest, Part

ABOUT = {"prompt": 'a "red" circle, größer\n赤', "seed": 2**63 - 1, "guidance": 5.0, "negative": ""}


def _done(name: str, **others: object) -> dict:
    return {"status": "done", "id": name, **others}


def test_lines_of_all_parts_are_read_as_one_and_only_once(tmp_path: Path) -> None:
    view = Manifest(tmp_path)
    Part(tmp_path, "one").append([_done("a"), {"status": "failed", "id": "b", "time": 1.0}])
    assert [line["id"] for line in view.refresh()] == ["a", "b"]
    Part(tmp_path, "two").append([_done("b")])
    Part(tmp_path, "one").append([_done("c")])
    assert sorted(line["id"] for line in view.refresh()) == ["b", "c"]
    assert view.refresh() == []
    assert set(view.done) == {"a", "b", "c"}
    assert view.failed == {}
    assert view.repeated == 0


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_not_there_yet(tmp_path: Path, cut: int) -> None:
    Part(tmp_path, "one").append([_done("a"), _done("b", path="x" * 20)])
    path = tmp_path / "part-one.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    view = Manifest(tmp_path)
    view.refresh()
    assert set(view.done) == {"a"}
    # what was cut off may be a write still going on: when it arrives, it counts
    path.write_bytes(whole)
    view.refresh()
    assert set(view.done) == {"a", "b"}
    assert view.damaged == 0


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    Part(tmp_path, "one").append([_done("a"), _done("b")])
    path = tmp_path / "part-one.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"status": "done"}\n\x00\xff\n[]\n' + lines[1])
    view = Manifest(tmp_path)
    view.refresh()
    assert (set(view.done), view.damaged) == ({"a", "b"}, 3)


def test_a_line_that_cannot_be_synced_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(tmp_path, "one")
    part.append([_done("a")])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            part.append([_done("b")])
    part.append([_done("c")])
    view = Manifest(tmp_path)
    view.refresh()
    assert (list(view.done), view.damaged) == (["a", "c"], 0)


def test_lines_are_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(manifest_module.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    Part(tmp_path, "one").append([_done("a")])
    assert synced[0] == (tmp_path / "part-one.jsonl").stat().st_size


def _dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    return ended.pid


def _orphan(folder: Path, key: str, **card: object) -> None:
    """The claim of a process of this machine that is gone."""
    found = {"worker": "gone", "host": host_identity(), "process": _dead_process(), "started": "1", **card}
    (folder / f"{key}.0").write_text(json.dumps(found))


def test_a_claim_is_held_by_one(tmp_path: Path) -> None:
    one, two = Claims(tmp_path, "one"), Claims(tmp_path, "two")
    assert one.take("a") == 0
    assert one.take("a") is None
    assert two.take("a") is None
    two.look()
    assert two.take("a") is None
    assert two.take("b") == 0
    one.release(["a"])
    two.look()
    assert two.take("a") == 0
    two.close()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_claim_at_once_one_wins(tmp_path: Path) -> None:
    keys = [f"key{number}" for number in range(30)]
    for key in keys[::2]:
        _orphan(tmp_path, key, process=2**22 - 1)
    wins: list[tuple[str, int | None]] = []
    gate = threading.Barrier(6)

    def race(name: str) -> None:
        claims = Claims(tmp_path, name)
        claims.look()
        gate.wait()
        wins.extend((key, generation) for key in keys if (generation := claims.take(key)) is not None)

    threads = [threading.Thread(target=race, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == sorted((key, 1 if place % 2 == 0 else 0) for place, key in enumerate(keys))


def test_without_links_claims_work_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(claims_module.os, "link", no_links)
    one, two = Claims(tmp_path, "one"), Claims(tmp_path, "two")
    assert one.take("a") == 0
    assert two.take("a") is None
    assert (tmp_path / "a.0").read_bytes() == (tmp_path / "card-one").read_bytes()


@pytest.mark.skipif(started_at(os.getpid()) is None, reason="needs /proc to see which processes live")
def test_claims_of_dead_processes_are_taken_over_at_once_and_counted(tmp_path: Path) -> None:
    _orphan(tmp_path, "a")
    two = Claims(tmp_path, "two")
    two.look()
    assert two.generation("a") == 1
    assert two.take("a") == 1
    two.abandon()
    # this process lives, so its abandoned claim stays its own until the lease ends
    three = Claims(tmp_path, "three")
    three.look()
    assert three.take("a") is None


@pytest.mark.skipif(started_at(os.getpid()) is None, reason="needs /proc to see which processes live")
def test_a_process_number_given_again_is_another_process(tmp_path: Path) -> None:
    _orphan(tmp_path, "a", process=os.getpid(), started="1")
    _orphan(tmp_path, "b", process=os.getpid(), started=started_at(os.getpid()))
    claims = Claims(tmp_path, "two")
    claims.look()
    assert claims.take("a") == 1
    assert claims.take("b") is None


@pytest.mark.parametrize("card", [{"host": "another"}, None])
def test_elsewhere_only_the_lease_tells(tmp_path: Path, card: dict | None) -> None:
    now = [0.0]
    _orphan(tmp_path, "a", **(card or {}))
    if card is None:
        # an owner that died between making its claim and signing it
        (tmp_path / "a.0").write_text("")
    claims = Claims(tmp_path, "two", lease_s=10.0, clock=lambda: now[0])
    for moment in (0.0, 9.0):
        now[0] = moment
        claims.look()
        assert claims.take("a") is None
    os.utime(tmp_path / "a.0", (5, 5))
    now[0] = 18.0
    assert claims.take("a") is None
    now[0] = 28.5
    assert claims.take("a") == 1


def test_a_sign_of_life_keeps_a_claim_and_its_loss_is_seen(tmp_path: Path) -> None:
    now = [0.0]
    one = Claims(tmp_path, "one", lease_s=10.0)
    two = Claims(tmp_path, "two", lease_s=10.0, clock=lambda: now[0])
    one.take("a")
    for moment in (0.0, 9.0, 18.0):
        now[0] = moment
        os.utime(tmp_path / "a.0", (moment, moment))
        two.look()
        assert two.take("a") is None
    assert not one.is_lost("a")
    now[0] = 28.5
    assert two.take("a") == 1
    assert one.is_lost("a")
    before = (tmp_path / "a.1").stat().st_mtime_ns
    os.utime(tmp_path / "a.1", ns=(0, 0))
    two.beat()
    assert (tmp_path / "a.1").stat().st_mtime_ns >= before


def test_worker_names_are_never_given_twice() -> None:
    assert len({worker_name() for _ in range(100)}) == 100


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "mp4"])
@pytest.mark.parametrize("shape", [(24, 40, 3), (17, 23, 3)])
def test_outputs_carry_their_parameters_and_repeat_byte_for_byte(tmp_path: Path, kind: str, shape: tuple) -> None:
    data = outputs.encode(_pixels(*shape), kind, ABOUT)
    assert data == outputs.encode(_pixels(*shape), kind, ABOUT)
    assert outputs.has_kind(data, kind)
    assert not any(outputs.has_kind(data, other) for other in ("png", "jpg", "webp", "mp4") if other != kind)
    (tmp_path / f"a.{kind}").write_bytes(data)
    assert outputs.read_about(tmp_path / f"a.{kind}") == ABOUT


def test_a_png_keeps_every_pixel_and_shows_its_prompt_to_other_programs(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a.png").write_bytes(outputs.encode(_pixels(24, 40, 3), "png", ABOUT))
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), _pixels(24, 40, 3))
        assert image.info["prompt"] == ABOUT["prompt"]


@pytest.mark.parametrize("kind", ["png", "webp", "mp4"])
def test_clips_keep_all_their_frames(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(outputs.encode(_pixels(5, 24, 40, 3), kind, ABOUT, fps=4))
    assert outputs.read_about(path) == ABOUT
    if kind == "mp4":
        import av

        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 4
            assert sum(1 for _ in container.decode(video=0)) == 5
    else:
        from PIL import Image

        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == 5


def test_a_jpeg_of_a_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="one picture"):
        outputs.encode(_pixels(2, 24, 40, 3), "jpg", ABOUT)


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    outputs.write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        outputs.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_data_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(outputs.os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(outputs.os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    outputs.write_whole(tmp_path / "a.png", b"new")
    assert order == ["sync", "rename", "sync"]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match="cannot write"):
        outputs.check_folder(tmp_path / "file" / "out")
    outputs.check_folder(tmp_path / "new" / "out")
    assert os.listdir(tmp_path / "new" / "out") == []
