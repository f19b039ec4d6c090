"""What ranks say to each other: exchanges between pairs, gathers among all, and one byte that everybody must agree on.

Every operation is started and waited for separately, so that it can hide behind computation; every one still under way
is known to its communicator, which can drain them all on any exit. Traffic is counted where it is started.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

PROCEED, FINISHED, FAILED = 0, 1, 2
"""Flags of `Communicator.agree`: going on, at the end of a call, or on the way out with an error."""


class RankFailed(RuntimeError):
    """Another rank failed or was lost. The group can no longer be used; the message names the rank and its error."""


class Stopped(RuntimeError):
    """A rank asked everybody to stop, and all ranks stopped at the same place. The group remains usable."""


@dataclass
class Traffic:
    """Bytes and operations of one rank, by kind ("attention", "convolution", "normalization", "output", "flag", ...).

    `operations` counts what was started; `received` and `sent` count payload bytes, without any framing.
    """

    operations: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, sent: int, received: int) -> None:
        """Add one operation."""
        for table, amount in ((self.operations, 1), (self.sent, sent), (self.received, received)):
            table[kind] = table.get(kind, 0) + amount

    def since(self, before: "Traffic") -> "Traffic":
        """What was added after the copy `before` was taken."""
        return Traffic(*(_difference(getattr(self, name), getattr(before, name)) for name in _TABLES))

    def copy(self) -> "Traffic":
        """A snapshot."""
        return Traffic(*(dict(getattr(self, name)) for name in _TABLES))

    @property
    def bytes(self) -> int:
        """Bytes received, all kinds together."""
        return sum(self.received.values())


_TABLES = ("operations", "received", "sent")


def _difference(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in now.items() if count != before.get(kind, 0)}


class Pending:
    """An operation under way. `wait()` returns what was received: rank to tensor."""

    def __init__(self, owner: "Communicator", work: Any, received: dict[int, Tensor], held: Sequence[Tensor] = ()):
        self._owner = owner
        self._work = work
        self._received = received
        # what is being sent must stay alive until the operation ends
        self._held = held
        self._done = False

    def wait(self) -> dict[int, Tensor]:
        """Wait until everything has arrived. A second call returns the same at once.

        Raises:
            RankFailed: a peer failed or was lost.
        """
        if not self._done:
            self._done = True
            self._owner._pending.pop(id(self), None)
            began = perf_counter()
            self._owner._finish(self._work)
            self._owner.waited_s += perf_counter() - began
            self._held = ()
        return self._received

    @property
    def nbytes(self) -> int:
        """Bytes of what was or will be received."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._received.values())


class Communicator:
    """One rank's end of a group.

    Attributes:
        rank: this rank within the group, 0 to `size` - 1.
        size: how many ranks share the group.
        traffic: what this rank has sent and received.
        waited_s: seconds spent waiting for others.
        broken: why the group can no longer be used; empty while it can.
    """

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self.waited_s = 0.0
        self.broken = ""
        self._pending: dict[int, Pending] = {}

    def exchange(
        self, kind: str, sends: Mapping[int, Tensor], receives: Mapping[int, Sequence[int]], like: Tensor
    ) -> Pending:
        """Start sending a tensor to each rank in `sends` and receiving one from each in `receives`.

        Any two ranks that exchange something call this in the same order; others need not call it.

        Args:
            kind: what the traffic is counted under.
            sends: rank to tensor, any shape.
            receives: rank to the shape that rank sends.
            like: gives dtype and device of what is received.
        """
        if not sends and not receives:
            return Pending(self, None, {})
        return self._start(kind, sends, receives, like, everybody=False)

    def gather(self, kind: str, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending:
        """Start handing `tensor` to every rank; `wait()` returns every rank's, its own included, in rank order.

        Args:
            kind: what the traffic is counted under.
            tensor: this rank's part.
            shapes: each rank's shape; without it all ranks have the shape of `tensor`.
        """
        shapes = shapes or [tuple(tensor.shape)] * self.size
        if self.size == 1:
            return Pending(self, None, {0: tensor})
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = dict.fromkeys(others, tensor)
        return self._start(kind, sends, {rank: shapes[rank] for rank in others}, tensor, everybody=True)

    def agree(self, flag: int = PROCEED) -> tuple[int, ...]:
        """Return every rank's flag, in rank order; one byte each. Whoever is on the way out brings one too.

        Since every rank brings a flag before it enters a forward and when it leaves a call, also by an error, nobody
        waits for a rank that will not come.
        """
        if self.size == 1:
            return (flag,)
        parts = self.gather("flag", torch.tensor([flag], dtype=torch.uint8, device=self.device)).wait()
        return tuple(int(part) for part in parts.values())

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be sent."""
        return torch.device("cpu")

    def drain(self) -> None:
        """Wait for everything under way and forget it. Does not raise: on the way out there is nobody to tell."""
        for pending in list(self._pending.values()):
            try:
                pending.wait()
            except RankFailed as error:
                self.broken = self.broken or str(error)
        self._pending.clear()

    def fail(self, error: BaseException) -> None:
        """Leave the group because of `error`, so that peers waiting for this rank get a `RankFailed` at once."""
        self.broken = self.broken or f"rank {self.rank} failed: {type(error).__name__}: {error}"
        self._pending.clear()

    def subgroup(self, members: Sequence[Sequence[int]]) -> "Communicator":
        """This rank's end of the group it belongs to among `members`, which name every rank exactly once.

        Every rank calls this with the same `members`.
        """
        raise NotImplementedError

    def _adopt(self, child: "Communicator") -> "Communicator":
        """One account and one list of open operations for a rank, whatever groups it is in."""
        child.traffic = self.traffic
        child._pending = self._pending
        return child

    def _start(
        self,
        kind: str,
        sends: Mapping[int, Tensor],
        receives: Mapping[int, Sequence[int]],
        like: Tensor,
        everybody: bool,
    ) -> Pending:
        if self.broken:
            raise RankFailed(self.broken)
        if like.requires_grad or any(tensor.requires_grad for tensor in sends.values()):
            raise RuntimeError("ranks exchange values, not gradients: run the model under torch.no_grad()")
        sends = {rank: tensor.contiguous() for rank, tensor in sends.items()}
        received = {
            rank: torch.empty(tuple(shape), dtype=like.dtype, device=like.device) for rank, shape in receives.items()
        }
        self.traffic.count(kind, _bytes(sends.values()), _bytes(received.values()))
        work = self._begin(sends, received, everybody)
        if everybody:
            own = next(iter(sends.values()))
            received = {rank: received.get(rank, own) for rank in range(self.size)}
        pending = Pending(self, work, received, tuple(sends.values()))
        self._pending[id(pending)] = pending
        return pending

    def _begin(self, sends: dict[int, Tensor], received: dict[int, Tensor], everybody: bool) -> Any:
        raise NotImplementedError

    def _finish(self, work: Any) -> None:
        raise NotImplementedError


class Alone(Communicator):
    """A group of one: nothing is ever sent."""

    def __init__(self):
        super().__init__(0, 1)

    def subgroup(self, members: Sequence[Sequence[int]]) -> Communicator:
        return self

    def _begin(self, sends: dict[int, Tensor], received: dict[int, Tensor], everybody: bool) -> Any:
        raise ValueError("there is no other rank to exchange with; launch more with torchrun")

    def _finish(self, work: Any) -> None:
        pass


_current: ContextVar[Communicator | None] = ContextVar("fastdiff_communicator", default=None)


@contextmanager
def using(communicator: Communicator) -> Iterator[Communicator]:
    """Make `communicator` the one that accelerations applied inside the block use."""
    token = _current.set(communicator)
    try:
        yield communicator
    finally:
        _current.reset(token)


def current() -> Communicator:
    """The communicator in use: one given by `using`, else torch.distributed's group, else a group of one."""
    chosen = _current.get()
    if chosen is not None:
        return chosen
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from fastdiff.parallel.distributed import TorchCommunicator

        return TorchCommunicator.world()
    return Alone()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
