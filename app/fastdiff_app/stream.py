"""`fastdiff stream`: a video in, a diffused video out, and what it cost beside plain diffusers in the same run."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_app import images, video
from fastdiff_app.console import err, out, progress, table
from fastdiff_app.demo import Demo, attributes
from fastdiff_app.demo import demo as draw
from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.failures import ExitCode, Failure, one_line, require_torch
from fastdiff_app.generate import native_size
from fastdiff_app.methods import DiffusersLoop, Run, StreamLoop, equal_loop, to_bytes
from fastdiff_app.outputs import check_writable
from fastdiff_app.record import Record, Row
from fastdiff_app.sheet import contact_sheet
from fastdiff_app.video_models import is_video, makes_video, open_video

if TYPE_CHECKING:
    import numpy as np

COLUMNS = 8
DEMO_FRAMES, DEMO_BASELINE = 96, 24
USUAL = {"num_inference_steps": 25, "guidance_scale": 5.0}


@dataclass(frozen=True)
class StreamJob:
    """Everything `fastdiff stream` was asked for; `size` is (height, width) or None for the model's own."""

    input: Path
    prompt: str
    output: Path
    json: Path | None = None
    sheet: Path | None = None
    model: str | None = None
    plan: str | None = None
    compile: bool | None = None
    strict: bool = False
    steps: int = 4
    strength: float = 0.5
    guidance: str = "none"
    guidance_scale: float = 1.0
    sampler: str = "lcm"
    noise: str = "fixed"
    frame_buffer: int = 1
    seed: int = 0
    negative: str = ""
    size: tuple[int, int] | None = None
    most_frames: int | None = None
    baseline: int = 0

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the stream."""
        return {
            "negative_prompt": self.negative,
            "steps": self.steps,
            "strength": self.strength,
            "guidance": self.guidance,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "noise": self.noise,
            "seed": self.seed,
        }


def stream(job: StreamJob, demo: Demo | None = None) -> Record:
    """Runs the job, writes its files and prints its table.

    Args:
        demo: the truth behind `job.input` where it is known; adds accuracies to the table.
    """
    require_torch()
    check_writable(job.output, video.SUFFIXES)
    if job.json:
        check_writable(job.json, (".json",))
    if job.sheet:
        check_writable(job.sheet, images.SUFFIXES)
    source = video.VideoSource(job.input)
    if job.baseline and is_video(job.model):
        raise Failure(ExitCode.USAGE, "--baseline compares image models; fastdiff bench video compares video models")
    if job.frame_buffer > 1 and is_video(job.model):
        raise Failure(ExitCode.USAGE, "--frame-buffer belongs to image models; frames of a video model enter in chunks")
    plan = read_plan(job.plan, job.compile)
    pipe = load_pipeline(job.model, "image-to-image")
    height, width = job.size or native_size(pipe)
    with ExitStack() as stack:
        handle = stack.enter_context(accelerated(pipe, plan, job.strict))
        engine = _open(pipe, job, height, width)
        ours = Run("fastdiff", StreamLoop(engine))
        count = min(filter(None, (source.frames, job.most_frames)), default=None)
        beside = Beside(job, height, width, count) if job.baseline else None
        frames = _pass(job, source, ours, beside, (height, width, count))
        report = f"{handle.report()}\n{engine.report()}"
    runs = [*(beside.runs if beside else ()), ours]
    record = measure(job, runs, len(frames), demo)
    if job.json:
        record.save(job.json)
    if job.sheet:
        _draw(job, frames, runs)
    err.print(report, markup=False)
    out.print(table(record))
    out.print(f"{len(frames)} frames of {width}x{height}: {job.output}", markup=False)
    return record


def draw_demo(baseline: int, settings: dict[str, Any]) -> tuple[StreamJob, Demo]:
    """Writes the demonstration's clip into out/ and returns the job that transforms it, with the truth."""
    require_torch()
    size = settings["size"] or (64, 64)
    if size[0] != size[1]:
        raise Failure(ExitCode.USAGE, "--demo draws square clips")
    made = draw(frames=settings["most_frames"] or DEMO_FRAMES, size=size[0])
    folder = Path("out")
    clip = folder / "clip.mp4"
    check_writable(clip)
    video.write_video(clip, made.frames, fps=24)
    names = {"output": "stream.mp4", "json": "stream.json", "sheet": "stream.png"}
    files: dict[str, Any] = {key: folder / name for key, name in names.items()}
    return StreamJob(clip, made.prompt, **files, baseline=baseline or DEMO_BASELINE, **settings), made


def _open(pipe: Any, job: StreamJob, height: int, width: int, sequential: bool = False) -> Any:
    from fastdiff_pipelines import SequentialStream, Stream

    common = {"height": height, "width": width, **job.settings()}
    try:
        if makes_video(pipe):
            return open_video(pipe, job.prompt, height, width, job.settings())
        if sequential:
            return SequentialStream(pipe, job.prompt, **common)
        made = Stream(pipe, job.prompt, frame_buffer=job.frame_buffer, **common)
        made.warmup()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Failure(ExitCode.USAGE, f"the stream cannot be set up: {one_line(error)}") from error
    return made


class Beside:
    """Plain diffusers, diffusers at our number of steps, and a fair loop, on some of the frames of the same run."""

    def __init__(self, job: StreamJob, height: int, width: int, count: int | None):
        def fresh() -> Any:
            return load_pipeline(job.model, "image-to-image")

        usual = DiffusersLoop(fresh(), job.prompt, job.seed, strength=job.strength, **USUAL)
        equal = equal_loop(fresh(), job.prompt, job.seed, job.settings())
        loop = StreamLoop(_open(fresh(), job, height, width, sequential=True))
        self.runs = [Run("diffusers", usual), Run("diffusers-equal", equal), Run("sequential", loop)]
        self.left = job.baseline
        self.every = max(1, (count or job.baseline) // job.baseline)
        for run in self.runs:
            # first calls allocate and load code; a user's second call does not
            run.method.push(_gray(height, width), -1)

    def push(self, frame: "np.ndarray", frame_id: int) -> None:
        """Gives the frame to every method if its turn has come."""
        if self.left and frame_id % self.every == 0:
            self.left -= 1
            for run in self.runs:
                run.push(frame, frame_id)


def _gray(height: int, width: int) -> "np.ndarray":
    import numpy as np

    return np.full((height, width, 3), 128, np.uint8)


def _pass(
    job: StreamJob, source: video.VideoSource, ours: Run, beside: Beside | None, shape: tuple[int, int, int | None]
) -> "list[np.ndarray]":
    """Sends every frame through, writing results as they come; returns the frames that were read."""
    height, width, count = shape
    taken: list[np.ndarray] = []
    with video.video_sink(job.output, source.fps, height, width) as write, progress() as bars:
        bar = bars.add_task("stream", total=count)
        for frame_id, frame in enumerate(_some(source.read(height, width), job.most_frames)):
            taken.append(frame)
            if beside:
                beside.push(frame, frame_id)
            for _, image in ours.push(frame, frame_id):
                write(to_bytes(image))
                bars.advance(bar)
        for _, image in ours.flush():
            write(to_bytes(image))
            bars.advance(bar)
    return taken


def _some(frames: "Iterator[np.ndarray]", most: int | None) -> "Iterator[np.ndarray]":
    for number, frame in enumerate(frames):
        if number == most:
            return
        yield frame


def measure(job: StreamJob, runs: list[Run], frames: int, demo: Demo | None) -> Record:
    """The record of a run: times, differences to the sequential loop, accuracies where the truth is known."""
    record = Record("stream")
    reference = next((run.images for run in runs if run.name == "sequential"), None)
    for run in runs:
        row = Row.timed(run.name, run.milliseconds, nfe=_denoiser_rows(run.name, job))
        row.quality = quality(run, reference, demo)
        row.note = f"{len(run.milliseconds)} of {frames} frames" if len(run.milliseconds) < frames else ""
        record.rows.append(row)
    return record.finish()


def quality(run: Run, reference: "dict[int, np.ndarray] | None", demo: Demo | None) -> dict[str, Any]:
    """First-frame latency, largest difference to the reference on pixels in 0..1, and accuracies."""
    import numpy as np

    from fastdiff.quality import Interval, mean_interval

    found: dict[str, Any] = {}
    if run.first_frame_ms is not None:
        found["first_frame_ms"] = Interval.exact(run.first_frame_ms)
    shared = sorted(run.images.keys() & (reference or {}).keys())
    if reference and shared:
        largest = max(float(np.abs(run.images[i] - reference[i]).max()) for i in shared)
        found["max_abs_difference"] = Interval.exact(largest, len(shared))
    if demo:
        # the same frames for every method where they share some
        ids = shared or sorted(run.images)
        scores = attributes([to_bytes(run.images[i]) for i in ids], [demo.truths[i] for i in ids])
        found |= {name: mean_interval(values) for name, values in scores.items()}
    return found


def _denoiser_rows(name: str, job: StreamJob) -> int:
    """Pictures the denoiser sees for one frame."""
    if name == "diffusers":
        return int(USUAL["num_inference_steps"] * job.strength) * 2
    rows = {"none": job.steps, "self": job.steps, "onetime": job.steps + 1, "full": 2 * job.steps}[job.guidance]
    return rows if name != "diffusers-equal" or job.guidance == "full" else job.steps


def _draw(job: StreamJob, frames: "list[np.ndarray]", runs: list[Run]) -> None:
    assert job.sheet is not None
    common = sorted(set.intersection(*(set(run.images) for run in runs)))
    if not common:
        return
    ids = [common[round(k * (len(common) - 1) / max(1, COLUMNS - 1))] for k in range(min(COLUMNS, len(common)))]
    rows: list[Any] = [("input", [frames[i] for i in ids])]
    for run in runs:
        middle = sorted(run.milliseconds)[len(run.milliseconds) // 2]
        rows.append((f"{run.name}  {middle:.0f} ms", [to_bytes(run.images[i]) for i in ids]))
    images.write_image(job.sheet, contact_sheet(rows, job.prompt))
