"""A causal video autoencoder that takes and gives a few frames at a time, for as long as wanted.

diffusers' causal video autoencoders work through a clip in chunks and keep a cache of features between them, but drop
it when a call ends, so that calling them chunk by chunk loses frames and leaves seams. Here the cache belongs to a
session: what comes out is bit for bit what one call on the whole clip gives (up to the rounding of a 1 x 1 x 1
convolution where a backend computes it otherwise for one frame than for many), memory does not grow with length, and
sessions on one autoencoder do not mix (the Stream-VAE of StreamDiffusionV2, https://arxiv.org/abs/2511.07399, for any
of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy_video import causal_chunks, latent_scale


class StreamingVAE:
    """One session of a causal video autoencoder.

    Args:
        vae: an `AutoencoderKLWan`, `AutoencoderKLQwenImage`, `AutoencoderKLCogVideoX`, or, to decode only, an
            `AutoencoderKLMochi`. Sessions share its weights; nothing of it is changed.

    Raises:
        Unsupported: an autoencoder that keeps no cache between chunks.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._chunks = causal_chunks(vae)
        self._mean, self._deviation = latent_scale(vae)
        self.reset()

    @property
    def frames(self) -> tuple[int, int]:
        """Frames of video that make the first chunk of latents, and each later one."""
        return self._chunks.frames

    @property
    def latents(self) -> tuple[int, int]:
        """Latent frames that make the first chunk of video, and each later one."""
        return self._chunks.latents

    @property
    def held_bytes(self) -> int:
        """Bytes of the caches, and of frames and latents that wait for their chunk to be complete."""
        return self._encoding.held_bytes + self._decoding.held_bytes

    def reset(self) -> None:
        """Begin a new clip: what is encoded or decoded next comes first."""
        self._encoding = _Side("frames", self._chunks.frames, self._chunks.encode, self._chunks.empty("encoder"))
        self._decoding = _Side("latents", self._chunks.latents, self._chunks.decode, self._chunks.empty("decoder"))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor | None:
        """The latents that are complete after these frames.

        Args:
            frames: any number, ``[B, 3, F, H, W]`` in -1..1; those that do not fill a chunk wait for the next call.

        Returns:
            ``[B, C, k, h, w]``, the means that `vae.encode(...).latent_dist.mode()` gives; None where no chunk is full.

        Raises:
            ValueError: values that are not finite, or a shape other than the session began with.
            Unsupported: an autoencoder that encodes whole clips only, or that is set to tile frames of this size.
        """
        if not self._chunks.encodes:
            raise Unsupported(
                f"{type(self.vae).__name__} encodes whole clips only: its encoder attends over all frames"
            )
        self._check_tiling(frames.shape[-2:], "sample")
        if not torch.isfinite(frames).all():
            raise ValueError("there are frames with values that are not finite; the session stands where it stood")
        moments = self._encoding.push(frames)
        return None if moments is None else moments.chunk(2, dim=1)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor | None:
        """The frames that are complete after these latents.

        Args:
            latents: any number, ``[B, C, k, h, w]`` as `vae.decode` takes them; see `unscaled`.

        Returns:
            ``[B, 3, F, H, W]`` in -1..1; None where no chunk is full.

        Raises:
            ValueError: values that are not finite, another number of channels than the autoencoder's, or a shape other
                than the session began with.
            Unsupported: an autoencoder that is set to tile frames of this size.
        """
        self._check_latents(latents)
        frames = self._decoding.push(latents)
        return None if frames is None else self._chunks.finish(frames)

    def decode_clip(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames of a whole clip, chunk by chunk as the autoencoder divides a clip of this length.

        The session's own stream is not touched. Arguments and errors are those of `decode`.
        """
        self._check_latents(latents)
        cache: Any = self._chunks.empty("decoder")
        for part in latents.split(self._chunks.of_clip(latents.shape[2]), dim=2):
            with torch.no_grad():
                frames, cache = self._chunks.decode(part, cache)
                frames = self._chunks.finish(frames)
            yield frames

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as a denoiser sees them, of about unit variance."""
        return (latents - self._mean.to(latents)) / self._deviation.to(latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """A denoiser's latents as `decode` takes them."""
        return latents * self._deviation.to(latents) + self._mean.to(latents)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5:
            raise ValueError(f"latents have the shape [B, C, F, H, W], not {list(latents.shape)}")
        config = self.vae.config
        channels = getattr(config, "z_dim", None) or config.latent_channels
        if latents.shape[1] != channels:
            raise ValueError(f"this autoencoder's latents have {channels} channels, not {latents.shape[1]}")
        ratio = getattr(self.vae, "spatial_compression_ratio", None) or 8
        self._check_tiling([side * ratio for side in latents.shape[-2:]], "sample")
        if not torch.isfinite(latents).all():
            raise ValueError("there are latents with values that are not finite; the session stands where it stood")

    def _check_tiling(self, size: Any, kind: str) -> None:
        limits = [getattr(self.vae, f"tile_{kind}_min_{side}", None) for side in ("height", "width")]
        tiles = any(limit is not None and side > limit for side, limit in zip(size, limits, strict=True))
        if getattr(self.vae, "use_tiling", False) and tiles:
            raise Unsupported("every tile would need caches of its own; call vae.disable_tiling() to stream")


def decoded(vae: Any, latents: Tensor) -> Iterator[Tensor]:
    """The frames of a clip a chunk at a time, so that only one chunk of pixels is in memory.

    Args:
        vae: as for `StreamingVAE`.
        latents: ``[B, C, k, h, w]`` as a pipeline gives them with `output_type="latent"`, of about unit variance.

    Yields:
        ``[B, 3, F, H, W]`` in -1..1; together what one call on the whole clip decodes to.
    """
    session = StreamingVAE(vae)
    yield from session.decode_clip(session.unscaled(latents))


class _Side:
    """One direction: what waits for its chunk to be complete, and the cache between chunks."""

    def __init__(self, name: str, sizes: tuple[int, int], run: Callable[[Tensor, Any], Any], cache: Any) -> None:
        self.name, self.sizes, self.run, self.cache = name, sizes, run, cache
        self.begun = False
        self.waiting: Tensor | None = None

    @property
    def held_bytes(self) -> int:
        waiting = 0 if self.waiting is None else self.waiting.nbytes
        return waiting + sum(tensor.nbytes for tensor in _tensors(self.cache))

    def push(self, given: Tensor) -> Tensor | None:
        """What full chunks give. Where one fails, the session stands after the last that did not."""
        if given.ndim != 5:
            raise ValueError(f"{self.name} have the shape [B, C, F, H, W], not {list(given.shape)}")
        if self.waiting is not None and _without_frames(given) != _without_frames(self.waiting):
            raise ValueError(
                f"the session began with {self.name} of batch, channels, height and width "
                f"{_without_frames(self.waiting)} and now gets {_without_frames(given)}; reset() it or begin another"
            )
        queue = given if self.waiting is None else torch.cat([self.waiting, given], dim=2)
        made = []
        while queue.shape[2] >= self.sizes[self.begun]:
            size = self.sizes[self.begun]
            result, self.cache = self.run(queue[:, :, :size], self.cache)
            made.append(result)
            queue, self.begun = queue[:, :, size:], True
            self.waiting = queue
        self.waiting = queue.clone()  # not a view: the frames before it would be kept alive
        return torch.cat(made, dim=2) if made else None


def _without_frames(tensor: Tensor) -> list[int]:
    return [*tensor.shape[:2], *tensor.shape[3:]]


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    children = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return [tensor for child in children for tensor in _tensors(child)]
