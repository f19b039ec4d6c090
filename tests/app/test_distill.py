"""`fastdiff distill` from the command line to a student on disk."""

import json
from pathlib import Path
from typing import Any

from fastdiff.miniature import untrained
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
    assert about["timesteps"] == [999, 499]
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").exists()
