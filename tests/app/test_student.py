"""`--student` of `generate` and `batch`, on the embedded model as it ships."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastdiff_app.failures import ExitCode
from fastdiff_pipelines.batch.outputs import read_about

CIRCLE = "a big red circle on the left on a plain white background"


def test_a_student_brings_its_steps_and_guidance(program: Any, tmp_path: Path) -> None:
    for words, steps in (((), 4), (("--student", "one-step", "--steps", 1), 1)):
        ran = program("generate", CIRCLE, "-o", "a.png", "--student", "four-step", *words)
        assert ran.code == ExitCode.OK, ran.err
        assert f"{steps} step" in ran.err
        about = Image.open(tmp_path / "a.png").info
        assert (about["steps"], about["guidance"]) == (str(steps), "1.0")


def test_batch_draws_with_a_student(program: Any, tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text(f"{CIRCLE}\na big blue square on the right on a plain black background\n")
    ran = program("batch", "jobs.txt", "-o", "out", "--student", "four-step", "--workers", 1, "--progress", "none")
    assert ran.code == ExitCode.OK, ran.err
    made = list((tmp_path / "out").rglob("*.png"))
    assert len(made) == 2
    assert {read_about(path)["steps"] for path in made} == {4}


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("--student", "none-such"), "holds no student", ExitCode.INPUT),
        (("--student", "four-step", "--steps", 7), "takes 4 steps, not 7", ExitCode.USAGE),
    ],
)
def test_what_a_student_cannot_do_is_one_line(program: Any, tmp_path: Path, words: Any, said: str, code: int) -> None:
    ran = program("generate", CIRCLE, "-o", "a.png", *words)
    assert ran.code == code
    assert said in ran.err
    assert not (tmp_path / "a.png").exists()
