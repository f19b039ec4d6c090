"""What the program's tests share: a model nobody trains, and the program run in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastdiff
from fastdiff_app import cli, video


@dataclass(frozen=True)
class Ran:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


Program = Callable[..., Ran]


@pytest.fixture
def untrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastdiff.load` gives the embedded architecture with random weights, made once for all of them."""
    from diffusers import StableDiffusionImg2ImgPipeline

    from fastdiff.miniature import untrained

    def load(name: str | None = None, task: str = "text-to-image", **_: Any) -> Any:
        if name is not None:
            raise OSError(f"{name} is neither a folder nor a model that could be\nfetched")
        pipe = untrained(0)
        if task == "text-to-image":
            return pipe
        return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)

    monkeypatch.setattr(fastdiff, "load", load)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """Runs ``fastdiff WORDS`` in an empty folder; no run may show a traceback."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Ran:
        code = cli.run([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Ran(int(code), said.out, said.err)

    return run


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Six frames of a bright square that moves."""
    frames = np.full((6, 64, 64, 3), 60, np.uint8)
    for index in range(6):
        frames[index, 20:44, 4 * index : 4 * index + 24] = (220, 60, 40)
    path = tmp_path / "clip.mp4"
    video.write_video(path, frames, fps=8)
    return path
