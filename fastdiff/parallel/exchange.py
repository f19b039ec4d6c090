"""One forward of a model whose input is cut: where the cuts are at each level, and what layers fetch from other ranks.

A forward is *fresh* (every layer waits for what the others compute now: exact) or not (it uses what they sent one step
ago and sends its own for the next step, so that sending hides behind computing; DistriFusion, Li et al. 2024,
arXiv 2402.19481). `Memory` is what one layer keeps from step to step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.parallel.communicator import Communicator, Pending
from fastdiff.parallel.strips import Range, Strips


@dataclass
class Memory:
    """What one layer has of other ranks: the latest that arrived, and what is on its way.

    Attributes:
        known: rank to (range of rows, tensor).
        own: what this rank sent when `known` was sent (statistics only).
        pending: an operation under way and the ranges it brings.
        sent: what this rank sent with `pending` (statistics only).
        ready: whether anything was ever fetched; a layer met for the first time is always fresh.
    """

    known: dict[int, tuple[Range, Tensor]] = field(default_factory=dict)
    own: Tensor | None = None
    pending: Pending | None = None
    ranges: dict[int, Range] = field(default_factory=dict)
    sent: Tensor | None = None
    ready: bool = False

    def expect(self, pending: Pending, ranges: dict[int, Range], sent: Tensor | None = None) -> None:
        """Note an operation whose result is for later."""
        self.pending, self.ranges, self.sent = pending, ranges, sent

    def settle(self) -> None:
        """Wait for what is on its way and make it the latest."""
        if self.pending is not None:
            received = self.pending.wait()
            self.known = {rank: (rows, received[rank]) for rank, rows in self.ranges.items()}
            self.own, self.pending, self.sent, self.ready = self.sent, None, None, True

    @property
    def nbytes(self) -> int:
        """Bytes held for the next step."""
        held = [tensor for _, tensor in self.known.values()]
        waiting = 0 if self.pending is None else self.pending.nbytes
        return waiting + sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(eq=False)
class History:
    """The memories of one request, guidance branch and shape, and how many forwards they have seen."""

    forwards: int = 0
    memories: dict[tuple[str, int], Memory] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes held for the next step."""
        return sum(memory.nbytes for memory in self.memories.values())


class Pass:
    """One forward on one rank.

    Args:
        communicator: the group that shares the picture.
        strips: how the input is cut.
        fresh: whether layers wait for what is computed now.
        history: where layers keep what they need for the next step; None when every forward is fresh.
        portion: of attention's neighbouring strips, the part that is fetched in a forward that is not fresh; None: all.

    Attributes:
        halo_in_input: the input came with the rows around the strip that the first convolution needs.
        whole: the uncut input.
        timestep: of this forward, where a layer asks.
    """

    def __init__(
        self,
        communicator: Communicator,
        strips: Strips,
        fresh: bool = True,
        history: History | None = None,
        portion: float | None = None,
    ):
        self.communicator = communicator
        self.strips = strips
        self.fresh = fresh
        self.history = history
        self.portion = portion
        self.levels: dict[int, Strips] = {strips.heights[communicator.rank]: strips}
        self.cells: dict[int, tuple[Strips, int]] = {}
        self.halo_in_input = False
        self.whole: Tensor | None = None
        self.timestep = 0.0
        self._calls: dict[str, int] = {}

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self.communicator.rank

    def note(self, strips: Strips, width: int) -> None:
        """Remember that features of this rank's strip of `strips`, `width` wide, occur in this forward."""
        height = strips.heights[self.rank]
        self.levels[height] = strips
        self.cells[height * width] = (strips, width)

    def level(self, height: int) -> Strips:
        """The strips of features with `height` rows on this rank.

        Raises:
            Unsupported: nothing in the model so far explains that height.
        """
        if height not in self.levels:
            own = self.strips.heights[self.rank]
            if height % own:
                raise Unsupported(
                    f"features of {height} rows appeared in a strip of {own} rows, which is no level of it"
                )
            self.levels[height] = self.strips.scaled(height // own)
        return self.levels[height]

    def tokens(self, count: int) -> tuple[Strips, int]:
        """The strips and the width of features that were flattened to `count` tokens on this rank."""
        if count not in self.cells:
            raise Unsupported(
                f"attention over {count} tokens, which is no level of this rank's strip ({sorted(self.cells)}); "
                "tokens that belong to no place of the picture cannot be cut"
            )
        return self.cells[count]

    def memory(self, layer: str) -> Memory:
        """The memory of this call of `layer`; a fresh one each time where nothing is kept."""
        number = self._calls.get(layer, 0)
        self._calls[layer] = number + 1
        if self.history is None:
            return Memory()
        return self.history.memories.setdefault((layer, number), Memory())

    def extend(
        self,
        layer: str,
        kind: str,
        x: Tensor,
        dim: int,
        strips: Strips,
        needs: Sequence[Range],
        fresh_needs: Sequence[Range] | None = None,
    ) -> tuple[Tensor, int]:
        """Put other ranks' rows around this rank's own.

        Args:
            layer, kind: whose memory and under what the traffic counts.
            x: this rank's rows along `dim`.
            strips: whose rows are whose.
            needs: per rank, the rows it needs; may reach outside the picture.
            fresh_needs: what is fetched instead in a fresh forward, at least `needs`.

        Returns:
            Consecutive rows that hold this rank's own and `needs`, and the number of the first of them.
        """
        memory = self.memory(layer)
        memory.settle()
        if self.fresh or not memory.ready:
            pending, ranges = self._fetch(kind, x, dim, strips, fresh_needs or needs)
            memory.expect(pending, ranges)
            memory.settle()
            known = memory.known
        else:
            known = memory.known
            pending, ranges = self._fetch(kind, x, dim, strips, needs)
            memory.expect(pending, ranges)
        if self.history is None:
            memory.known = {}
        return self._assemble(x, dim, strips, needs[self.rank], known)

    def share(
        self, layer: str, kind: str, x: Tensor, follow: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Every rank's `x` in rank order, this rank's own as it is now.

        In a forward that is not fresh the others' come from the last step, corrected by
        `follow(theirs then, own then, own now)`.
        """
        memory = self.memory(layer)
        memory.settle()
        everybody: dict[int, Range] = dict.fromkeys(range(self.communicator.size), (0, 0))
        if self.fresh or not memory.ready:
            memory.expect(self.communicator.gather(kind, x), everybody, x)
            memory.settle()
            return [tensor for _, tensor in memory.known.values()]
        own_then, known = memory.own, memory.known
        memory.expect(self.communicator.gather(kind, x), everybody, x)
        return [
            x if rank == self.rank or own_then is None else follow(then, own_then, x)
            for rank, (_, then) in known.items()
        ]

    def _fetch(
        self, kind: str, x: Tensor, dim: int, strips: Strips, needs: Sequence[Range]
    ) -> tuple[Pending, dict[int, Range]]:
        def shape(rows: int) -> tuple[int, ...]:
            sizes = list(x.shape)
            sizes[dim] = rows
            return tuple(sizes)

        sends, receives = strips.transfers(needs, self.rank)
        first = strips.own(self.rank)[0]
        if all(low <= 0 and high >= strips.rows for low, high in needs):
            pending = self.communicator.gather(kind, x, [shape(rows) for rows in strips.heights])
            return pending, receives
        outgoing = {rank: x.narrow(dim, low - first, high - low) for rank, (low, high) in sends.items()}
        shapes = {rank: shape(high - low) for rank, (low, high) in receives.items()}
        return self.communicator.exchange(kind, outgoing, shapes, x), receives

    def _assemble(
        self, x: Tensor, dim: int, strips: Strips, needs: Range, known: dict[int, tuple[Range, Tensor]]
    ) -> tuple[Tensor, int]:
        pieces = {strips.own(self.rank)[0]: x}
        for rank, (rows, tensor) in known.items():
            if rank == self.rank:
                continue
            low, high = max(rows[0], needs[0]), min(rows[1], needs[1])
            if low < high:
                pieces[low] = tensor.narrow(dim, low - rows[0], high - low)
        order = sorted(pieces)
        if len(order) == 1:
            return x, order[0]
        return torch.cat([pieces[start] for start in order], dim=dim), order[0]


def output_sample(output: Any) -> Tensor:
    """The tensor in what a model returned: an output object, a tuple or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def with_sample(output: Any, sample: Tensor) -> Any:
    """`output` with its tensor replaced."""
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    output.sample = sample
    return output
