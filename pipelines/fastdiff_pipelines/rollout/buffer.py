"""StreamDiT's moving buffer: the frames under way lie in one row of latents, from clean to pure noise.

One denoiser call moves every frame a little cleaner, each told its own noise level; when the oldest chunk is clean it
leaves, and one of pure noise enters at the other end (https://arxiv.org/abs/2507.03745). Unlike a rollout on a cache,
frames see those still to come. The partition decides what it is: one chunk with all the steps is ordinary sampling,
chunks of one frame with one step each are FIFO-Diffusion (https://arxiv.org/abs/2405.11473).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import check_number
from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.levels import shift_of, shifted
from fastdiff_pipelines.rollout.noise import draw

Velocity = Callable[[Tensor, Tensor], Tensor]
"""From latents ``[B, C, F, h, w]`` and timesteps 0..1000 ``[B, F]`` to velocities like the latents."""


@dataclass(frozen=True)
class Partition:
    """How the buffer is divided.

    Attributes:
        chunks: under way at once, each in its own share of the noise levels.
        frames: latent frames of a chunk.
        micro_steps: denoiser calls between one chunk's leaving and the next one's.
        references: clean frames kept before the buffer to be seen.
    """

    chunks: int = 4
    frames: int = 1
    micro_steps: int = 1
    references: int = 0

    def __post_init__(self):
        for name in ("chunks", "frames", "micro_steps"):
            check_number("Partition", name, getattr(self, name), 1, whole=True)
        check_number("Partition", "references", self.references, 0, whole=True)

    @property
    def steps(self) -> int:
        """How often every frame is evaluated."""
        return self.chunks * self.micro_steps

    def cleanness(self, taken: int) -> float:
        """StreamDiT's tau of a chunk after this many of its steps: 0 for noise, 1 for clean."""
        return taken / self.steps


class MovingBuffer:
    """The buffer itself, over any network.

    It grows from one chunk and is emptied at the end, so no frame is made of anything but its own noise and each is
    evaluated exactly `Partition.steps` times.

    Args:
        velocity: the network.
        enter: noise of a chunk by its number, ``[B, C, frames, h, w]``.
        shift: of the noise levels towards noise.
    """

    def __init__(self, velocity: Velocity, enter: Callable[[int], Tensor], partition: Partition, shift: float = 1.0):
        self.velocity, self.enter, self.partition, self.shift = velocity, enter, partition, shift
        self.entered = 0
        self._chunks: list[tuple[int, Tensor]] = []
        self._clean: list[Tensor] = []

    @property
    def under_way(self) -> int:
        """Chunks in the buffer."""
        return len(self._chunks)

    @property
    def taken(self) -> tuple[int, ...]:
        """Steps taken by each chunk, oldest first."""
        return tuple(taken for taken, _ in self._chunks)

    def advance(self, enters: bool = True) -> Tensor | None:
        """Let a chunk enter, take the micro-steps up to the next departure, and give what leaves.

        Returns:
            The clean chunk ``[B, C, frames, h, w]``; None while the buffer fills.
        """
        if enters:
            self._chunks.append((0, self.enter(self.entered)))
            self.entered += 1
        for _ in range(self.partition.micro_steps):
            self._micro_step()
        if not self._chunks or self._chunks[0][0] < self.partition.steps:
            return None
        _, done = self._chunks.pop(0)
        if self.partition.references:
            kept = torch.cat([*self._clean, done], dim=2)[:, :, -self.partition.references :]
            self._clean = [kept]
        return done

    def flush(self) -> Iterator[Tensor]:
        """Finish what is under way without letting anything enter."""
        while self._chunks:
            done = self.advance(enters=False)
            if done is not None:
                yield done

    def sigma(self, taken: int) -> float:
        """Noise level after this many steps."""
        return shifted(1 - self.partition.cleanness(taken), self.shift)

    def _micro_step(self) -> None:
        if not self._chunks:
            return
        x = torch.cat([*self._clean, *(chunk for _, chunk in self._chunks)], dim=2)
        clean, frames = x.shape[2] - len(self._chunks) * self.partition.frames, self.partition.frames
        levels = [0.0] * clean + [self.sigma(taken) for taken, _ in self._chunks for _ in range(frames)]
        told = torch.tensor(levels, dtype=x.dtype, device=x.device).mul(1000).expand(len(x), -1)
        velocity = self.velocity(x, told)[:, :, clean:]
        moved = []
        for (taken, chunk), part in zip(self._chunks, velocity.split(frames, dim=2), strict=True):
            moved.append((taken + 1, chunk + (self.sigma(taken + 1) - self.sigma(taken)) * part))
        self._chunks = moved


def buffered(
    model: Any, prompt: str, partition: Partition | None = None, *, chunks: int | None = None, seed: int = 0
) -> Iterator[Tensor]:
    """Video from a moving buffer over a rollout's transformer, which has to take one timestep a frame.

    Args:
        model: a `ChunkRollout`; its cache is not used.
        partition: how the buffer is divided; with the references it should be no longer than what the model was
            trained on.
        chunks: how many, 1 or more; None for no end.

    Yields:
        Frames of each chunk, float ``[3, F, H, W]`` in 0..1.
    """
    if chunks is not None:
        check_number("buffered", "chunks", chunks, 1, whole=True)
    partition = partition or Partition()
    text: Text = model.encode([prompt])
    codec = StreamingVAE(model.vae)
    shape = (model.cell[0], partition.frames, *model.cell[1:])

    def enter(number: int) -> Tensor:
        return draw(seed, 1, shape, number + 1, 0).to(model.device, model.state)

    @torch.inference_mode()
    def velocity(x: Tensor, told: Tensor) -> Tensor:
        return model.causal(x, told, text)

    @torch.inference_mode()
    def finished(latents: Tensor) -> Tensor:
        decoded = codec.decode(codec.unscaled(latents).to(model.vae.dtype))
        assert decoded is not None
        return decoded[0].float().mul(0.5).add(0.5).clamp(0, 1)

    buffer = MovingBuffer(velocity, enter, partition, shift_of(model.pipe.scheduler))
    entering = (buffer.advance() for _ in (itertools.count() if chunks is None else range(chunks)))
    for done in itertools.chain(entering, buffer.flush()):
        if done is not None:
            yield finished(done)
