"""Live sessions without a page: sources, sinks, the ledger's JSON, recordings and their replay."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastdiff_app import images, video
from fastdiff_app.failures import ExitCode, Failure
from fastdiff_app.live import sources
from fastdiff_app.live.sinks import Ended

STREAM = ("stream", "--model", "identity", "--size", "64")


def test_a_file_paced_in_real_time_goes_through_and_its_ledger_adds_up(program, clip: Path, tmp_path: Path) -> None:
    ran = program(*STREAM, "--source", clip, "--sink", "out.mp4", "--fps", 60, "--json", "ledger.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "ledger.json").read_text())
    frames = found["frames"]
    assert frames["in"] == 6
    assert frames["shown"] + sum(frames["dropped"].values()) == 6
    assert found["problems"] == []
    assert found["unexplained_ms"]["p50"] <= 2
    assert video.VideoSource(tmp_path / "out.mp4").frames == frames["shown"]


def test_a_live_stream_ends_after_the_wanted_frames(program, clip: Path) -> None:
    ran = program(*STREAM, "--source", clip, "--sink", "out.mp4", "--fps", 60, "--frames", 3, "--json", "ledger.json")
    assert ran.code == 0, ran.err
    found = json.loads(Path("ledger.json").read_text())
    assert found["frames"]["in"] == 3
    assert found["pace"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("untrained_model")
def test_twenty_seconds_through_a_model_are_accounted_for(program, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video.write_video(tmp_path / "long.mp4", rng.integers(0, 255, (200, 64, 64, 3), dtype=np.uint8), 10)
    ran = program("stream", "--source", "long.mp4", "--sink", "pictures", "--prompt", "a red circle", "--steps", 1,
                  "--fps", 10, "--seconds", 20, "--json", "ledger.json", "--plan", "none")  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "ledger.json").read_text())
    frames = found["frames"]
    assert frames["in"] == 200
    assert frames["shown"] + sum(frames["dropped"].values()) == 200
    assert frames["shown"] == len(list((tmp_path / "pictures").iterdir())) > 0
    assert {"uplink", "wait", "encode", "denoise", "decode"} <= set(found["stages_ms"])
    for name in ("age_ms", "latency_ms", "unexplained_ms"):
        assert 0 <= found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"]
    assert found["unexplained_ms"]["p50"] <= 2
    assert found["first_frame_ms"] > 0


def test_a_recorded_session_is_replayed_to_the_same_hashes(program, clip: Path) -> None:
    assert program(*STREAM, "--source", clip, "--sink", "one.mp4", "--record", "session.fdrec").code == 0
    ran = program("replay", "session.fdrec", "--sink", "again")
    assert ran.code == 0, ran.err
    assert "0 different" in ran.err
    assert "INPUT" not in ran.err
    Path("session.fdrec").write_bytes(b"nonsense")
    assert program("replay", "session.fdrec").code == 3
    assert program("replay", "absent.fdrec").code == 3


def test_folders_and_raw_frames_are_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    made = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    for number, picture in enumerate(made):
        images.write_image(tmp_path / "in" / f"{number}.png", picture)
    assert np.array_equal(list(sources.frames(str(tmp_path / "in"), 16, 16)), made)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(made.tobytes())))
    assert np.array_equal(list(sources.frames("-", 16, 16)), made)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(made.tobytes()[:-1])))
    with pytest.raises(Failure, match="within a frame"):
        list(sources.frames("-", 16, 16))


def test_a_video_is_fetched_from_an_address(clip: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/{clip.name}"
        found = list(sources.frames(address, 16, 16))
        server.shutdown()
    assert np.array_equal(found, list(sources.frames(str(clip), 16, 16)))
    assert len(found) == 6


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="no Xvfb is installed (Debian: apt install xvfb)")
def test_the_screen_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["Xvfb", "-displayfd", "1", "-screen", "0", "64x48x24"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as screen:
        assert screen.stdout is not None
        try:
            monkeypatch.setenv("DISPLAY", f":{screen.stdout.readline().strip()}")
            assert sources.is_live("screen")
            with contextlib.closing(sources.frames("screen", 16, 16)) as found:  # type: ignore[type-var]
                assert next(found).shape == (16, 16, 3)
        finally:
            screen.terminate()
    monkeypatch.delenv("DISPLAY")
    with pytest.raises(Failure, match="no X11 screen"):
        sources.frames("screen", 16, 16)


@pytest.mark.parametrize("source", ["camera:x", "absent.mp4", "camera:77"])
def test_a_source_that_is_not_there_is_one_line(program, source: str) -> None:
    ran = program(*STREAM, "--source", source, "--sink", "never")
    assert ran.code in (2, 3)
    assert ran.err.strip()
    assert not Path("never").exists()


def test_frames_are_paced_by_the_clock_and_late_ones_do_not_wait() -> None:
    now = [10.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    taken = []
    for due, frame in sources.paced(iter([0, 1, 2, 3]), 10.0, lambda: now[0], sleep):  # type: ignore[type-var]
        taken.append((due, frame))
        now[0] += 0.25 if frame == 0 else 0.0
    assert [due for due, _ in taken] == pytest.approx([10.0, 10.1, 10.2, 10.3])
    assert slept == pytest.approx([0.05])


def test_a_sink_that_breaks_ends_the_run_with_its_own_words(
    program, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: object, picture: np.ndarray) -> None:
        raise Failure(ExitCode.OUTPUT, "the disk is full")

    monkeypatch.setattr("fastdiff_app.live.sinks._Folder.__call__", broken)
    ran = program(*STREAM, "--source", clip, "--sink", "out", "--fps", 60)
    assert ran.code == ExitCode.OUTPUT
    assert "the disk is full" in ran.err


def test_closing_the_window_is_an_end_like_any_other(program, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(folder: object, picture: np.ndarray) -> None:
        raise Ended

    monkeypatch.setattr("fastdiff_app.live.sinks._Folder.__call__", closed)
    ran = program(*STREAM, "--source", clip, "--sink", "out", "--fps", 60, "--json", "ledger.json")
    assert ran.code == ExitCode.OK, ran.err
    assert json.loads(Path("ledger.json").read_text())["frames"]["shown"] == 0
