"""`fastdiff tune` and `fastdiff audit`: what a user can get wrong, and what they print."""

import json
from pathlib import Path
from typing import Any

import pytest

import fastdiff
from fastdiff.miniature import untrained
from fastdiff.plan import Plan
from fastdiff_app.cli import run
from fastdiff_app.failures import ExitCode


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastdiff.load` gives the embedded architecture with random weights."""

    def load(name: str | None = None, task: str = "text-to-image", **_: Any) -> Any:
        return untrained(0)

    monkeypatch.setattr(fastdiff, "load", load)


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ([], ExitCode.USAGE, "give --budget"),
        (["--budget", "speed>=2"], ExitCode.USAGE, "is no budget: write psnr>=30"),
        (["--latency", "fast"], ExitCode.USAGE, "is no latency: write 40ms"),
        (["--latency", "2x", "--plot", "plot.txt"], ExitCode.USAGE, "its name must end in .png"),
        (["--latency", "2x", "--model", "somebody/model"], ExitCode.USAGE, "--prompts is needed"),
        (["--latency", "2x", "--prompts", "missing.txt"], ExitCode.INPUT, "cannot read missing.txt"),
        (["--latency", "2x", "--prompts", "few.txt"], ExitCode.INPUT, "has 2 different prompts; 16 or more"),
    ],
)
def test_mistakes_are_one_line(given, code, says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a red circle\na blue square\na red circle\n")
    assert run(["tune", "-o", "plan.json", *given]) == code
    said = capsys.readouterr().err.strip()
    assert says in said
    assert said.count("\n") == 0
    assert not Path("plan.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_plan_a_plot_and_a_page_are_written(tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.txt"
    shapes = ("circle", "square", "ring", "cross")
    prompts.write_text("\n".join(f"a {c} {s}" for c in ("red", "blue", "green", "white") for s in shapes))
    files = {name: tmp_path / name for name in ("plan.json", "pareto.png", "report.html")}
    given = ["--latency", "1.5x", "--prompts", str(prompts), "--steps", "6", "--size", "32", "--batch-size", "8"]
    targets = ["-o", files["plan.json"], "--plot", files["pareto.png"], "--report", files["report.html"]]
    assert run(["tune", *given, *map(str, targets)]) == ExitCode.OK
    said = capsys.readouterr().out
    assert "times faster" in said
    assert "the search took" in said
    plan = Plan.load(files["plan.json"])
    assert plan.tuned.steps == 6
    assert json.loads(files["plan.json"].read_text())["tuned"]["pipeline"] == "StableDiffusionPipeline"
    assert files["pareto.png"].read_bytes().startswith(b"\x89PNG")
    assert "<table>" in files["report.html"].read_text()


@pytest.mark.usefixtures("small")
def test_audit_names_what_diffusers_does_silently(capsys):
    assert run(["audit"]) == ExitCode.OK
    said = capsys.readouterr().out
    for words in ("TaylorSeer", "FirstBlockCache", "MagCache", "SeaCache", "has no enable_cache", "in an exception"):
        assert words in said
