"""Skipping frames that show nothing new.

After StreamDiffusion's stochastic similarity filter (https://arxiv.org/abs/2312.12491), with another measure: frames
are compared as 16 x 16 cells with their mean brightness removed, and the worst of 16 blocks decides. A dark scene that
pans is not mistaken for a still one, a grey scene with sensor noise is not mistaken for a moving one, and one small
thing that moves is enough. The comparison runs where the frame is: for a camera, on the host, with no wait for a
device.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

CELLS = 16
BLOCKS = 4
FLOOR = 0.05
"""Contrast below which differences are weighed as if the scene had this much, in units where white minus black is 2."""


@dataclass(frozen=True)
class Similarity:
    """Settings of the filter.

    Attributes:
        threshold: similarity up to which a frame is always processed; the chance of skipping rises linearly from 0
            there to 1 at similarity 1. 1 or more never skips.
        most_skips: frames skipped in a row, after which one is processed whatever it shows.
        seed: of the draws.
    """

    threshold: float = 0.98
    most_skips: int = 10
    seed: int = 0

    def __post_init__(self):
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"similarity threshold must be 0 or more, got {self.threshold!r}")
        if not isinstance(self.most_skips, int) or self.most_skips < 0:
            raise ValueError(f"most_skips must be a whole number of 0 or more, got {self.most_skips!r}")

    def chance(self, similarity: float) -> float:
        """Probability of skipping a frame of this similarity to the last processed one."""
        if self.threshold >= 1:
            return 0.0
        return min(1.0, max(0.0, (similarity - self.threshold) / (1 - self.threshold)))


class SimilarityFilter:
    """Decides frame by frame; keeps the last processed frame and the run of skips since."""

    def __init__(self, settings: Similarity):
        self.settings = settings
        self._random = random.Random(settings.seed)
        self._kept: torch.Tensor | None = None
        self._skips = 0

    def skips(self, frame: torch.Tensor) -> bool:
        """Whether to skip this frame, uint8 ``[H, W, 3]`` or float ``[3, H, W]``; if not, it becomes the kept one."""
        if self.settings.threshold >= 1:
            return False
        cells = summary(frame)
        if self._kept is not None and self._skips < self.settings.most_skips:
            chance = self.settings.chance(similarity(self._kept, cells))
            if self._random.random() < chance:
                self._skips += 1
                return True
        self._kept, self._skips = cells, 0
        return False

    def reset(self) -> None:
        """Process the next frame whatever it shows."""
        self._kept, self._skips = None, 0


def summary(frame: torch.Tensor) -> torch.Tensor:
    """A frame as ``[3, 16, 16]`` cell means in [-1, 1], its mean brightness removed."""
    if frame.dtype == torch.uint8:
        frame = frame.permute(2, 0, 1).float().div_(127.5)
    cells = torch.nn.functional.adaptive_avg_pool2d(frame.unsqueeze(0).float(), CELLS)[0]
    return cells - cells.mean()


def similarity(kept: torch.Tensor, cells: torch.Tensor) -> float:
    """1 for equal frames; falls with the largest difference of any block relative to the contrast of the kept frame.

    For frames of equal contrast and a single block this is the Pearson correlation.
    """
    difference = (kept - cells).square().mean(dim=0)
    worst = torch.nn.functional.avg_pool2d(difference[None], CELLS // BLOCKS).max()
    contrast = torch.maximum(kept.square().mean(), cells.square().mean()).clamp(min=FLOOR**2)
    return float(1 - worst / (2 * contrast))
