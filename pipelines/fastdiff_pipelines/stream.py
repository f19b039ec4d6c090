"""The image stream: one denoiser call serves every frame in flight, each at its own step.

After the stream batch of StreamDiffusion (https://arxiv.org/abs/2312.12491), built on slots instead of on shifting
buffers: a frame is a `Slot` that owns its state, noise, reference and settings, and a call is whatever slots are there.
Starting up is then a short batch and not one of zeros, the last frames can be flushed, frames keep the settings they
came with, and nothing needs a recursion. Nothing is global: any number of streams may run in one process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fastdiff.sampling.warm_start import WarmStart
from fastdiff_pipelines.denoiser import is_compiled
from fastdiff_pipelines.flight import Batch
from fastdiff_pipelines.prepared import Prepared
from fastdiff_pipelines.report import StreamReport
from fastdiff_pipelines.session import Session, check_finite
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.similarity import Similarity, SimilarityFilter
from fastdiff_pipelines.slots import Output, Slot, Timings
from fastdiff_pipelines.warm import Warmth

POLICIES = ("finish", "retarget")


class Stream:
    """Images in, images out, several in flight.

    Example:
        ```python
        stream = Stream(fastdiff.load(), "a red circle on a blue background", steps=4, strength=0.5)
        for output in stream.run(frames):  # as many out as in, in order
            show(output.image)
        ```

    Args:
        pipe: a diffusers pipeline of the Stable Diffusion family, SD3, FLUX, PixArt or Sana. Its modules are called as
            they are, so whatever `fastdiff.accelerate` did to them holds.
        prompt, negative_prompt, steps, strength, timesteps, guidance, guidance_scale, delta, sampler, noise, blend,
            seed, embedded_guidance: see `Settings`; all may change live.
        frame_buffer: frames that enter together, 1 or more: higher throughput, later pictures.
        height, width: in pixels, the pipeline's default if None.
        similarity: skip frames that show nothing new: a threshold such as 0.98, or a `Similarity`.
        warm_start: begin frames that show little new at a later step, from the last finished picture: True, or a
            `fastdiff.sampling.warm_start.WarmStart`. Fewer rows a call; a padded stream keeps its shape and only
            answers sooner.
        on_update: what an update does to frames in flight: "finish" lets them keep the settings they came with,
            "retarget" moves them to the new ones where they stand.
        pad: keep every model call at one shape, with unused rows masked out. None pads when the denoiser is compiled;
            without compilation an unpadded stream computes only rows that serve a frame.
        capacity: rows of a padded call; None takes what the first settings need. Settings that need more rows later
            take several calls of this shape instead of a new shape.

    Raises:
        ValueError, TypeError: impossible settings or sizes.
        Unsupported: the pipeline's denoiser is of an unknown kind.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 4,
        strength: float = 0.5,
        timesteps: Sequence[float] | None = None,
        guidance: str = "none",
        guidance_scale: float = 1.0,
        delta: float = 1.0,
        sampler: str = "lcm",
        noise: str = "fixed",
        blend: float = 0.5,
        seed: int = 0,
        embedded_guidance: float = 3.5,
        frame_buffer: int = 1,
        height: int | None = None,
        width: int | None = None,
        similarity: float | Similarity | None = None,
        warm_start: bool | WarmStart | None = None,
        on_update: str = "finish",
        pad: bool | None = None,
        capacity: int | None = None,
    ):
        settings = Settings(
            prompt, negative_prompt, steps, strength, None if timesteps is None else tuple(timesteps), guidance,
            guidance_scale, delta, sampler, noise, blend, seed, embedded_guidance,
        )  # fmt: skip
        for name, value in (("frame_buffer", frame_buffer), ("capacity", 1 if capacity is None else capacity)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        self.frame_buffer = frame_buffer
        self.on_update = _policy(on_update)
        self._pad = pad
        self._session = Session(pipe, settings, height, width)
        shape = self._session.shape
        blank = torch.zeros(1, *shape.latent, device=shape.device, dtype=shape.state)
        rows = frame_buffer * (settings.steps + self._session.prepared.negative_steps)
        self._batch = Batch(self._session.denoiser, capacity or rows, self._padded(), blank)
        self._filter = _filter(similarity)
        self._warmth = Warmth(_warm(warm_start))
        self._waiting: list[Slot] = []
        self._flying: list[Slot] = []
        self._order: deque[Slot] = deque()
        self._held: list[Output] = []
        self._shown: Slot | None = None
        self._pushed = self._processed = self._out = self._repeated = self._lost = 0
        self._denoise_ms = self._push_ms = 0.0

    @property
    def settings(self) -> Settings:
        """What frames pushed now get."""
        return self._session.prepared.settings

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames, in pixels."""
        return self._session.height, self._session.width

    @property
    def in_flight(self) -> int:
        """Frames pushed that have not come out yet."""
        return len(self._order)

    @property
    def spent_ms(self) -> tuple[float, float, float]:
        """Time so far in the encoder, the denoiser and the decoder."""
        return self._session.encode_ms, self._denoise_ms, self._session.decode_ms

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """Put a frame in and take out whatever is finished, in order of pushing.

        Args:
            frame: uint8 ``[H, W, 3]`` (array, tensor or PIL image), float ``[3, H, W]`` in [-1, 1], or None to make a
                picture from noise and prompt alone.
            frame_id: returned with the output; frames are numbered from 0 if it is None.
            captured: `time.perf_counter` when the frame was captured, for its age.

        Returns:
            Outputs that became ready, usually one, none while the stream fills, several when the pace changed.

        Raises:
            TypeError, ValueError: a frame of another size or dtype; nothing has changed.
            NotFinite: a model produced NaN; the frames concerned are lost, the others follow with the next call.
        """
        started = time.perf_counter()
        checked = self._session.admit(frame)
        slot = self._slot(checked, frame_id, captured, started)
        with self._session.running():
            if slot.source is None:
                self._waiting.append(slot)
            if slot.source is not None or len(self._waiting) == self.frame_buffer:
                group, self._waiting = self._waiting, []
                self._advance(group)
            outputs = self._deliver()
        self._push_ms += (time.perf_counter() - started) * 1000
        return outputs

    def flush(self) -> list[Output]:
        """Finish every frame in flight without a new one; as many come out as were still inside.

        Raises:
            NotFinite: as `push`; call again for the others.
        """
        started = time.perf_counter()
        with self._session.running():
            while self._waiting or self._flying:
                group, self._waiting = self._waiting, []
                self._advance(group)
            outputs = self._deliver()
        self._push_ms += (time.perf_counter() - started) * 1000
        return outputs

    def run(self, frames: Iterable[Any]) -> Iterator[Output]:
        """Stream a finite source: as many outputs as frames, in order, the last ones flushed."""
        for frame in frames:
            yield from self.push(frame)
        yield from self.flush()

    def update(self, **changes: Any) -> None:
        """Change settings live: any of `Settings`, `on_update`, `similarity` and `warm_start`. All take effect or none.

        Under "finish" frames pushed from now on get them. Under "retarget" frames in flight are moved too: each goes to
        the step of the new schedule that matches its progress, its clean estimate and noise re-mixed to that level.
        Shapes stay, so nothing is recompiled, and no junk comes out.

        Raises:
            TypeError: a name that is not a setting.
            ValueError: an impossible value.
        """
        policy = _policy(changes.pop("on_update", self.on_update))
        skipping = _filter(changes.pop("similarity")) if "similarity" in changes else self._filter
        warm = _warm(changes.pop("warm_start")) if "warm_start" in changes else self._warmth.settings
        settings = self.settings.changed(**changes)
        with self._session.running():
            prepared = self._session.prepare(settings)
            if policy == "retarget":
                for slot in self._waiting:
                    slot.prepared = prepared
                for slot in self._flying:
                    _retarget(slot, prepared)
        self.on_update, self._session.prepared = policy, prepared
        self._batch.padded = self._padded()
        self._filter, self._warmth.settings = skipping, warm
        if self._filter is not None:
            self._filter.reset()

    def warmup(self) -> None:
        """Run every model once at the shape it will have in the stream, so that compilation is over before a frame."""
        self._batch.padded = self._padded()
        session, buffer = self._session, self.frame_buffer
        with session.running():
            black = torch.zeros(3, *self.size)
            slots = [Slot(None, session.prepared, Timings(), black) for _ in range(buffer * len(session.prepared))]
            for i in range(0, len(slots), buffer):
                session.enter(slots[i : i + buffer], buffer)
            for i, slot in enumerate(slots):
                slot.step = i // buffer
            counts = vars(self._batch).copy()
            self._batch.advance(slots)
            session.decode(slots[-buffer:], buffer)
        for name in ("calls", "rows", "padding"):
            setattr(self._batch, name, counts[name])
        session.encodes = session.decodes = 0
        session.encode_ms = session.decode_ms = 0.0

    def clear(self) -> None:
        """Forget every frame in flight and begin again; settings stay, and fresh noise starts over."""
        self._lost += len(self._order)
        self._waiting, self._flying, self._held, self._shown = [], [], [], None
        self._order.clear()
        self._processed = 0
        self._warmth.reset()
        if self._filter is not None:
            self._filter.reset()

    def report(self) -> StreamReport:
        """What the stream did so far."""
        session, batch = self._session, self._batch
        compiled = is_compiled(session.denoiser.module)
        return StreamReport(
            frames_in=self._pushed,
            frames_out=self._out,
            frames_repeated=self._repeated,
            frames_lost=self._lost,
            frames_in_flight=len(self._order),
            denoiser_calls=batch.calls,
            rows_computed=batch.rows,
            rows_padded=batch.padding,
            encodes=session.encodes,
            decodes=session.decodes,
            warm_starts=self._warmth.starts,
            steps_saved=self._warmth.saved,
            padded=batch.padded,
            shapes=len(batch.shapes),
            recompiles=max(0, len(batch.shapes) - 1) if compiled else None,
            encode_ms=session.encode_ms,
            denoise_ms=self._denoise_ms,
            decode_ms=session.decode_ms,
            overhead_ms=max(0.0, self._push_ms - session.encode_ms - self._denoise_ms - session.decode_ms),
        )

    def _padded(self) -> bool:
        return is_compiled(self._session.denoiser.module) if self._pad is None else self._pad

    def _slot(self, frame: torch.Tensor | None, frame_id: Any, captured: float | None, now: float) -> Slot:
        timings = Timings(captured, pushed=now)
        slot = Slot(self._pushed if frame_id is None else frame_id, self._session.prepared, timings, frame)
        if self._filter is not None and frame is not None:
            if self._shown is None or self._shown.lost:
                self._filter.reset()
            if self._filter.skips(frame):
                slot.source, slot.frame = self._shown, None
        if slot.source is None:
            slot.number, self._processed = self._processed, self._processed + 1
            self._shown = slot
        self._pushed += 1
        self._order.append(slot)
        return slot

    def _advance(self, entering: list[Slot]) -> None:
        """Let frames enter, take one step of all, decode the finished. If a model raises, entering frames are lost."""
        slots = [*self._flying, *entering]
        if not slots:
            return
        padded_to = self.frame_buffer if self._batch.padded else 0
        try:
            if entering:
                self._session.enter(entering, padded_to)
            for slot in entering:
                self._warmth.enter(slot)
            started = time.perf_counter()
            self._batch.advance(slots)
        except BaseException:
            for slot in entering:
                slot.lost = True
            raise
        spent = (time.perf_counter() - started) * 1000
        self._denoise_ms += spent
        for slot in slots:
            slot.timings.denoise_ms += spent
            slot.frame = None
        self._flying = [slot for slot in slots if not slot.finished]
        self._decode([slot for slot in slots if slot.finished], padded_to)

    def _decode(self, finished: list[Slot], padded_to: int) -> None:
        for start in range(0, len(finished), self.frame_buffer):
            group = finished[start : start + self.frame_buffer]
            try:
                self._session.decode(group, padded_to)
            except BaseException:
                for slot in finished[start:]:
                    slot.lost = True
                raise
            for slot in group:
                slot.call = None

    def _deliver(self) -> list[Output]:
        """Outputs that are ready and whose turn it is."""
        outputs, self._held = self._held, []
        failure = None
        while self._order and (self._order[0].origin.lost or self._order[0].origin.pixels is not None):
            slot = self._order.popleft()
            if slot.source is None:
                failure = check_finite(slot) or failure
            if slot.origin.lost:
                self._lost += 1
                continue
            assert slot.origin.pixels is not None
            if slot.source is None:
                self._warmth.finished(slot)
            else:
                slot.timings.finished = time.perf_counter()
                self._repeated += 1
            settings = slot.origin.prepared.settings
            pixels, repeated = slot.origin.pixels, slot.source is not None
            outputs.append(Output(slot.frame_id, pixels, settings, slot.timings, repeated))
        if failure is not None:
            self._held = outputs
            raise failure
        self._out += len(outputs)
        return outputs


def _policy(value: str) -> str:
    if value not in POLICIES:
        raise ValueError(f"on_update must be one of {', '.join(POLICIES)}, got {value!r}")
    return value


def _filter(similarity: float | Similarity | None) -> SimilarityFilter | None:
    if similarity is None:
        return None
    return SimilarityFilter(similarity if isinstance(similarity, Similarity) else Similarity(float(similarity)))


def _warm(setting: bool | WarmStart | None) -> WarmStart | None:
    if isinstance(setting, WarmStart):
        return setting
    return WarmStart() if setting else None


def _retarget(slot: Slot, prepared: Prepared) -> None:
    """Move a slot in flight to other settings: same progress, its state re-mixed to the noise level of its new step."""
    old, step = slot.prepared, slot.step
    assert slot.call is not None
    if len(prepared) != len(old):
        step = min(round(step * len(prepared) / len(old)), len(prepared) - 1)
    clean = slot.call.clean()[slot.row : slot.row + 1]
    if slot.reference is None:
        slot.reference = clean
    signal, noise = float(old.table.signal[slot.step]), float(old.table.noise[slot.step])
    new_signal, new_noise = float(prepared.table.signal[step]), float(prepared.table.noise[step])
    if (signal, noise) != (new_signal, new_noise):
        slot.latent = new_signal * clean + (new_noise / noise) * (slot.latent - signal * clean)
    slot.prepared, slot.step, slot.noises = prepared, step, prepared.noises_for(slot.number)
