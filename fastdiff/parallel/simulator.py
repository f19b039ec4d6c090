"""Ranks that are threads of one process, taking turns: the same hooks, the same numbers, no network.

Only one virtual rank computes at a time, so a run gives the same result every time, on any machine. Besides the
results it records what each rank computed, sent and waited for (`clock.Event`), which `clock.replay` turns into time
on any network.
"""

import contextvars
import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.parallel.clock import Event
from fastdiff.parallel.communicator import Communicator, RankFailed, Traffic, using


@dataclass
class Run:
    """What a simulated run left.

    Attributes:
        results: what each rank's function returned.
        traffic: each rank's counters.
        events: each rank's record, for `clock.replay`.
    """

    results: list[Any]
    traffic: list[Traffic]
    events: list[list[Event]]


_Address = tuple[str, int, int, int]


@dataclass
class _Exchange:
    """What all virtual ranks share: the turn, the letters under way, and who failed."""

    ranks: int
    turn: threading.Condition = field(default_factory=threading.Condition)
    # (group, source, destination, number) to what was sent: numbered, because ranks wait in any order they like
    letters: dict[_Address, Tensor] = field(default_factory=dict)
    failure: str = ""
    # rank to the letter it waits for; a rank that has finished waits for ever
    waiting: dict[int, _Address | None] = field(default_factory=dict)

    def stuck(self) -> bool:
        """True when every rank waits and nobody has anything to read."""
        return len(self.waiting) == self.ranks and not any(letter in self.letters for letter in self.waiting.values())


class FlopCount(TorchDispatchMode):
    """Counts floating-point operations (two per multiply-add) of this thread, on real or on meta tensors."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += _flops(func, args, kwargs or {}, out)
        return out


class VirtualCommunicator(Communicator):
    """One virtual rank's end of a simulated group."""

    def __init__(self, rank: int, members: Sequence[int], shared: _Exchange, name: str = "", parent: Any = None):
        super().__init__(rank, len(members))
        self._members = list(members)
        self._shared = shared
        self._name = name
        self._parent = parent
        self._groups = 0
        self._numbers: dict[tuple[int, int], int] = defaultdict(int)
        self.events: list[Event] = [] if parent is None else parent.events
        self.flops: FlopCount | None = None

    def subgroup(self, members: Sequence[Sequence[int]]) -> Communicator:
        self._groups += 1
        for number, part in enumerate(members):
            if self.rank in part:
                ranks = [self._members[rank] for rank in part]
                name = f"{self._name}/{self._groups}.{number}"
                return self._adopt(
                    VirtualCommunicator(list(part).index(self.rank), ranks, self._shared, name, self._top)
                )
        raise ValueError(f"rank {self.rank} is in none of the groups {list(members)}")

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._shared.failure = self._shared.failure or self.broken
        self._shared.turn.notify_all()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def _top(self) -> "VirtualCommunicator":
        return self._parent or self

    @property
    def _own(self) -> int:
        return self._members[self.rank]

    def _begin(self, sends: dict[int, Tensor], received: dict[int, Tensor], everybody: bool) -> Any:
        if self._shared.failure:
            raise RankFailed(self._shared.failure)
        self._note_compute()
        for rank, tensor in sends.items():
            # a copy: the sender may write to its tensor as soon as the operation is over, here as on a network
            self._shared.letters[self._address(self._own, self._members[rank])] = tensor.detach().clone()
        number = len(self.events)
        sizes = {self._members[rank]: tensor.numel() * tensor.element_size() for rank, tensor in sends.items()}
        sources = tuple(self._members[rank] for rank in received)
        letters = [(self._address(self._members[rank], self._own), tensor) for rank, tensor in received.items()]
        self.events.append(Event("start", sends=sizes, receives=sources, group=self._name, everybody=everybody))
        self._shared.turn.notify_all()
        return number, letters

    def _finish(self, work: Any) -> None:
        if work is None:
            return
        number, letters = work
        self._note_compute()
        for address, tensor in letters:
            tensor.copy_(self._take(address))
        self.events.append(Event("wait", operation=number))

    def _address(self, source: int, destination: int) -> _Address:
        number = self._numbers[source, destination]
        self._numbers[source, destination] += 1
        return self._name, source, destination, number

    def _take(self, letter: _Address) -> Tensor:
        shared = self._shared
        shared.waiting[self._own] = letter
        shared.turn.notify_all()
        try:
            shared.turn.wait_for(lambda: letter in shared.letters or shared.failure or shared.stuck())
        finally:
            del shared.waiting[self._own]
        if letter in shared.letters:
            return shared.letters.pop(letter)
        if not shared.failure:
            shared.failure = (
                f"rank {self._own} waits for rank {letter[1]}, which sends nothing: the ranks' order differs"
            )
            shared.turn.notify_all()
        self.broken = shared.failure
        raise RankFailed(shared.failure)

    def _note_compute(self) -> None:
        count = self._top.flops
        if count is not None and count.total:
            self.events.append(Event("compute", flops=count.total))
            count.total = 0


@dataclass(frozen=True)
class Simulator:
    """Runs one function for several virtual ranks.

    Args:
        ranks: how many.
        count_flops: also record each rank's floating-point operations (slower; needed for `clock.replay`).
    """

    ranks: int
    count_flops: bool = False

    def run(self, function: Callable[..., Any], *args: Any) -> Run:
        """Run `function(communicator, *args)` on every virtual rank, one at a time, and return what they left.

        Raises:
            Exception: the error of the first rank that failed, once all have stopped.
        """
        shared = _Exchange(self.ranks)
        ends = [VirtualCommunicator(rank, range(self.ranks), shared) for rank in range(self.ranks)]
        results: list[Any] = [None] * self.ranks
        errors: list[BaseException] = []
        settings = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())

        def work(rank: int) -> None:
            with shared.turn:
                try:
                    with torch.inference_mode(settings[1]), torch.set_grad_enabled(settings[0]), using(ends[rank]):
                        results[rank] = self._call(function, ends[rank], args)
                    ends[rank].drain()
                except BaseException as error:
                    errors.append(error)
                    ends[rank].fail(error)
                finally:
                    # a rank that has finished can never answer again
                    shared.waiting[rank] = None
                    shared.turn.notify_all()

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, rank), daemon=True)
            for rank in range(self.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, RankFailed)), errors[0])
        return Run(results, [end.traffic for end in ends], [end.events for end in ends])

    def _call(self, function: Callable, end: VirtualCommunicator, args: tuple) -> Any:
        if not self.count_flops:
            return function(end, *args)
        with FlopCount() as end.flops:
            result = function(end, *args)
            end._note_compute()
        return result


def replica(pipe: Any) -> Any:
    """Copy a pipeline or module for another virtual rank: its own structure, the same weight tensors.

    What is hooked on one copy is not hooked on another, and no memory is spent on weights.
    """
    import diffusers

    if isinstance(pipe, diffusers.DiffusionPipeline):
        twin = copy.copy(pipe)
        for name, part in list(vars(pipe).items()):
            if isinstance(part, torch.nn.Module):
                twin.__dict__[name] = replica(part)
            elif name == "scheduler":
                twin.__dict__[name] = copy.deepcopy(part)
        return twin
    shared = [*pipe.parameters(), *pipe.buffers()]
    return copy.deepcopy(pipe, {id(tensor): tensor for tensor in shared})


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    packet = getattr(func, "_overloadpacket", None)
    if "_scaled_dot_product" in str(packet) and "backward" not in str(packet):
        query, key, value = args[:3]
        rows = query.shape[:-1].numel()
        return 2 * rows * key.shape[-2] * (key.shape[-1] + value.shape[-1])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count is not None else 0
