"""A video model where a stream of images is expected: frames in, one at a time, and frames out.

Chunks are gathered on the way in and played on the way out, a frame for each that comes in, as a camera's pace would
have it; so a live session, its page and its command line need not know what kind of model they run.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from fastdiff_pipelines.rollout.chunks import Chunk
from fastdiff_pipelines.rollout.rollout import ChunkRollout
from fastdiff_pipelines.rollout.settings import RolloutSettings
from fastdiff_pipelines.rollout.slo import SloScheduler
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import Output, Timings

_SAMPLERS = {"lcm": "renoise", "euler": "euler"}
_GUIDANCE = ("none", "full")
_NOISE = ("fixed", "fresh")
_IMAGES_ONLY = ("timesteps", "prompts", "seeds", "control", "image_prompt")


def rollout_settings(settings: Settings, before: RolloutSettings) -> RolloutSettings:
    """What an image stream's settings mean for video, over what a video stream has besides.

    Raises:
        ValueError: a setting that only image streams have.
    """
    for name, possible in (("sampler", _SAMPLERS), ("guidance", _GUIDANCE), ("noise", _NOISE)):
        if getattr(settings, name) not in possible:
            raise ValueError(f"a video stream takes {name} {' or '.join(possible)}, not {getattr(settings, name)!r}")
    given = [name for name in _IMAGES_ONLY if getattr(settings, name)]
    if given:
        raise ValueError(f"a video stream takes no {', '.join(given)}; leave them out")
    return before.changed(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        steps=settings.steps,
        strength=settings.strength,
        guidance_scale=settings.guidance_scale if settings.guidance == "full" else 1.0,
        sampler=_SAMPLERS[settings.sampler],
        noise=settings.noise,
        seed=settings.seed,
    )


class VideoStream:
    """`Stream`'s interface over one session of a `ChunkRollout`.

    Args:
        rollout: the model; other streams may share it.
        settings: as image streams have them, as far as video has them too.
        scheduler: changes steps, chunk length and batching to keep a deadline; None leaves them alone.
        options: any of `RolloutSettings` and `Context` besides.

    Raises:
        ValueError: settings that only image streams have.
    """

    def __init__(
        self, rollout: ChunkRollout, settings: Settings, scheduler: SloScheduler | None = None, **options: Any
    ):
        self.rollout, self.settings = rollout, settings
        self.scheduler = scheduler
        self.size = rollout.height, rollout.width
        self._session = rollout.open(settings.prompt, **options)
        self._session.update(**self._wanted(settings))
        self._inside: deque[tuple[Any, Timings]] = deque()
        self._waiting: list[Any] = []
        self._ready: deque[Output] = deque()
        self._count = 0
        self._spent = [0.0, 0.0, 0.0]

    @property
    def in_flight(self) -> int:
        """Frames pushed that have not come out yet."""
        return len(self._inside) + len(self._ready)

    @property
    def spent_ms(self) -> tuple[float, float, float]:
        """Time so far in the encoder, the denoiser and the decoder."""
        return self._spent[0], self._spent[1], self._spent[2]

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """Put a frame in and take out the one whose turn it is, if it is there.

        Raises:
            TypeError, ValueError: a frame of another size or dtype, or values that are not finite; nothing has changed.
            NotFinite: the model produced NaN; the frames inside are lost.
        """
        if frame is None:
            raise ValueError("a video stream takes frames; a ChunkRollout makes video from noise")
        self._session.check(frame)
        now = time.perf_counter()
        self._inside.append((self._count if frame_id is None else frame_id, Timings(captured, now, now)))
        self._count += 1
        self._waiting.append(frame)
        if len(self._waiting) >= self._session.wanted:
            self._generate()
        else:
            self._guarded(self._session.finalise)
        return [self._ready.popleft()] if self._ready else []

    def flush(self) -> list[Output]:
        """Finish every frame inside."""
        while self._waiting:
            self._generate()
        self._take(self._guarded(self._session.flush))
        found, self._ready = list(self._ready), deque()
        return found

    def update(self, **changes: Any) -> None:
        """Change settings live, as `Stream.update`; the context is computed again when the prompt changes.

        Raises:
            TypeError, ValueError: names or values that are not possible for video.
        """
        for name in ("on_update", "warm_start"):
            changes.pop(name, None)
        if changes.pop("similarity", None):
            raise ValueError("a video stream skips no frames; leave similarity out")
        settings = self.settings.changed(**changes)
        new = self._wanted(settings)
        self._guarded(lambda: self._session.update(**new))
        self.settings = settings

    def clear(self) -> None:
        """Forget every frame inside and begin anew."""
        self._session.restart("cleared")
        self._inside.clear()
        self._waiting.clear()
        self._ready.clear()

    def warmup(self) -> None:
        """Run every model once, so that what is compiled or allocated on first use is there before a frame."""
        import numpy as np

        black = np.zeros((*self.size, 3), np.uint8)
        options = vars(self._session.context) | vars(self._session.settings)
        prompts = options.pop("prompts")
        with self.rollout.open(prompts, **options) as session:
            # the last of them is made when as many are in flight as ever will be, behind a finished one
            for _ in range(session.settings.steps + 1):
                session.generate([black] * session.wanted)
            session.flush()

    def report(self) -> str:
        """What became of the frames, and what the scheduler chose, in a line."""
        frames = self._session.ledger.admitted
        said = f"video stream: {frames} frames in, {self._session.frames_out} made, {self.in_flight} in flight"
        return said if self.scheduler is None else f"{said}; {self.scheduler.report()}"

    def _wanted(self, settings: Settings) -> dict[str, Any]:
        """What to change in the session for these settings and the scheduler's choice, which overrules them."""
        now = self._session.settings
        new = rollout_settings(settings, now)
        if self.scheduler is not None:
            new = new.changed(**self.scheduler.choice.changes)
        return {name: value for name, value in vars(new).items() if value != getattr(now, name)}

    def _generate(self) -> None:
        frames = self._waiting[: self._session.wanted]
        began = time.perf_counter()
        made = self._guarded(lambda: self._session.generate(frames))
        del self._waiting[: len(frames)]
        self._take(made)
        # only a pipeline that has filled costs what its every chunk will
        if self.scheduler is not None and len(made) == 1:
            now = time.perf_counter()
            choice = self.scheduler.observe((now - began) * 1000, now)
            if choice is not None:
                self._guarded(lambda: self._session.update(**choice.changes))

    def _guarded(self, work: Any) -> Any:
        """Run the session; where it fails it has begun anew, and so does the stream."""
        before = self._session.restarts
        try:
            return work()
        except BaseException:
            if self._session.restarts != before:
                self._inside.clear()
                self._waiting.clear()
            raise

    def _take(self, chunks: list[Chunk]) -> None:
        finished = time.perf_counter()
        for chunk in chunks:
            stages = [chunk.stages.get(stage, 0.0) for stage in ("encode", "denoise", "decode")]
            self._spent = [before + spent for before, spent in zip(self._spent, stages, strict=True)]
            for place in range(len(chunk)):
                frame_id, timings = self._inside.popleft()
                timings.finished = finished
                timings.encode_ms, timings.denoise_ms, timings.decode_ms = stages
                self._ready.append(Output(frame_id, chunk.pixels[0, :, place], self.settings, timings))
