"""Options of `fastdiff stream`: each reaches what it is for, or is refused with its name and where it belongs."""

import inspect
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastdiff_app import cli, modes
from fastdiff_app import stream as files
from fastdiff_app.failures import ExitCode
from fastdiff_app.live import headless

ROOT = Path(__file__).parents[2]
FILE, NOISE = ("-i", "clip.mp4", "-p", "a", "-o", "o.mp4"), ("--model", "mini-wan", "-p", "a", "-o", "o.mp4")
LIVE, DEMO = ("--source", "camera"), ("--demo",)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that would have run."""
    jobs: list[Any] = []
    monkeypatch.setattr(files, "stream", lambda job, truth=None: jobs.append(job))
    monkeypatch.setattr(files, "draw_demo", lambda baseline, settings: (("demo", baseline, settings), None))
    monkeypatch.setattr("fastdiff_app.video_models.from_noise", jobs.append)
    monkeypatch.setattr(headless, "run", jobs.append)
    return jobs


@pytest.mark.parametrize(
    ("words", "option", "where"),
    [
        ((*LIVE, "--baseline", "5"), "--baseline", "--input"),
        ((*LIVE, "--frame-buffer", "1"), "--frame-buffer", "--input"),
        ((*LIVE, "--sheet", "s.png"), "--sheet", "--input"),
        ((*LIVE, "-o", "o.mp4"), "--output", "--input"),
        ((*LIVE, "-i", "clip.mp4"), "--input", "--input"),
        ((*LIVE, "--demo"), "--source", "--source"),
        ((*FILE, "--record", "r.fdrec"), "--record", "--source"),
        ((*FILE, "--target-ms", "40"), "--target-ms", "--source"),
        ((*FILE, "--seconds", "3"), "--seconds", "--source"),
        ((*FILE, "--sink", "-"), "--sink", "--source"),
        ((*FILE, "--fps", "30"), "--fps", "--source"),
        ((*NOISE, "--sheet", "s.png"), "--sheet", "--input"),
        ((*NOISE, "--baseline", "2"), "--baseline", "--input"),
        ((*NOISE, "--frame-buffer", "2"), "--frame-buffer", "--input"),
        ((*NOISE, "--strength", "0.5"), "--strength", "--input"),
        ((*DEMO, "-p", "a"), "--prompt", "--input"),
        ((*DEMO, "--json", "o.json"), "--json", "--input"),
    ],
)
def test_an_option_that_does_not_act_is_refused(
    program: Any, asked: list[Any], words: tuple[str, ...], option: str, where: str
) -> None:
    ran = program("stream", *words)
    assert ran.code == ExitCode.USAGE
    assert ran.err.startswith(f"fastdiff: {option} belongs to ")
    assert where in ran.err.partition(", not to ")[0]
    assert ran.err.count("\n") == 1
    assert asked == []


def test_the_table_names_options_and_ways_that_there_are() -> None:
    assert modes.OPTIONS.keys() <= inspect.signature(cli.stream).parameters.keys()
    assert {mode for where in modes.OPTIONS.values() for mode in where} == modes.MODES.keys()


def test_plans_and_settings_reach_a_live_stream(program: Any, asked: list[Any]) -> None:
    more = ("--strict", "--compile", "--frames", 10, "--negative", "blur", "--sampler", "ddim", "--noise", "fresh")
    assert program("stream", *LIVE, *more).code == ExitCode.OK
    (job,) = asked
    assert (job.strict, job.compile, job.frames) == (True, True, 10)
    assert job.settings.items() >= {"negative_prompt": "blur", "sampler": "ddim", "noise": "fresh"}.items()


def test_noise_is_calm_over_frames_and_fresh_without(program: Any, asked: list[Any]) -> None:
    for words in (FILE, NOISE, (*NOISE, "--noise", "fixed"), (*NOISE, "--json", "o.json")):
        assert program("stream", *words).code == ExitCode.OK
    assert [job.noise for job in asked] == ["fixed", "fresh", "fixed", "fresh"]
    assert asked[-1].json == Path("o.json")


def _lines() -> list[list[str]]:
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    lines = [line.removeprefix("$ ") for line in readme if line.startswith("$ fastdiff stream")]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (made,) = [line.partition("fastdiff_app.cli ")[2] for line in makefile.splitlines() if ".cli stream" in line]
    return [shlex.split(line.partition("#")[0])[1:] for line in lines] + [made.split()]


def test_the_lines_of_the_readme_and_the_makefile_are_taken(program: Any, asked: list[Any]) -> None:
    lines = _lines()
    assert len(lines) >= 4
    for words in lines:
        ran = program(*words)
        assert ran.code == ExitCode.OK, (words, ran.err)
    assert len(asked) == len(lines)
