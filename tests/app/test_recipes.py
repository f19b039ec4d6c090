"""Published few-step models on the command line: their own steps and guidance, unless the user says others."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastdiff.miniature import untrained
from fastdiff_app.failures import ExitCode
from fastdiff_app.generate import Settings
from fastdiff_app.images import read_image

pytestmark = pytest.mark.usefixtures("untrained_model")


def test_a_recipe_chooses_steps_and_guidance_and_the_user_overrules_it(program: Any) -> None:
    words = ("generate", "a red circle", "-o", "a.png", "--recipe", "lcm-lora")
    for more, expected in (
        ((), "4 steps, guidance 1"),
        (("--steps", 2), "2 steps, guidance 1"),
        (("--guidance", 2), "4 steps, guidance 2"),
    ):
        ran = program(*words, *more)
        assert ran.code == ExitCode.OK, ran.err
        assert expected in ran.err


def test_an_unknown_recipe_is_one_line(program: Any) -> None:
    ran = program("generate", "a red circle", "-o", "a.png", "--recipe", "fastest")
    assert ran.code == ExitCode.USAGE
    assert "no recipe is called 'fastest'; use auto, none" in ran.err


def test_from_a_picture_the_steps_that_run_are_the_models(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    assert read_image(tmp_path / "in.png") is not None
    pipe = untrained(0)
    one = Settings("x", image=tmp_path / "in.png", strength=0.5, recipe="SD-Turbo")
    assert one.course(pipe) == {"num_inference_steps": 2, "guidance_scale": 0.0}
    plain = Settings("x", recipe="none")
    assert plain.course(pipe) == {"num_inference_steps": 25, "guidance_scale": 5.0}
