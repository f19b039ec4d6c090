"""Frames in and out: pixels as the world has them, latents as the model has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def check_frame(frame: Any, height: int, width: int) -> torch.Tensor:
    """The frame as a tensor: uint8 ``[H, W, 3]`` or float ``[3, H, W]`` in [-1, 1], on whatever device it is.

    Accepts numpy arrays, torch tensors and PIL images; nothing is copied or converted yet.

    Raises:
        TypeError: for a dtype that is neither uint8 nor floating point.
        ValueError: for another size or layout, or float values that are not finite or far outside [-1, 1].
    """
    if not isinstance(frame, torch.Tensor):
        array = np.asarray(frame)
        if array.dtype == object:
            raise TypeError(f"a frame is an array, a tensor or an image, got {type(frame).__name__}")
        array = np.ascontiguousarray(array)
        frame = torch.from_numpy(array if array.flags.writeable else array.copy())
    shape = tuple(frame.shape)
    if frame.dtype == torch.uint8:
        if shape != (height, width, 3):
            raise ValueError(
                f"a uint8 frame must be [{height}, {width}, 3] for this stream, got {list(shape)}; resize it"
            )
        return frame
    if not frame.is_floating_point():
        raise TypeError(f"a frame is uint8 [H, W, 3] or floating point [3, H, W], got {frame.dtype}")
    if shape != (3, height, width):
        raise ValueError(f"a float frame must be [3, {height}, {width}] for this stream, got {list(shape)}; resize it")
    low, high = (float(value) for value in frame.aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"a float frame must lie in [-1, 1] and be finite, got values from {low:g} to {high:g}")
    return frame


def normalise(frame: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A checked frame as ``[1, 3, H, W]`` in [-1, 1]."""
    if frame.dtype == torch.uint8:
        moved = frame.to(device, non_blocking=True)
        return moved.permute(2, 0, 1).unsqueeze(0).to(dtype).div_(127.5).sub_(1.0)
    return frame.unsqueeze(0).to(device, dtype)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Pixels ``[3, H, W]`` in [0, 1] as a uint8 array ``[H, W, 3]``."""
    return pixels.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


class Codec:
    """The pipeline's autoencoder, as latents scaled the way its denoiser wants them.

    Encoding takes the mode of the posterior, not a sample: a still input stays still.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        config = pipe.vae.config
        self.scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.mean = getattr(config, "latents_mean", None)
        self.std = getattr(config, "latents_std", None)

    @property
    def dtype(self) -> torch.dtype:
        """The autoencoder's dtype, which need not be the denoiser's."""
        return self.pipe.vae.dtype

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to scaled latents ``[B, C, h, w]``."""
        encoded = self.pipe.vae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        if self.mean is not None and self.std is not None:
            return (latents - self._channels(self.mean, latents)) * (self.scale / self._channels(self.std, latents))
        if self.shift:
            latents = latents - self.shift
        return latents * self.scale  # always a new tensor: a compiled encoder may overwrite its output

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]`` in [0, 1], float32 (float64 if the model is)."""
        latents = latents.to(self.dtype)
        if self.mean is not None and self.std is not None:
            latents = latents * (self._channels(self.std, latents) / self.scale) + self._channels(self.mean, latents)
        elif self.scale != 1.0 or self.shift:
            latents = latents / self.scale + self.shift
        decoded = self.pipe.vae.decode(latents, return_dict=False)[0]
        if decoded.dtype in (torch.float16, torch.bfloat16):
            decoded = decoded.float()
        return decoded.mul(0.5).add_(0.5).clamp_(0.0, 1.0)

    @staticmethod
    def _channels(values: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
