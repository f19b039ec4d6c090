"""The keys and values a chunk-causal video model keeps of the frames before: a ring with sinks, one for each row.

Frames lie in slots in any order, since attention does not care for order once keys know their place in time; a new
frame overwrites the oldest. The first frames may be kept for good as sinks (https://arxiv.org/abs/2309.17453), until
the video no longer looks like them (StreamDiffusionV2, https://arxiv.org/abs/2511.07399, whose reference asks the host
about every layer and row; here the choice stays on the device). Which slot a frame went to, how old it is and what is
masked are small tensors that only in-place operations change: every shape is fixed, nothing waits for the host, and a
CUDA graph of a call replays.

Keys come in turned by row and column and not by frame; `fastdiff.video.rotary` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_choice, check_number
from fastdiff.video.storage import FrameStore

POSITIONS = ("relative", "absolute")
_FAR = 2**40


@dataclass(frozen=True)
class Layout:
    """What one call sees of the cache.

    Attributes:
        rows: which rows, int64 ``[B]``; None for all in order.
        held: positions in time of the cached frames, int64 ``[B, F]``; -1 where a slot is empty.
        new: positions of the frames of the call, int64 ``[B, c]``.
        seen: which slots hold a frame, bool ``[B, F]``; None when all do.
        empty: no slot of these rows holds a frame.
    """

    rows: Tensor | None
    held: Tensor
    new: Tensor
    seen: Tensor | None
    empty: bool


class KeyValueCache:
    """Keys and values of the last frames, for every layer of a model and for several rows of a batch.

    Rows are independent: sessions, steps of a stream batch, guidance branches. A chunk is written in two movements:
    every layer stages its part during the forward, `commit` then puts all of them in place. A forward that fails or is
    cancelled half-way leaves the cache as it was.

    Args:
        layers, rows, tokens, heads, width: sizes; ``tokens`` of one frame, ``width`` of one head.
        frames: frames kept for each row, sinks included.
        sinks: how many of the first frames are kept for good.
        evict_below: a sink gives way to the newest frame when the cosine of their mean keys and values, averaged, is
            below this; None keeps sinks for ever. -1 to 1.
        storage: "native", "int8" or "float8".
        positions: "relative" counts time within the cache, 0 for the oldest frame; "absolute" from the first frame of
            the stream on, without bound, as models that were trained on endless positions want it.
        first: number of the first layer that is kept here, where a model's layers are spread over several devices.
        dtype: of keys and values.

    Raises:
        ValueError: an impossible size.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        frames: int,
        tokens: int,
        heads: int,
        width: int,
        *,
        sinks: int = 0,
        evict_below: float | None = None,
        storage: str = "native",
        positions: str = "relative",
        first: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = {"layers": layers, "rows": rows, "frames": frames, "tokens": tokens, "heads": heads, "width": width}
        for name, value in sizes.items():
            check_number("KeyValueCache", name, value, 1, whole=True)
        check_number("KeyValueCache", "sinks", sinks, 0, frames - 1, whole=True)
        check_choice("KeyValueCache", "positions", positions, POSITIONS)
        if evict_below is not None:
            check_number("KeyValueCache", "evict_below", evict_below, -1, 1)
        device = torch.device(device)
        self.layers, self.rows, self.frames, self.tokens = layers, rows, frames, tokens
        self.sinks, self.evict_below, self.positions, self.first = sinks, evict_below, positions, first
        shape = (layers, rows, frames, tokens, heads, width)
        self.keys = FrameStore(shape, storage, dtype, device)
        self.values = FrameStore(shape, storage, dtype, device)
        self.stamps = torch.full((rows, frames), -1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._means = None
        if sinks and evict_below is not None:
            self._means = torch.zeros(2, layers, rows, frames, heads * width, dtype=torch.float32, device=device)
        self._slots = torch.arange(frames, device=device)
        self._all = torch.arange(rows, device=device)
        self._held = [0] * rows
        self._staged: dict[int, tuple[Tensor, Tensor]] = {}
        self._chosen: dict[tuple[int, ...], Tensor] = {}
        self._inputs: Tensor | None = None
        self._told: Tensor | None = None

    def held(self, row: int) -> int:
        """Frames of a row that are kept, known without asking the device."""
        return self._held[row]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        extra = [tensor for tensor in (self._means, self._inputs, self._told) if tensor is not None]
        return self.keys.nbytes + self.values.nbytes + sum(tensor.nbytes for tensor in extra)

    def layout(self, frames: int, rows: Sequence[int] | None = None, kept: int | None = None) -> Layout:
        """Where the next ``frames`` frames of ``rows`` stand in time, and what they see.

        Args:
            kept: how many of them are to be committed; all of them if None.

        Raises:
            ValueError: more frames than the ring has room for, or a row that is not there.
        """
        kept = frames if kept is None else kept
        if kept > self.frames - self.sinks:
            raise ValueError(
                f"{kept} frames at a time do not fit a cache of {self.frames} with {self.sinks} sinks; keep more "
                "frames or make shorter chunks"
            )
        chosen = self._index(rows)
        names = range(self.rows) if rows is None else rows
        stamps = self._of(self.stamps, chosen)  # [B, F]
        seen = stamps >= 0
        if self.positions == "absolute":
            held, first = stamps, self._of(self.counts, chosen)
        else:
            # the age of a frame is how many kept ones are older
            older = (stamps[:, None, :] < stamps[:, :, None]) & seen[:, None, :]
            held = torch.where(seen, older.sum(-1), -1)
            first = seen.sum(-1)
        new = first[:, None] + torch.arange(frames, device=stamps.device)
        full = all(self._held[row] == self.frames for row in names)
        return Layout(chosen, held, new, None if full else seen, not any(self._held[row] for row in names))

    def read(self, layer: int, layout: Layout) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer ``[B, F, S, N, D]``; those of empty slots are to be masked."""
        layer -= self.first
        return self.keys.get(layer, layout.rows), self.values.get(layer, layout.rows)

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep a layer's new keys and values ``[B, c, S, N, D]`` until `commit`."""
        self._staged[layer - self.first] = (keys.detach(), values.detach())

    def discard(self) -> None:
        """Forget what was staged."""
        self._staged.clear()

    def commit(self, layout: Layout, inputs: Tensor | None = None, timesteps: Tensor | None = None) -> None:
        """Put what every layer staged in place of the oldest frames.

        Args:
            layout: of the call that staged it.
            inputs: what the model was given ``[B, C, c, h, w]``, kept to compute the frames again (`remembered`).
            timesteps: told to the model for each frame, ``[B, c]``.
        """
        if len(self._staged) != self.layers:
            found = len(self._staged)
            self.discard()
            raise RuntimeError(f"{found} of {self.layers} layers staged keys and values; nothing was kept")
        keys, values = (torch.stack([self._staged[i][part] for i in range(self.layers)]) for part in (0, 1))
        self.discard()
        rows = self._all if layout.rows is None else layout.rows
        frames = keys.shape[2]
        means = self._mean(keys, values)
        slots = self._choose(rows, frames, means)  # [B, c]
        place = (rows[:, None], slots)
        self.keys.put(rows, slots, keys)
        self.values.put(rows, slots, values)
        if means is not None and self._means is not None:
            self._means[:, :, rows[:, None], slots] = means
        order = self.counts[rows][:, None] + torch.arange(frames, device=rows.device)
        self.stamps[place] = order
        self.counts[rows] = order[:, -1] + 1
        if inputs is not None and timesteps is not None:
            self._remember(place, inputs, timesteps)
        for row in self._named(layout):
            self._held[row] = min(self.frames, self._held[row] + frames)

    def remembered(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor] | None:
        """Inputs ``[B, C, H, h, w]`` and timesteps ``[B, H]`` of the kept frames, oldest first; None if nothing is.

        Raises:
            ValueError: the rows hold different numbers of frames; ask for them apart.
        """
        if self._inputs is None or self._told is None or not self._alike(rows):
            return None
        chosen = self._index(rows)
        stamps = self._of(self.stamps, chosen)
        order = torch.where(stamps < 0, _FAR, stamps).argsort(dim=1, stable=True)[:, : self._alike(rows)]  # [B, H]
        inputs, told = self._of(self._inputs, chosen), self._of(self._told, chosen)
        across = torch.arange(len(order), device=order.device)[:, None]
        return inputs[across, order].transpose(1, 2), told[across, order]

    def moments(self, rows: Sequence[int] | None = None) -> Tensor:
        """When the kept frames of ``rows`` were, counted from the first frame of all: ``[B, H]``, oldest first."""
        stamps = self._of(self.stamps, self._index(rows))
        return torch.where(stamps < 0, _FAR, stamps).sort(dim=1).values[:, : self._alike(rows)]

    @contextmanager
    def again(self, moments: Tensor, rows: Sequence[int] | None = None) -> Iterator[None]:
        """Forget the frames of ``rows``, to commit them again inside the block, as many as there are ``moments``.

        They stand in time where they stood (`moments`), and so does what comes after them.
        """
        self.clear(rows)
        index, count = self._index(rows), moments.shape[1]
        chosen = self._all if index is None else index
        self.counts[chosen] = moments[:, -1] + 1 - count
        yield
        # an empty ring is filled slot by slot
        self.stamps[chosen, :count] = moments

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget every frame of ``rows`` (all of them if None)."""
        self.discard()
        chosen = self._all if rows is None else self._index(rows)
        self.stamps[chosen] = -1
        self.counts[chosen] = 0
        for row in range(self.rows) if rows is None else rows:
            self._held[row] = 0

    def _alike(self, rows: Sequence[int] | None) -> int:
        """Frames that each of these rows holds."""
        counts = {self._held[row] for row in (range(self.rows) if rows is None else rows)}
        if len(counts) > 1:
            raise ValueError(f"rows {list(rows or range(self.rows))} hold different numbers of frames; ask for one")
        return counts.pop()

    def _index(self, rows: Sequence[int] | None) -> Tensor | None:
        if rows is None or list(rows) == list(range(self.rows)):
            return None
        key = tuple(rows)
        if not key or min(key) < 0 or max(key) >= self.rows or len(set(key)) < len(key):
            raise ValueError(f"rows {list(key)} are not different rows of a cache of {self.rows}")
        if key not in self._chosen:
            self._chosen[key] = torch.tensor(key, device=self.stamps.device)
        return self._chosen[key]

    def _named(self, layout: Layout) -> Sequence[int]:
        if layout.rows is None:
            return range(self.rows)
        return next(key for key, tensor in self._chosen.items() if tensor is layout.rows)

    @staticmethod
    def _of(tensor: Tensor, rows: Tensor | None) -> Tensor:
        return tensor if rows is None else tensor.index_select(0, rows)

    def _mean(self, keys: Tensor, values: Tensor) -> Tensor | None:
        """Mean keys and values of each new frame, float32 ``[2, L, B, c, N D]``."""
        if self._means is None:
            return None
        return torch.stack([part.float().mean(3).flatten(3) for part in (keys, values)])

    def _choose(self, rows: Tensor, frames: int, means: Tensor | None) -> Tensor:
        """Slots for new frames ``[B, c]``: empty ones first, then a sink that lost its likeness, then the oldest."""
        stamps = self.stamps[rows]  # [B, F]
        empty = stamps < 0
        turn = torch.where(empty, self._slots - _FAR, stamps)
        if self.sinks:
            sink = (self._slots < self.sinks) & ~empty
            turn = torch.where(sink, _FAR, turn)
            if means is not None and self._means is not None and self.evict_below is not None:
                kept = self._means[:, :, rows, : self.sinks]  # [2, L, B, sinks, N D]
                likeness = torch.cosine_similarity(kept, means.mean(3, keepdim=True), dim=-1).mean((0, 1))
                least, which = likeness.min(-1)
                goes = (least < self.evict_below) & ~empty.any(-1)
                turn = torch.where(goes[:, None] & (self._slots == which[:, None]), -2 * _FAR, turn)
        return turn.argsort(dim=1, stable=True)[:, :frames]

    def _remember(self, place: tuple[Tensor, Tensor], inputs: Tensor, timesteps: Tensor) -> None:
        if self._inputs is None or self._told is None:
            cells = (inputs.shape[1], *inputs.shape[3:])
            self._inputs = inputs.new_zeros(self.rows, self.frames, *cells)
            self._told = timesteps.new_zeros(self.rows, self.frames)
        self._inputs[place] = inputs.detach().transpose(1, 2)
        self._told[place] = timesteps.detach().to(self._told.dtype)
