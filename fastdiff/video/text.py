"""A prompt's keys and values for every cross-attention, computed when the prompt changes and not with every call.

They are known by the version of the embeddings, which torch counts up with every write in place, never by an address:
an address stays while its content changes. The zeros a pipeline pads prompts with are all alike, so one stands for all
of them, with the logarithm of their number added to its score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.anatomy_wan import wan_text_keys


class Text:
    """Prompt embeddings ``[B, L, E]`` with what every layer makes of them.

    Args:
        embeds: may end in zeros, which are folded.
        padding: zero tokens that the model is to see after them besides.

    Attributes:
        version: how often keys and values had to be computed.
    """

    def __init__(self, embeds: Tensor, padding: int = 0):
        if embeds.dim() != 3 or padding < 0:
            raise ValueError(
                f"prompt embeddings are [B, L, E] and 0 zeros or more, got {list(embeds.shape)}, {padding}"
            )
        self.embeds, self.padding = embeds, padding
        self.version = 0
        self._mark: Any = None
        self._projected: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._bias: Tensor | None = None

    @classmethod
    def joined(cls, texts: list[Text]) -> Text:
        """The rows of several prompts, one after the other; their embeddings are padded with zeros to one length."""
        longest = max(text.embeds.shape[1] for text in texts)
        whole = max(text.embeds.shape[1] + text.padding for text in texts)
        pad = torch.nn.functional.pad
        embeds = torch.cat([pad(text.embeds, (0, 0, 0, longest - text.embeds.shape[1])) for text in texts])
        return cls(embeds, whole - longest)

    def __len__(self) -> int:
        return len(self.embeds)

    def invalidate(self) -> None:
        """Compute keys and values again, because the model's weights have changed."""
        self._mark = None

    def refresh(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Look whether the embeddings have changed; to be called before a forward.

        Args:
            embed: the model's own text projection ``[B, L, E]`` to ``[B, L, C]``.
        """
        if self._current():
            return
        embeds = self.embeds
        filled = embeds.ne(0).any(-1).any(0).nonzero()
        used = int(filled[-1]) + 1 if len(filled) else 0
        padding = embeds.shape[1] - used + self.padding
        self._bias = None
        if padding > 1 or self.padding:
            embeds = torch.nn.functional.pad(embeds[:, :used], (0, 0, 0, 1))
            self._bias = embeds.new_zeros(1, 1, 1, used + 1)
            self._bias[..., -1] = math.log(padding)
        self._projected = embed(embeds)
        self._layers.clear()
        # torch counts no versions of tensors made in inference mode; those are compared by content
        self._mark = self.embeds.clone() if self.embeds.is_inference() else self.embeds._version
        self.version += 1

    def keys(self, layer: int, attention: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``[B, L', N, D]`` and what is added to their scores, ``[1, 1, 1, L']`` or None."""
        if layer not in self._layers:
            if self._projected is None:
                raise RuntimeError("refresh() comes before keys()")
            self._layers[layer] = wan_text_keys(attention, self._projected)
        return *self._layers[layer], self._bias

    def _current(self) -> bool:
        if self._mark is None:
            return False
        if isinstance(self._mark, Tensor):
            return torch.equal(self._mark, self.embeds)
        return self._mark == self.embeds._version
