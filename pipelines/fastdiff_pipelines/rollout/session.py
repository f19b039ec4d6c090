"""One video without end: its past, the chunks in flight, and what the next ones get.

A chunk is made in three movements, so that what a viewer need not wait for comes after the picture: `generate` takes
it through the steps and decodes it, `finalise` brings the context up to date (flashdreams names the same split). With
several chunks in flight one denoiser call moves each of them on by a step. What that equals is declared by the kind of
context. "steps" is the stream batch of StreamDiffusionV2 (https://arxiv.org/abs/2511.07399): a rollout one chunk at a
time with a cache of its own for every step. "rolling" puts the chunks in flight one after the other behind the finished
ones, each told its own noise level, as diffusion forcing trains models and Rolling Forcing runs them
(https://arxiv.org/abs/2509.25161): one block-causal forward over everything made so far. Neither is a rollout whose
chunks see nothing but finished ones, which is what both kinds are not batched for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.chunks import Chunk, Flying
from fastdiff_pipelines.rollout.controls import check_controls, control_clip
from fastdiff_pipelines.rollout.flow import chunk_flows
from fastdiff_pipelines.rollout.ledger import ChunkLedger
from fastdiff_pipelines.rollout.levels import Levels, shift_of
from fastdiff_pipelines.rollout.memory import Memory
from fastdiff_pipelines.rollout.motion import MotionController
from fastdiff_pipelines.rollout.noise import Noise, draw
from fastdiff_pipelines.rollout.settings import Context, RolloutSettings, check_together
from fastdiff_pipelines.session import Accelerated
from fastdiff_pipelines.slots import NotFinite

if TYPE_CHECKING:
    from fastdiff_pipelines.rollout.rollout import ChunkRollout


class RolloutSession:
    """A rollout under way. Opened by `ChunkRollout.open`; sessions share a model and nothing else.

    Attributes:
        settings: what the next chunk gets.
        ledger: what became of every frame, and when.
        frames_out: frames of video made so far.
        restarts: how often what was inside was lost and the video began anew.
    """

    def __init__(
        self,
        model: ChunkRollout,
        settings: RolloutSettings,
        context: Context,
        fps: float | None = None,
        target_ms: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_together(settings, context)
        self.model, self.settings, self.context = model, settings, context
        self.ledger = ChunkLedger(clock, fps, target_ms)
        self.clock = self.ledger.steady
        self.version = 0
        self.frames_out = self.restarts = 0
        self.closed = False
        self._number = 0
        self.accelerated = Accelerated(model.pipe)
        self._flying: list[Flying] = []
        self._made: list[Chunk] = []
        with self._running():
            self._codec = StreamingVAE(model.vae)
            self._memory = Memory(model.causal, context, settings, model.cell[1:])
            self._memory.say(self._texts(settings), settings.guidance_scale)
        self._ready(settings)
        self._begin()

    @property
    def wanted(self) -> int:
        """Control frames that fill the next chunk."""
        return sum(self._groups)

    @property
    def in_flight(self) -> int:
        """Chunks that have begun and have not been handed out."""
        return len(self._flying) + len(self._made)

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds between chunks."""
        if self.closed:
            return 0
        return self._memory.nbytes + self._codec.held_bytes + sum(item.nbytes for item in self._flying)

    def generate(self, control: Any = None, captured: Sequence[float] | None = None) -> list[Chunk]:
        """Begin the next chunk and take out those that are finished: one, or none while a batched rollout fills.

        Args:
            control: frames for video to video, `wanted` of them or fewer at the end of a stream, each uint8
                ``[H, W, 3]`` or float ``[3, H, W]`` in [-1, 1]; for several videos a sequence of such sequences. None
                makes video from noise.
            captured: when each control frame was taken, by the session's clock.

        Raises:
            TypeError, ValueError: frames of another size, dtype or number, or not finite; nothing has changed.
            NotFinite: a model produced NaN. The session has lost its context and begins anew.
        """
        self._check_open()
        entered = self.clock()
        frames = self._admit(control)
        with self._running(), self._or_anew():
            self._tidy()
            self._flying.append(self._enter(frames, entered, captured))
            if self.settings.batched:
                self._step()
            else:
                self._drain()
        return self._handed()

    def flush(self) -> list[Chunk]:
        """Finish every chunk in flight."""
        self._check_open()
        with self._running(), self._or_anew():
            self._drain()
        return self._handed()

    def finalise(self) -> None:
        """Bring the context up to date after a chunk was taken out. `generate` does it too if nobody else has."""
        self._check_open()
        with self._running(), self._or_anew():
            self._tidy()

    def update(self, **changes: Any) -> None:
        """Change settings live (`RolloutSettings`, and `prompt` for all prompts). All take effect or none.

        Under a new prompt the context is computed again, so that it forgets the old one. Chunks in flight hear it too:
        in a "rolling" context they begin again, which takes `steps` - 1 more calls, once, and the next chunk to come
        out is the new prompt's from its first step on. Another number of steps, chunk length, batching or guidance
        first finishes what is in flight; those chunks come out with the next ones.

        Raises:
            TypeError, ValueError: as `RolloutSettings.changed`; or settings that do not fit the context.
        """
        self._check_open()
        old, new = self.settings, self.settings.changed(**changes)
        check_together(new, self.context)
        shape = ("steps", "sigmas", "chunk", "batched")
        guided = new.guidance_scale > 1
        words = ("prompts", "negative_prompt") if guided else ("prompts",)
        said = any(getattr(new, name) != getattr(old, name) for name in words)
        with self._running():
            texts = self._texts(new) if said or guided != (old.guidance_scale > 1) else self._memory.texts
            if guided != (old.guidance_scale > 1) or any(getattr(new, name) != getattr(old, name) for name in shape):
                with self._or_anew():
                    self._drain()
                    # the cache groups frames by the chunk length in force when they come in
                    self._tidy(settles=new.chunk != old.chunk)
            self._memory.say(texts, new.guidance_scale)
            self._memory.reshape(new)
        self._ready(new)
        self.settings, self.version = new, self.version + 1
        self._due, self._said = self._due or said, self._said or said
        self.ledger.asked(self.version)

    def run(self, controls: Any = None, chunks: int | None = None, on_bad: str = "raise") -> Iterator[Chunk]:
        """Chunks as they are finished; see `ChunkRollout.__call__`, whose frames these hold."""
        from fastdiff_pipelines.rollout.feeding import feed

        return feed(self, controls, chunks, on_bad)

    def restart(self, cause: str = "restarted") -> None:
        """Forget context and chunks in flight; the next chunk begins a video. Settings and counts stay."""
        self._check_open()
        lost = sum(item.shown or 0 for item in self._flying) + sum(len(chunk) for chunk in self._made)
        self.ledger.drop(cause, lost)
        self.restarts += 1
        self._begin()

    def close(self) -> None:
        """End the session and let go of its memory. A second call does nothing."""
        if not self.closed:
            self.restart("closed")
            self.closed = True
            self.accelerated.close()
            del self._memory

    def __enter__(self) -> RolloutSession:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def _begin(self) -> None:
        self._flying, self._made = [], []
        self._unsettled: tuple[int, Tensor] | None = None
        self._due, self._said, self._since, self._redecode, self._begun = False, False, 0, 0, False
        self._last_control: Tensor | None = None
        self._from_noise: bool | None = None
        self._memory.clear()
        self._codec.reset()
        self._noise.reset()
        if self._motion is not None:
            self._motion.reset()

    def _ready(self, settings: RolloutSettings) -> None:
        """Prepare what follows from settings alone, keeping what did not change."""
        model = self.model
        self._levels = Levels(settings.steps, shift_of(model.pipe.scheduler), settings.sigmas, model.device)
        key = (settings.noise, settings.seed, len(settings.prompts))
        if getattr(self, "_noise_key", None) != key:
            self._noise_key = key
            self._noise = Noise(*key, model.cell, model.device, model.state)
        if getattr(self, "_motion", None) is None or settings.motion != self.settings.motion:
            self._motion = None if settings.motion is None else MotionController(settings.motion)

    def _running(self) -> AbstractContextManager[None]:
        return self.model.running(self)

    @contextmanager
    def _or_anew(self) -> Iterator[None]:
        """What fails half-way leaves no context to go on from."""
        try:
            yield
        except BaseException:
            self.restart("failed")
            raise

    def _texts(self, settings: RolloutSettings) -> list[Text]:
        texts = [self.model.encode(settings.prompts)]
        if settings.guidance_scale > 1:
            texts.append(self.model.encode((settings.negative_prompt,) * len(settings.prompts)))
        return texts

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this rollout is closed; open another one")

    def _admit(self, control: Any) -> Tensor | None:
        """Control frames as float ``[B, 3, F, H, W]``, checked; nothing is changed yet."""
        if self._from_noise is not None and self._from_noise != (control is None):
            began = "from noise" if self._from_noise else "from control frames"
            raise ValueError(f"this video began {began} and goes on so; restart() it or open another one")
        if control is None:
            if self.settings.noise == "warped" or self.settings.motion is not None:
                raise ValueError("warped noise and motion go by control frames, and there are none")
            return None
        clip = control_clip(control, len(self.settings.prompts), self.wanted, self.model.height, self.model.width)
        return clip.to(self.model.device, self.model.vae.dtype)

    def check(self, frame: Any) -> None:
        """Raise a `TypeError` or `ValueError` for a control frame (several for several videos) that does not fit."""
        check_controls(frame, len(self.settings.prompts), self.model.height, self.model.width)

    @property
    def _groups(self) -> list[int]:
        """Control frames in each latent frame of the next chunk."""
        first, later = self._codec.frames
        return [later if self._begun else first, *[later] * (self.settings.chunk - 1)]

    def _enter(self, frames: Tensor | None, entered: float, captured: Sequence[float] | None) -> Flying:
        """The next chunk as it is before its first step."""
        settings, model = self.settings, self.model
        began = self.clock()
        strength = torch.ones(len(settings.prompts), device=model.device)
        clean, flows, shown = None, None, None
        if frames is not None:
            shown = frames.shape[2]
            frames = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, self.wanted - shown, -1, -1)], dim=2)
            strength = strength * settings.strength
            if self._motion is not None:
                strength = self._motion.strength(frames, settings.strength).to(strength)
            if settings.noise == "warped":
                flows = chunk_flows(self._last_control, frames, self._groups, *model.cell[1:])
                self._last_control = frames[:, :, -1:].clone()
            encoded = self._codec.encode(frames)
            assert encoded is not None
            clean = self._codec.scaled(encoded).to(model.state)
        sigmas = self._levels(strength)
        noises = self._noise.chunk(self._number, settings.chunk, settings.steps, flows)
        first = sigmas[:, 0].to(model.state).view(-1, 1, 1, 1, 1)
        x = noises[0] if clean is None else (1 - first) * clean + first * noises[0]
        flying = Flying(self._number, x, sigmas, noises, entered, shown, None if captured is None else tuple(captured))
        self.ledger.admit(shown or 0)
        self._from_noise, self._begun = frames is None, True
        self._number += 1
        flying.stages["encode"] = (self.clock() - began) * 1000
        return flying

    def _step(self) -> None:
        """Move every chunk in flight on by a step, in one denoiser call; the finished one can then be handed out."""
        began = self.clock()
        flying = sorted(self._flying, key=lambda item: item.step)
        parts = self._rolled(flying[::-1])[::-1] if self.context.kind == "rolling" else self._stacked(flying)
        for item, part in zip(flying, parts, strict=True):
            item.advance(part, self.settings.sampler)
        spent = (self.clock() - began) * 1000
        for item in flying:
            item.stages["denoise"] = item.stages.get("denoise", 0.0) + spent
        finished = [self._decode(item) for item in flying if item.finished]
        self._flying = [item for item in self._flying if not item.finished]
        self._made += finished

    def _stacked(self, flying: list[Flying]) -> list[Tensor]:
        """Velocities of chunks side by side, each with a past of its own."""
        kind, last = self.context.kind, self.settings.steps - 1
        blocks = [item.step if kind == "steps" else 0 for item in flying]
        commit = kind == "steps" or (kind == "last" and flying[0].step == last)
        x = flying[0].x if len(flying) == 1 else torch.cat([item.x for item in flying])
        told = torch.cat([item.told() for item in flying])
        return list(self._memory.velocity(x, told, blocks, commit).chunk(len(flying)))

    def _rolled(self, flying: list[Flying]) -> list[Tensor]:
        """Velocities of chunks one after the other, oldest first, behind one that has just been finished, if any."""
        settling, self._unsettled = self._unsettled, None
        frames = [item.x for item in flying]
        told = [item.told()[:, None].expand(-1, item.x.shape[2]) for item in flying]
        kept = 0
        if settling is not None:
            noised, level = self._contextual(*settling)
            frames, told, kept = [noised, *frames], [level, *told], noised.shape[2]
        sizes = [part.shape[2] for part in frames]
        velocity = self._memory.velocity(
            torch.cat(frames, dim=2), torch.cat(told, dim=1), [0], kept, self.settings.chunk
        )
        return list(velocity.split(sizes, dim=2))[len(sizes) - len(flying) :]

    def _decode(self, item: Flying) -> Chunk:
        began = self.clock()
        latents = self._codec.unscaled(item.x).to(self.model.vae.dtype)
        decoded = None
        for _ in range(1 + self._redecode if bool(torch.isfinite(latents).all()) else 0):
            decoded = self._codec.decode(latents)
        self._redecode = 0
        if decoded is None or not bool(torch.isfinite(decoded).all()):
            raise NotFinite(
                f"chunk {item.number} (prompt {self.settings.prompts[0]!r}) holds NaN or infinity; check the model's "
                "weights and dtype. The video begins anew"
            )
        pixels = decoded.float().mul_(0.5).add_(0.5).clamp_(0, 1)[:, :, : item.shown]
        self._since += 1
        every = self.context.recache_every
        self._due = self._due or (every > 0 and self._since >= every)
        if self.context.kind in ("clean", "rolling"):
            self._unsettled = item.number, item.x
        item.stages["decode"] = (self.clock() - began) * 1000
        chunk = Chunk(
            item.number, self.frames_out, pixels, item.x, self.settings, self.version, item.stages, item.entered,
            item.captured,
        )  # fmt: skip
        self.frames_out += len(chunk)
        if item.shown is None:
            self.ledger.admit(len(chunk))
        return chunk

    def _drain(self) -> None:
        while self._flying:
            self._step()

    def _tidy(self, settles: bool = False) -> None:
        # a rolling context takes finished latents in with the next call, unless they have to be in before it
        waits = self.context.kind == "rolling" and not settles
        if not self._due and (self._unsettled is None or waits):
            return
        began = self.clock()
        if self._unsettled is not None:
            noised, told = self._contextual(*self._unsettled)
            self._memory.velocity(noised, told, [0], commit=True)
            self._unsettled = None
        if self._due:
            self._memory.recache(self.settings.chunk)
            self._due, self._since = False, 0
        if self._said:
            self._redecode = self.context.redecode if self.frames_out else 0
            if self.context.kind == "rolling":
                self._again()
            self._said = False
        self.ledger.keep_up((self.clock() - began) * 1000)

    def _again(self) -> None:
        """Take chunks in flight from their beginning to where they were, under the context and the prompts of now."""
        flying = sorted(self._flying, key=lambda item: -item.step)  # oldest first
        reached = [item.rewind() for item in flying]
        for call in range(max(reached, default=0)):  # as a rollout fills: one by one they join in
            joined = [item for item, step in zip(flying, reached, strict=True) if step + call >= reached[0]]
            for item, part in zip(joined, self._rolled(joined), strict=True):
                item.advance(part, self.settings.sampler)

    def _contextual(self, number: int, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Finished latents as context, and what the model is told of each of their frames ``[B, c]``."""
        level = self.context.level
        if level:
            shape = tuple(clean.shape[1:])
            noise = draw(self.settings.seed, len(clean), shape, number + 1, self.settings.steps)
            clean = (1 - level) * clean + level * noise.to(clean)
        return clean, clean.new_full((len(clean), clean.shape[2]), 1000 * level)

    def _handed(self) -> list[Chunk]:
        made, self._made = self._made, []
        return made
