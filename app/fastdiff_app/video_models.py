"""Video models where image models are: what tells them apart, their size, and streams made of them."""

import json
import logging
import re
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastdiff_app import video
from fastdiff_app.console import out, progress
from fastdiff_app.failures import ExitCode, Failure, one_line

if TYPE_CHECKING:
    from fastdiff_app.stream import StreamJob

_log = logging.getLogger(__name__)
_NAMED = re.compile(r"(?:(?i:(?:^|[-_])wan)|(?<=[a-z])Wan)(?=[-_\d.]|$)")
FPS = 16
FRAMES = 97


def is_video(model: str | None) -> bool:
    """Whether a model makes video, as far as its name or its folder says."""
    if model is None:
        return False
    index = Path(model).expanduser() / "model_index.json"
    if index.is_file():
        try:
            named = json.loads(index.read_text("utf-8"))["_class_name"]
        except (ValueError, KeyError, TypeError):
            return False  # loading it says what is wrong with it
        return str(named).startswith("Wan")
    return _NAMED.search(model.rstrip("/").rsplit("/", 1)[-1]) is not None


def makes_video(pipe: Any) -> bool:
    """Whether a loaded pipeline is one that a rollout can run."""
    from fastdiff.anatomy_wan import wan_problem

    transformer = getattr(pipe, "transformer", None)
    return transformer is not None and not wan_problem(transformer)


def take_student(pipe: Any, model: str | None) -> None:
    """Give the embedded video model the few-step student it is streamed with, where one ships."""
    if model != "mini-wan":
        return
    from fastdiff.miniature.wan_weights import STUDENT

    if STUDENT.is_dir():
        pipe.load_lora_weights(str(STUDENT), adapter_name="rollout")
        pipe.fuse_lora()
        _log.warning("mini-wan streams with its few-step student: 4 calls a chunk and no guidance")
    else:
        _log.warning("no few-step student of mini-wan ships here: it streams as it is, which needs more steps")


def open_video(pipe: Any, prompt: str, height: int, width: int, settings: dict[str, Any]) -> Any:
    """A `VideoStream` over a pipeline, warm, with the settings of an image stream.

    Raises:
        ValueError, TypeError, NotImplementedError: what is not possible for video, in a line.
    """
    from fastdiff_pipelines.rollout import ChunkRollout, VideoStream
    from fastdiff_pipelines.settings import Settings

    stream = VideoStream(ChunkRollout(pipe, height=height, width=width), Settings(prompt, **settings))
    stream.warmup()
    return stream


def from_noise(job: "StreamJob") -> dict[str, Any]:
    """Video from a prompt alone into a file; gives its ledger."""
    from fastdiff_app.engine import accelerated, load_pipeline, read_plan
    from fastdiff_app.outputs import check_writable, write_json
    from fastdiff_pipelines import NotFinite
    from fastdiff_pipelines.rollout import ChunkRollout
    from fastdiff_pipelines.rollout.rollout import native_size

    check_writable(job.output, video.SUFFIXES)
    if job.json:
        check_writable(job.json, (".json",))
    pipe = load_pipeline(job.model, "text-to-image")
    height, width = job.size or native_size(pipe)
    wanted = job.most_frames or FRAMES
    with accelerated(pipe, read_plan(job.plan, job.compile), job.strict):
        try:
            rollout = ChunkRollout(pipe, height=height, width=width)
            session = rollout.open(job.prompt, fps=FPS, **_rollout_options(job))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Failure(ExitCode.USAGE, f"the rollout cannot be set up: {one_line(error)}") from error
        began, written = perf_counter(), 0
        with session, video.video_sink(job.output, Fraction(FPS), height, width) as write, progress() as bars:
            bar = bars.add_task("stream", total=wanted)
            try:
                for chunk in session.run():
                    for frame in chunk.frames[0][: wanted - written]:
                        write(frame)
                        written += 1
                    bars.update(bar, completed=written)
                    if written == wanted:
                        break
            except NotFinite as error:
                raise Failure(ExitCode.MODEL, one_line(error)) from error
            spent = perf_counter() - began
        found = session.ledger.summary()
    if job.json:
        write_json(job.json, found)
    pace = f"the first after {found['first_frame_ms'] or 0.0:.0f} ms, {written / spent:.1f} a second"
    out.print(f"{written} frames of {width}x{height}, {pace}: {job.output}", markup=False)
    return found


def _rollout_options(job: "StreamJob") -> dict[str, Any]:
    """What a job's settings, which are those of image streams, mean for a session from noise.

    Raises:
        ValueError: what is not possible for video, in a line.
    """
    from fastdiff_pipelines.rollout import RolloutSettings
    from fastdiff_pipelines.rollout.stream import rollout_settings
    from fastdiff_pipelines.settings import Settings

    before = RolloutSettings((job.prompt,))
    made = rollout_settings(Settings(job.prompt, **job.settings()), before)
    names = [field.name for field in fields(made) if field.name != "prompts"]
    return {name: getattr(made, name) for name in names if getattr(made, name) != getattr(before, name)}
