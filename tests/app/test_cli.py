"""The command line: what it makes, and that whatever goes wrong is one line and one exit code."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.miniature import untrained
from fastdiff_app import cli, video
from fastdiff_app.failures import ExitCode
from fastdiff_app.record import Record
from fastdiff_pipelines.batch.outputs import read_about

pytestmark = pytest.mark.usefixtures("untrained_model")
CIRCLE = "a red circle on a blue background"


def _left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_generate_is_the_same_for_the_same_seed(program: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ran = program("generate", CIRCLE, "-o", f"{name}.png", "--steps", 2, "--seed", seed)
        assert ran.code == ExitCode.OK, ran.err
        assert "PromptCache" in ran.err
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert a.shape == (64, 64, 3)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert _left(tmp_path) == {"a.png", "b.png", "c.png"}


def test_generate_from_a_picture_and_at_a_size(program: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((50, 90, 3), 200, np.uint8)).save(tmp_path / "in.png")
    words = ("generate", CIRCLE, "--image", "in.png", "-o", "out.jpg", "--steps", 4, "--size", "96x64")
    ran = program(*words, "--plan", "none")
    assert ran.code == ExitCode.OK, ran.err
    assert Image.open(tmp_path / "out.jpg").size == (96, 64)


def test_stream_gives_a_frame_for_a_frame_and_says_what_it_cost(program: Any, clip: Path, tmp_path: Path) -> None:
    words = ("stream", "-i", clip, "-p", CIRCLE, "-o", "o.mp4", "--json", "o.json", "--sheet", "o.png", "--baseline", 2)
    ran = program(*words, "--steps", 2, "--strength", 0.6)
    assert ran.code == ExitCode.OK, ran.err
    made = video.VideoSource(tmp_path / "o.mp4")
    assert (made.frames, made.fps, made.height, made.width) == (6, 8, 64, 64)
    record = Record.read(tmp_path / "o.json")
    assert [row.method for row in record.rows] == ["diffusers", "diffusers-equal", "sequential", "fastdiff"]
    assert record.row("fastdiff").quality["max_abs_difference"].value <= 1e-4
    assert record.row("fastdiff").quality["max_abs_difference"].n == 2
    assert record.row("diffusers").note == "2 of 6 frames"
    assert "diffusers-equal" in ran.out
    assert "6 frames in, 6 out" in ran.err
    assert _left(tmp_path) == {"clip.mp4", "o.mp4", "o.json", "o.png"}


def test_stream_stops_after_the_wanted_frames(program: Any, clip: Path, tmp_path: Path) -> None:
    ran = program("stream", "-i", clip, "-p", CIRCLE, "-o", "o.mkv", "--steps", 2, "--frames", 3, "--plan", "none")
    assert ran.code == ExitCode.OK, ran.err
    assert len(list(video.VideoSource(tmp_path / "o.mkv").read(64, 64))) == 3


@pytest.mark.slow
def test_batch_makes_what_is_missing_and_reports_each_bad_line(program: Any, tmp_path: Path) -> None:
    untrained().save_pretrained(tmp_path / "model")
    lines = [CIRCLE, '{"prompt": "a green ring", "seed": 4}', '{"prompt": "x", "colour": 1}', "", "# a remark", "{oops"]
    (tmp_path / "jobs.txt").write_text("\n".join(lines), "utf-8")
    words = ("batch", "jobs.txt", "-o", "made", "--steps", 2, "--model", "model", "--workers", 1, "--progress", "json")
    ran = program(*words)
    assert ran.code == ExitCode.PARTLY, ran.err
    assert "jobs.txt:3: unknown key 'colour'" in ran.err
    assert "jobs.txt:6: not JSON" in ran.err
    assert "2 made, 0 there already, 2 failed" in ran.err
    assert json.loads(ran.out.splitlines()[-1])["done"] == 2
    files = {path.name for path in (tmp_path / "made").iterdir()}
    ring = next(name for name in files if name.startswith("a-green-ring"))
    assert len(files - {"job", "index.html"}) == 2
    about = read_about(tmp_path / "made" / ring)
    assert (about["seed"], about["steps"], about["model"][:6]) == (4, 2, "model@")
    before = {name: os.stat(tmp_path / "made" / name).st_mtime_ns for name in files if name.endswith("png")}
    assert "0 made, 2 there already" in program(*words).err
    assert {name: os.stat(tmp_path / "made" / name).st_mtime_ns for name in before} == before


def test_a_cluster_without_ray_is_one_line_with_the_remedy(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs.txt").write_text(CIRCLE, "utf-8")
    monkeypatch.setattr("fastdiff_app.batch.is_installed", lambda package: package != "ray")
    ran = program("batch", "jobs.txt", "-o", "made", "--ray")
    assert ran.code == ExitCode.MISSING
    assert "fastdiff[ray]" in ran.err
    assert not (tmp_path / "made").exists()


def test_doctor_says_what_can_act(program: Any) -> None:
    ran = program("doctor")
    assert ran.code == ExitCode.OK, ran.err
    assert torch.__version__ in ran.out
    assert "PromptCache" in ran.out


def test_every_command_explains_itself(program: Any) -> None:
    for command in ("generate", "stream", "replay", "demo", "batch", "doctor", "warmup", "bench"):
        ran = program(command, "--help")
        assert ran.code == ExitCode.OK
        assert "--help" in ran.out


def _text(name: str, content: str | bytes) -> Callable[[], None]:
    def write() -> None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


GENERATE = ("generate", CIRCLE, "-o", "o.png", "--steps", "2")
STREAM = ("stream", "-i", "clip.mp4", "-p", CIRCLE, "-o", "o.mp4", "--steps", "2")
PLAN = '{"schema": 1, "accelerations": [{"kind": "PromptCache", "colour": 3}]}'
WRONG = [
    (("generate", "", "-o", "o.png"), ExitCode.USAGE, "prompt is empty", None),
    (("generate", CIRCLE), ExitCode.USAGE, "--output", None),
    (("paint",), ExitCode.USAGE, "paint", None),
    ((*GENERATE, "--steps", "many"), ExitCode.USAGE, "--steps", None),
    ((*GENERATE, "--steps", "0"), ExitCode.USAGE, "steps", None),
    ((*GENERATE, "--size", "999999"), ExitCode.USAGE, "from 16 to 4096", None),
    ((*GENERATE, "--seed", "-1"), ExitCode.USAGE, "seed", None),
    (("generate", CIRCLE, "-o", "o.exe"), ExitCode.USAGE, ".png", None),
    (("generate", CIRCLE, "-o", "file/o.png"), ExitCode.OUTPUT, "cannot write", _text("file", "")),
    ((*GENERATE, "--model", "no/such-model"), ExitCode.MODEL, "no/such-model", None),
    ((*GENERATE, "--plan", "fastest"), ExitCode.PLAN, "exact, balanced, fast", None),
    ((*GENERATE, "--plan", "p.json"), ExitCode.PLAN, "colour", _text("p.json", PLAN)),
    ((*GENERATE, "--plan", "p.json"), ExitCode.PLAN, "JSON", _text("p.json", "not a plan")),
    ((*GENERATE, "--image", "missing.png"), ExitCode.INPUT, "no such picture", None),
    ((*GENERATE, "--image", "a.png"), ExitCode.INPUT, "not a picture", _text("a.png", b"\x89PNG nothing")),
    (STREAM, ExitCode.INPUT, "no such video", None),
    (STREAM, ExitCode.INPUT, "not a video", _text("clip.mp4", "words")),
    (("stream",), ExitCode.USAGE, "--input", None),
    ((*STREAM, "--strength", "2"), ExitCode.USAGE, "strength", None),
    (("batch", "missing.jsonl", "-o", "made"), ExitCode.INPUT, "missing.jsonl", None),
    (("batch", "empty.txt", "-o", "made"), ExitCode.INPUT, "no jobs", _text("empty.txt", "\n# only this\n")),
    (("warmup", "--shapes", ","), ExitCode.USAGE, "--shapes", None),
    (("bench", "nothing"), ExitCode.USAGE, "stream", None),
]


@pytest.mark.parametrize(("words", "code", "said", "before"), WRONG)
def test_what_is_wrong_is_said_in_one_line(
    program: Any, tmp_path: Path, words: tuple[str, ...], code: ExitCode, said: str, before: Callable[[], None] | None
) -> None:
    if before:
        before()
    there = _left(tmp_path)
    ran = program(*words)
    assert ran.code == code, ran.err
    assert ran.err.startswith("fastdiff: ")
    assert ran.err.count("\n") == 1
    assert said in ran.err
    assert _left(tmp_path) == there


@pytest.mark.parametrize("option", [("--guidance", "double"), ("--sampler", "magic"), ("--noise", "pink")])
def test_settings_the_stream_does_not_know_are_refused(program: Any, clip: Path, option: tuple[str, str]) -> None:
    ran = program(*STREAM[:2], clip, *STREAM[3:], *option)
    assert ran.code == ExitCode.USAGE
    assert ran.err.startswith("fastdiff: ")
    assert ran.err.count("\n") == 1
    assert option[1] in ran.err
    assert _left(clip.parent) == {"clip.mp4"}


def _broken_decoder(pipe: Any) -> Any:
    with torch.no_grad():
        for weight in pipe.vae.decoder.parameters():
            weight.fill_(float("nan"))
    return pipe


@pytest.mark.parametrize("command", ["generate", "stream"])
def test_nan_from_a_model_ends_the_run_and_leaves_nothing(
    program: Any, clip: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    whole = fastdiff.load
    monkeypatch.setattr(fastdiff, "load", lambda *args, **options: _broken_decoder(whole(*args, **options)))
    ran = program(*(GENERATE if command == "generate" else (*STREAM[:2], clip, *STREAM[3:])), "--plan", "none")
    assert ran.code == ExitCode.NOT_FINITE
    assert "NaN" in ran.err
    assert _left(clip.parent) == {"clip.mp4"}


def test_an_interrupt_leaves_nothing(program: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff_app import stream

    def interrupted(image: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "to_bytes", interrupted)
    ran = program(*STREAM[:2], clip, *STREAM[3:], "--plan", "none")
    assert (ran.code, _left(clip.parent)) == (ExitCode.INTERRUPTED, {"clip.mp4"})


def test_a_mistake_of_ours_says_so(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(fastdiff, "load", broken)
    ran = program(*GENERATE)
    assert ran.code == ExitCode.BUG
    assert "FASTDIFF_TRACEBACK" in ran.err
    monkeypatch.setenv("FASTDIFF_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(list(GENERATE))
