"""Ways to turn video frames into diffused frames, all driven and timed alike so that they can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from fastdiff_app.failures import ExitCode, Failure, one_line

if TYPE_CHECKING:
    import numpy as np

    # (frame id, float [H, W, 3] in 0..1) for each frame that became ready
    Ready = list[tuple[int, np.ndarray]]


class Method(Protocol):
    """One way. `push` takes a uint8 [H, W, 3] frame; both return what became ready, float [H, W, 3] in 0..1."""

    def push(self, frame: "np.ndarray", frame_id: int) -> "Ready":
        """Take uint8 ``[H, W, 3]``; give what became ready, float ``[H, W, 3]`` in 0..1 by frame id."""
        ...

    def flush(self) -> "Ready":
        """Give what is still inside, float ``[H, W, 3]`` in 0..1 by frame id."""
        ...


class DiffusersLoop:
    """diffusers' image-to-image pipeline, called once a frame as its documentation shows.

    Args:
        pipe: an image-to-image pipeline; nothing of it is changed.
        options: keyword arguments of every call, such as `strength` and `num_inference_steps`.
        seed: every frame gets the same noise, as a stream's fixed noise does.
    """

    def __init__(self, pipe: Any, prompt: str, seed: int, **options: Any):
        self.pipe, self.prompt, self.seed, self.options = pipe, prompt, seed, options

    def push(self, frame: "np.ndarray", frame_id: int) -> "Ready":
        """Make the picture of uint8 ``[H, W, 3]`` now: float ``[H, W, 3]`` in 0..1."""
        import torch
        from PIL import Image

        made = self.pipe(
            self.prompt,
            image=Image.fromarray(frame),
            generator=torch.Generator("cpu").manual_seed(self.seed),
            output_type="np",
            **self.options,
        )
        return [(frame_id, made.images[0])]

    def flush(self) -> "Ready":
        """Nothing: every frame came out when it went in."""
        return []


def equal_loop(pipe: Any, prompt: str, seed: int, settings: dict[str, Any]) -> DiffusersLoop:
    """diffusers at exactly a stream's number of denoiser calls, sampler and guidance. Replaces the pipe's scheduler.

    The guidances diffusers does not have ("self", "onetime") are compared with none, as both cost one row a step.
    """
    from fastdiff.sampling.schedule import steps_for_strength

    pipe.scheduler = _scheduler(settings["sampler"], pipe.scheduler.config)
    return DiffusersLoop(
        pipe,
        prompt,
        seed,
        num_inference_steps=steps_for_strength(settings["steps"], settings["strength"]),
        strength=settings["strength"],
        guidance_scale=settings["guidance_scale"] if settings["guidance"] == "full" else 1.0,
    )


def _scheduler(sampler: str, config: Any) -> Any:
    import diffusers

    names = {
        "lcm": "LCMScheduler",
        "tcd": "TCDScheduler",
        "ddim": "DDIMScheduler",
        "dpm": "DPMSolverMultistepScheduler",
        "euler": "FlowMatchEulerDiscreteScheduler",
    }
    return getattr(diffusers, names[sampler]).from_config(config)


class StreamLoop:
    """A `fastdiff_pipelines` stream; one push a frame."""

    def __init__(self, stream: Any):
        self.stream = stream

    def push(self, frame: "np.ndarray", frame_id: int) -> "Ready":
        """Put uint8 ``[H, W, 3]`` in; give those that came out, float ``[H, W, 3]`` in 0..1."""
        return _arrived(lambda: self.stream.push(frame, frame_id))

    def flush(self) -> "Ready":
        """Finish the frames inside, float ``[H, W, 3]`` in 0..1."""
        return _arrived(self.stream.flush)


def _arrived(work: Callable[[], Any]) -> "Ready":
    from fastdiff_pipelines import NotFinite

    try:
        return [(one.frame_id, one.pixels.float().permute(1, 2, 0).cpu().numpy()) for one in work()]
    except NotFinite as error:
        raise Failure(ExitCode.NOT_FINITE, f"{one_line(error)}; try --plan none, or float32") from error


@dataclass
class Run:
    """A method at work: what it made and how long it took.

    Attributes:
        milliseconds: one entry for each push of a frame.
        first_frame_ms: from handing over the first frame to having its result, waiting for others included.
        images: float [H, W, 3] in 0..1 by frame id.
    """

    name: str
    method: Method
    milliseconds: list[float] = field(default_factory=list)
    first_frame_ms: float | None = None
    images: "dict[int, np.ndarray]" = field(default_factory=dict)
    _busy_ms: float = 0.0

    def push(self, frame: "np.ndarray", frame_id: int) -> "Ready":
        """Hands one frame over and returns what became ready."""
        taken, ready = self._timed(lambda: self.method.push(frame, frame_id))
        self.milliseconds.append(taken)
        return ready

    def flush(self) -> "Ready":
        """The frames still on their way."""
        return self._timed(self.method.flush)[1]

    def _timed(self, work: "Callable[[], Ready]") -> "tuple[float, Ready]":
        start = perf_counter()
        ready = work()
        taken = (perf_counter() - start) * 1000
        self._busy_ms += taken
        for frame_id, image in ready:
            check_finite(image, f"frame {frame_id} of {self.name}")
            if self.first_frame_ms is None:
                self.first_frame_ms = self._busy_ms
            self.images[frame_id] = image
        return taken, ready


def check_finite(image: "np.ndarray", what: str) -> None:
    """Raises `Failure` when a model gave NaN or infinity."""
    import numpy as np

    if not np.isfinite(image).all():
        raise Failure(ExitCode.NOT_FINITE, f"the model gave NaN or infinity in {what}; try --plan none, or float32")


def to_bytes(image: "np.ndarray") -> "np.ndarray":
    """Float in 0..1 to uint8, rounded."""
    import numpy as np

    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def round_robin(runs: Sequence[Run], frames: "Sequence[np.ndarray]") -> None:
    """Gives every frame to every method in turn, so that a busy moment of the machine falls on all of them alike."""
    for frame_id, frame in enumerate(frames):
        # who begins rotates, or one method would always pay for another's cold caches
        shift = frame_id % len(runs)
        for run in (*runs[shift:], *runs[:shift]):
            run.push(frame, frame_id)
    for run in runs:
        run.flush()
