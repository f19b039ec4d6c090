"""What every stream over a pipeline shares: the models, the sizes, the settings in force, and their change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import default_size
from fastdiff_pipelines.denoiser import denoiser_for
from fastdiff_pipelines.frames import Codec, check_frame, normalise
from fastdiff_pipelines.prepared import Prepared, Shape, prepare
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import NotFinite, Slot

SHORT_FLOATS = (torch.float16, torch.bfloat16)


class Session:
    """A pipeline bound to one image size, with the settings that frames pushed now get.

    Attributes:
        shape: sizes, device and state dtype; fixed for the life of the session.
        prepared: the settings in force, ready to run.
        encodes, decodes: autoencoder calls made.
    """

    def __init__(self, pipe: Any, settings: Settings, height: int | None, width: int | None):
        if pipe is None or getattr(pipe, "vae", None) is None:
            raise ValueError("a stream needs a pipeline with an autoencoder in `vae`")
        default = (height or 0, width or 0) if height and width else default_size(pipe)
        self.pipe = pipe
        self.height, self.width = (height or default[0]), (width or default[1])
        for name, value in (("height", self.height), ("width", self.width)):
            if not isinstance(value, int) or not 8 <= value <= 8192:
                raise ValueError(f"{name} must be a whole number of 8 to 8192 pixels, got {value!r}")
        self.codec = Codec(pipe)
        self.denoiser = denoiser_for(pipe, self.height, self.width)
        self.encodes = self.decodes = 0
        self.encode_ms = self.decode_ms = 0.0
        self._accelerated = Accelerated(pipe)
        with self.running():
            self.shape = self._measure()
            self.prepared = prepare(settings, pipe.scheduler, self.denoiser, self.shape, version=0)

    def _measure(self) -> Shape:
        """Encode a black frame: the one sure way to know what the autoencoder makes of this size."""
        dtype = self.denoiser.dtype
        state = torch.float32 if dtype in SHORT_FLOATS else dtype
        blank = torch.zeros(1, 3, self.height, self.width, device=self.denoiser.device, dtype=self.codec.dtype)
        try:
            latent = self.codec.encode(blank)
            size = tuple(self.codec.decode(latent).shape[-2:])
        except RuntimeError as error:
            raise ValueError(f"the autoencoder does not take {self.height} x {self.width} pixels: {error}") from error
        if size != (self.height, self.width):
            raise ValueError(
                f"the autoencoder makes {size[0]} x {size[1]} pixels of {self.height} x {self.width}: choose a height "
                "and width divisible by its scale"
            )
        channels, height, width = latent.shape[1:]
        return Shape(self.height, self.width, (channels, height, width), self.denoiser.device, state)

    def running(self) -> AbstractContextManager[Any]:
        """Inference mode, inside the request of the pipeline's accelerations if it has any."""
        return _Running(self._accelerated())

    def prepare(self, settings: Settings) -> Prepared:
        """Settings ready to run, one version on; the session itself is not changed."""
        version = self.prepared.version + 1
        return prepare(settings, self.pipe.scheduler, self.denoiser, self.shape, version, self.prepared)

    def admit(self, frame: Any) -> torch.Tensor | None:
        """Check a frame against the stream and its settings; None is a frame made from noise."""
        settings = self.prepared.settings
        if frame is not None:
            return check_frame(frame, self.height, self.width)
        if settings.guidance == "self" and settings.guidance_scale != 1:
            raise ValueError('guidance "self" measures against an input frame; for text-to-image choose "onetime"')
        if settings.strength < 1 and settings.timesteps is None:
            raise ValueError("a frame from noise alone needs strength=1.0; update(strength=1.0) or push an image")
        return None

    def enter(self, slots: Sequence[Slot], padded_to: int = 0) -> None:
        """Give slots their first state: latents of their frames, noised to their first step."""
        started = time.perf_counter()
        images = [slot.frame for slot in slots if slot.frame is not None]
        latents = self.encode(images, padded_to) if images else []
        for slot in slots:
            prepared = slot.prepared
            slot.noises = prepared.noises_for(slot.number)
            if slot.frame is None:
                slot.latent = slot.noises[:1]
            else:
                signal, noise = prepared.entering
                slot.reference = latents.pop(0)
                slot.latent = torch.add(slot.reference * signal, slot.noises[:1], alpha=noise)
        spent = (time.perf_counter() - started) * 1000
        self.encode_ms += spent
        for slot in slots:
            slot.timings.entered, slot.timings.encode_ms = started, spent

    def encode(self, frames: Sequence[torch.Tensor], padded_to: int = 0) -> list[torch.Tensor]:
        """Latents ``[1, C, h, w]`` of checked frames, in one call of at least ``padded_to`` images."""
        images = [normalise(frame, self.shape.device, self.codec.dtype) for frame in frames]
        images += [images[0]] * (padded_to - len(images))
        batch = images[0] if len(images) == 1 else torch.cat(images)
        self.encodes += 1
        return list(self.codec.encode(batch).to(self.shape.state).split(1))[: len(frames)]

    def decode(self, slots: Sequence[Slot], padded_to: int = 0) -> None:
        """Give finished slots their pixels, in one call of at least ``padded_to`` latents."""
        started = time.perf_counter()
        latents = [slot.latent for slot in slots]
        latents += [latents[0]] * (padded_to - len(latents))
        pixels = self.codec.decode(latents[0] if len(latents) == 1 else torch.cat(latents))
        self.decodes += 1
        finished = time.perf_counter()
        self.decode_ms += (finished - started) * 1000
        for slot, picture in zip(slots, pixels, strict=False):
            slot.pixels = picture
            slot.timings.finished, slot.timings.decode_ms = finished, (finished - started) * 1000


class Accelerated:
    """The request in which a stream runs a pipeline's accelerations; when they are others, another one."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self._handle: Any = None
        self._request: Any = None

    def __call__(self) -> AbstractContextManager[Any]:
        """The request to run in; nothing where the pipeline has no accelerations.

        Raises:
            Unsupported: accelerations that go by one clip's step after step.
        """
        handle = getattr(type(self.pipe), "_fastdiff_handle", None)
        if handle is None:
            return nullcontext()
        if handle is not self._handle:
            refuse_step_caches(handle.plan)
        if handle is not self._handle or self._request.closed:
            self._handle, self._request = handle, handle.request(keep=True)
        return self._request

    def close(self) -> None:
        """Drop what the request holds."""
        if self._request is not None:
            self._request.close()


def refuse_step_caches(plan: Any) -> None:
    """Raise `Unsupported` for a plan with an acceleration that goes by one clip's step after step."""
    caches = [one for one in plan if one.stage == "blocks" and not one.exact]
    if caches:
        raise Unsupported(
            f"{caches[0]!r} reuses what the last call computed, but every call of a stream holds other frames in the "
            "same rows; remove it from the plan for streaming"
        )


class _Running:
    """Inference mode and a request, entered together and left in reverse."""

    def __init__(self, request: AbstractContextManager[Any]):
        self._request = request
        self._mode = torch.inference_mode()

    def __enter__(self) -> None:
        self._mode.__enter__()
        self._request.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._request.__exit__(kind, error, trace)
        finally:
            self._mode.__exit__(kind, error, trace)


def check_finite(slot: Slot) -> NotFinite | None:
    """The error to raise when a slot's picture holds NaN; the slot is then lost."""
    if slot.pixels is None or not bool(slot.pixels.sum().isnan()):
        return None
    clean = bool(torch.isfinite(slot.latent).all())
    slot.lost, slot.pixels = True, None
    if clean:
        return NotFinite(
            f"the autoencoder produced NaN for frame {slot.frame_id!r} from finite latents; run it in a wider dtype, "
            "for example pipe.vae.to(torch.float32)"
        )
    return NotFinite(
        f"the denoiser produced NaN or infinity for frame {slot.frame_id!r} (prompt "
        f"{slot.prepared.settings.prompt!r}); check its weights and dtype, and lower guidance_scale"
    )
