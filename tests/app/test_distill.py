"""`fastdiff distill` from the command line to a student on disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdiff.miniature import untrained
from fastdiff.miniature.families import family
from fastdiff_app.failures import ExitCode


def test_distill_leaves_a_student_and_names_what_is_missing(program: Any, tmp_path: Path) -> None:
    untrained().save_pretrained(tmp_path / "model")
    words = ("distill", "-o", "student", "--steps", 1, "--batch-size", 2, "--rank", 2, "--model", "model")
    ran = program(*words)
    assert ran.code == ExitCode.USAGE
    assert "--prompts" in ran.err
    (tmp_path / "prompts.txt").write_text("\n", "utf-8")
    ran = program(*words, "--prompts", "prompts.txt")
    assert ran.code == ExitCode.INPUT
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background" + "\n", "utf-8")
    assert program(*words, "--prompts", "prompts.txt", "--method", "magic").code == ExitCode.USAGE
    ran = program(*words, "--prompts", "prompts.txt", "--pictures", 2, "--nfe", 2)
    assert ran.code == ExitCode.OK, ran.err
    about = json.loads((tmp_path / "student" / "student.json").read_text())
    assert about["levels"] == {"2": [1000, 500]}
    assert len((tmp_path / "student" / "log.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "student" / "samples.png").exists()
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("method", ["tcd", "splam", "scm", "dmd", "mmd", "ict", "agd"])
def test_every_method_runs_a_step(method: str, program: Any, tmp_path: Path) -> None:
    if method == "ict":
        pytest.importorskip("scipy", reason="scipy pairs noise with latents")
    model: Any = untrained()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background" + "\n", "utf-8")
    words = ("distill", "-o", "student", "--steps", 1, "--batch-size", 2, "--rank", 2, "--model", "model")
    ran = program(*words, "--prompts", "prompts.txt", "--pictures", 2, "--nfe", 2, "--method", method)
    assert ran.code == ExitCode.OK, ran.err
    left = "guidance_adapter.safetensors" if method == "agd" else "pytorch_lora_weights.safetensors"
    assert (tmp_path / "student" / left).exists()
    assert (tmp_path / "student" / "samples.png").exists()


def test_a_smaller_transformer_from_the_command_line(program: Any, tmp_path: Path) -> None:
    family("sd3").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background" + "\n", "utf-8")
    words = ("distill", "-o", "small", "--steps", 1, "--batch-size", 2, "--model", "model", "--pictures", 2)
    ran = program(*words, "--prompts", "prompts.txt", "--method", "koala", "--blocks", "0,2")
    assert ran.code == ExitCode.OK, ran.err
    assert json.loads((tmp_path / "small" / "transformer" / "config.json").read_text())["num_layers"] == 2
    assert program(*words, "--prompts", "prompts.txt", "--method", "koala", "--blocks", "9").code == ExitCode.USAGE
