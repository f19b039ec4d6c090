"""Video models where image models are: the command line, and streams of the live page's model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff.miniature import wan
from fastdiff_app import video_models
from fastdiff_app.failures import ExitCode
from fastdiff_app.live.model import LiveModel
from fastdiff_app.live.server import Live, Serving
from fastdiff_app.video import VideoSource, write_video
from fastdiff_pipelines.rollout import ChunkRollout, VideoStream, slo
from fastdiff_pipelines.settings import Settings

PROMPT = "a red circle moving left on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded video model's architecture with random weights, as a user's own folder."""
    place = tmp_path_factory.mktemp("models") / "my-video"
    wan.untrained().save_pretrained(place)
    return place


def test_video_models_are_told_from_image_models(folder: Path) -> None:
    assert video_models.is_video(str(folder)) and video_models.is_video("mini-wan")
    assert video_models.is_video("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert not video_models.is_video(None) and not video_models.is_video("mini-sd")
    for name in ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "models/wan", "me/wan_causal", "Wan-AI/Wan2.2-TI2V/"):
        assert video_models.is_video(name), name
    for name in ("me/swan-lake", "taiwan-sd", "Rwanda", "me/rowan", "wanted/sdxl", "me/wanderer", "Wan-AI/upscaler"):
        assert not video_models.is_video(name), name
    assert video_models.makes_video(wan.untrained())


@pytest.mark.parametrize(
    ("index", "video"),
    [('{"_class_name": "WanPipeline"}', True), ('{"_class_name": "SD", "about": "Wan"}', False), ("[", False)],
)
def test_a_folder_says_itself_what_it_makes(tmp_path: Path, index: str, video: bool) -> None:
    place = tmp_path / "wan"
    place.mkdir()
    (place / "model_index.json").write_text(index)
    assert video_models.is_video(str(place)) is video


def test_video_from_a_prompt_alone_has_the_settings_that_were_given(
    program: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    whole = ChunkRollout.open

    def open(rollout: ChunkRollout, prompt: str, **options: Any) -> Any:
        opened.append(options)
        return whole(rollout, prompt, **options)

    monkeypatch.setattr(ChunkRollout, "open", open)
    words = ("stream", "--model", folder, "-p", PROMPT, "-o", "o.mp4", "--frames", 5, "--size", 32, "--steps", 1)
    more = ("--sampler", "euler", "--noise", "fixed", "--guidance", "full", "--guidance-scale", 3, "--seed", 7)
    ran = program(*words, *more, "--negative", "blur", "--json", "o.json")
    assert ran.code == 0, ran.err
    assert opened[-1].items() >= {"sampler": "euler", "noise": "fixed", "guidance_scale": 3.0, "seed": 7}.items()
    assert opened[-1]["negative_prompt"] == "blur"
    assert json.loads((tmp_path / "o.json").read_text())["first_frame_ms"] > 0
    refused = program(*words, "--guidance", "self")
    assert refused.code == ExitCode.USAGE and "none or full" in refused.err


def test_video_from_a_prompt_alone(program: Any, folder: Path, tmp_path: Path) -> None:
    words = ("--model", folder, "-p", PROMPT, "--frames", 7, "--size", 32, "--steps", 2)
    ran = program("stream", *words, "-o", "o.mp4")
    assert ran.code == 0, ran.err
    assert "7 frames of 32x32, the first after" in ran.out
    assert len(list(VideoSource(tmp_path / "o.mp4").read(32, 32))) == 7


def test_a_frame_for_a_frame_of_a_clip(program: Any, folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "in.mp4", np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8), 16)
    words = ("--model", folder, "-i", "in.mp4", "-p", PROMPT, "--size", 32, "--steps", 2)
    ran = program("stream", *words, "-o", "o.mp4")
    assert ran.code == 0, ran.err
    assert len(list(VideoSource(tmp_path / "o.mp4").read(32, 32))) == 10
    refused = program("stream", *words, "-o", "p.mp4", "--baseline", 2)
    assert refused.code == ExitCode.USAGE and "bench video" in refused.err
    refused = program("stream", *words, "-o", "p.mp4", "--frame-buffer", 2)
    assert refused.code == ExitCode.USAGE and "--frame-buffer" in refused.err
    refused = program("stream", *words, "-o", "p.mp4", "--guidance", "self")
    assert refused.code == ExitCode.USAGE and "none or full" in refused.err


def test_an_image_model_still_needs_a_clip(program: Any) -> None:
    ran = program("stream", "-p", PROMPT, "-o", "o.mp4")
    assert ran.code == ExitCode.USAGE and "--input" in ran.err


def test_the_live_page_serves_it_as_any_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    whole = slo.measured_costs
    monkeypatch.setattr(slo, "measured_costs", lambda rollout: measured.append(rollout) or whole(rollout))
    settings = Settings(PROMPT, steps=2)
    with LiveModel(str(folder), settings, plan="none", size=(32, 32), target_ms=60_000, interval_ms=1000) as model:
        stream, small = model.open(), model.open(0.5)
        assert isinstance(stream, VideoStream) and small.size == (16, 16)
        assert stream.scheduler is not None and stream.scheduler.choice.steps == 2
        made = [one for _ in range(6) for one in stream.push(np.zeros((32, 32, 3), np.uint8))] + stream.flush()
        assert [one.image.shape for one in made] == [(32, 32, 3)] * 6
        assert model.controller() is None and model.conditions == []
        model.open()
        assert [(one.height, one.width) for one in measured] == [(32, 32), (16, 16)]
        # its scheduler goes by the clock
        assert not model.replays
        live = Live(model, Serving(recordings=tmp_path))
        assert live.hello()["video"] and not live.hello()["records"]
        with pytest.raises(ValueError, match="by the clock"):
            live.record(live.session(), True)


def test_a_live_video_says_what_it_does_for_its_target(program: Any, folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "in.mp4", np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8), 16)
    words = ("stream", "--model", folder, "--source", "in.mp4", "--sink", "out", "--size", 32, "--steps", 2)
    words = (*words, "--plan", "none", "--json", "ledger.json", "--target-ms", 1)
    ran = program(*words)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "ledger.json").read_text())["pace"]
    # no machine makes a frame in a millisecond, and one step comes nearest
    assert found["now"] == "1 of 2 steps, too slow for the target"
    assert (found["fits"], found["choice"]["steps"]) == (False, 1)
    assert "could not be kept" in ran.err
    refused = program(*words, "--record", "session.fdrec")
    assert refused.code == ExitCode.USAGE and "by the clock" in refused.err
