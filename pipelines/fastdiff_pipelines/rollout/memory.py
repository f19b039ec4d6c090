"""What a session keeps of its past: the rows of the key/value cache and the prompts they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.settings import Context, RolloutSettings


class Memory:
    """The context of one session.

    Rows of the cache are ordered by branch (prompt, then negative prompt where there is guidance), by block (one for
    each step in a context of kind "steps", else one) and by video of the batch.

    Args:
        cell: rows and columns of the latents.
    """

    def __init__(self, causal: CausalWan, context: Context, settings: RolloutSettings, cell: tuple[int, int]):
        self.causal, self.context, self.cell = causal, context, cell
        self.texts: list[Text] = []
        self._joined: dict[int, Text] = {}
        self._shape(settings)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def say(self, texts: list[Text], scale: float) -> None:
        """The prompts ``[B]`` of the branches, one or two of them, and the guidance scale between them."""
        self.texts, self.scale = texts, scale
        self._joined.clear()

    def velocity(
        self, x: Tensor, told: Tensor, blocks: Sequence[int], commit: bool | int, chunk: int | None = None
    ) -> Tensor:
        """Guided velocity of latents ``[k B, C, c, h, w]`` that see the past of these ``k`` blocks.

        Args:
            told: timesteps ``[k B]`` or ``[k B, c]``.
            commit: whether they, or how many of the first frames, become part of it.
            chunk: frames that see each other, where there are several chunks one after the other; each of them then
                sees as many frames before it as are kept.
        """
        text, rows = self._text(len(blocks)), self._rows(blocks)
        options: dict[str, Any] = {"cache": self.cache, "rows": rows, "commit": commit}
        if chunk is not None:
            options |= {"chunk": chunk, "window": self.context.frames}
        if self.branches == 1:
            return self.causal(x, told, text, **options)
        made = self.causal(torch.cat([x, x]), torch.cat([told, told]), text, **options)
        positive, negative = made.chunk(2)
        return negative + self.scale * (positive - negative)

    def recache(self, chunk: int) -> None:
        """Compute everything that is kept again, under the prompts of now."""
        for block in range(self.blocks):
            self.causal.recache(self.cache, self._text(1), self._rows([block]), chunk)

    def reshape(self, settings: RolloutSettings) -> None:
        """Make room for another number of steps or branches; what is kept follows as it stood at the last step."""
        if (self._blocks(settings), self._branches(settings)) == (self.blocks, self.branches):
            return
        last = [self._row(self.blocks - 1, 0) + i for i in range(self.batch)]
        kept, moments = self.cache.remembered(last), self.cache.moments(last)
        self._shape(settings)
        self._joined.clear()
        if kept is None:
            return
        for block in range(self.blocks):
            room, rows = self.cache.frames - self.cache.sinks, self._rows([block])
            with self.cache.again(torch.cat([moments] * self.branches), rows):
                for start in range(0, kept[0].shape[2], room):
                    part = slice(start, start + room)
                    self._again(kept[0][:, :, part], kept[1][:, part], rows, settings)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget everything."""
        self.cache.clear()

    def _again(self, inputs: Tensor, told: Tensor, rows: Sequence[int], settings: RolloutSettings) -> None:
        if self.branches == 2:
            inputs, told = torch.cat([inputs, inputs]), torch.cat([told, told])
        self.causal(inputs, told, self._text(1), cache=self.cache, rows=rows, chunk=settings.chunk, commit=True)

    def _shape(self, settings: RolloutSettings) -> None:
        self.batch = len(settings.prompts)
        self.blocks, self.branches = self._blocks(settings), self._branches(settings)
        context = self.context
        options: dict[str, Any] = {
            "sinks": context.sinks,
            "evict_below": context.evict_below,
            "storage": context.storage,
            "positions": context.positions,
        }
        rows = self.branches * self.blocks * self.batch
        self.cache = self.causal.cache(rows, context.frames, *self.cell, **options)

    def _blocks(self, settings: RolloutSettings) -> int:
        return settings.steps if self.context.kind == "steps" else 1

    @staticmethod
    def _branches(settings: RolloutSettings) -> int:
        return 2 if settings.guidance_scale > 1 else 1

    def _row(self, block: int, branch: int) -> int:
        return (branch * self.blocks + block) * self.batch

    def _rows(self, blocks: Sequence[int]) -> list[int]:
        starts = [self._row(block, branch) for branch in range(self.branches) for block in blocks]
        return [start + i for start in starts for i in range(self.batch)]

    def _text(self, count: int) -> Text:
        if count not in self._joined:
            if self.batch == 1 and self.branches == 1:
                self._joined[count] = self.texts[0]
            else:
                self._joined[count] = Text.joined([text for text in self.texts for _ in range(count)])
        return self._joined[count]
