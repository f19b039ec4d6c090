"""Ranks that are processes: torch.distributed over gloo (CPU) or NCCL (CUDA), and a launcher for one machine."""

import datetime
import faulthandler
import os
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.parallel.communicator import Communicator, RankFailed, using

_FAILURE_KEY = "fastdiff/failure"
# outside the range of ordinary tags: nobody ever sends with it
_NOBODY = 999_983


class TorchCommunicator(Communicator):
    """This process's end of a torch.distributed process group.

    `world()` gives the communicator of the default group, the same object every time while the group lives.
    """

    _worlds: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    def __init__(self, group: Any):
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._members = dist.get_process_group_ranks(group)
        self._backend = dist.get_backend(group)

    @classmethod
    def world(cls) -> "TorchCommunicator":
        """The communicator of the default group; `torch.distributed.init_process_group` must have run."""
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("torch.distributed is not initialised; call init_process_group first, or use torchrun")
        if group not in cls._worlds:
            cls._worlds[group] = cls(group)
        return cls._worlds[group]

    @property
    def device(self) -> torch.device:
        if self._backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def subgroup(self, members: Sequence[Sequence[int]]) -> Communicator:
        groups = [dist.new_group([self._members[rank] for rank in part]) for part in members]
        for part, group in zip(members, groups, strict=True):
            if self.rank in part:
                return self._adopt(TorchCommunicator(group))
        raise ValueError(f"rank {self.rank} is in none of the groups {list(members)}")

    def fail(self, error: BaseException) -> None:
        """Leave for good: tell the reason, then close every connection, which wakes whoever waits for this rank."""
        if self.broken and not dist.is_initialized():
            return
        super().fail(error)
        world = dist.group.WORLD
        if world is None:
            return
        with suppress(RuntimeError, ValueError):
            store = dist.distributed_c10d._get_default_store()
            # the first to fail is the cause; later ones only follow
            if not isinstance(error, RankFailed) and not store.check([_FAILURE_KEY]):
                store.set(_FAILURE_KEY, self.broken)
        if dist.get_backend(world) == "gloo":
            # a receive that times out makes gloo close every connection of this rank; destroying the group does so
            # only once nothing, not even a traceback, refers to it
            other = (dist.get_rank() + 1) % dist.get_world_size()
            with suppress(RuntimeError, ValueError):
                work = dist.irecv(torch.zeros(1), other, tag=_NOBODY)
                if work is not None:
                    work.wait(datetime.timedelta(milliseconds=1))
        else:
            with suppress(RuntimeError, ValueError):
                dist.distributed_c10d._abort_process_group()

    def _begin(self, sends: dict[int, Tensor], received: dict[int, Tensor], everybody: bool) -> Any:
        try:
            if everybody and len({tuple(tensor.shape) for tensor in (*sends.values(), *received.values())}) == 1:
                own = next(iter(sends.values()))
                parts = [received.get(rank, torch.empty_like(own)) for rank in range(self.size)]
                # with uneven parts gloo has no gather, so those travel in pairs
                return [dist.all_gather(parts, own, group=self._group, async_op=True)]
            operations = [self._operation(dist.isend, tensor, rank) for rank, tensor in sends.items()]
            operations += [self._operation(dist.irecv, tensor, rank) for rank, tensor in received.items()]
            return dist.batch_isend_irecv(operations)
        except (RuntimeError, ValueError) as error:
            raise self._lost(error) from error

    def _operation(self, verb: Callable, tensor: Tensor, rank: int) -> dist.P2POp:
        # NCCL has no tensors without elements on the wire; nobody sends those
        return dist.P2POp(verb, tensor, self._members[rank], group=self._group)

    def _finish(self, work: Any) -> None:
        try:
            for part in work or ():
                part.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> RankFailed:
        reason = ""
        with suppress(RuntimeError, ValueError):
            store = dist.distributed_c10d._get_default_store()
            if store.check([_FAILURE_KEY]):
                reason = store.get(_FAILURE_KEY).decode()
        first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        self.broken = reason or f"a rank of the group was lost ({first_line}); start the group again"
        return RankFailed(self.broken)


def launch(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 60, threads: int = 1, start_s: float = 300
) -> list[Any]:
    """Run `function(communicator, *args)` in `ranks` new processes of this machine (gloo) and return their results.

    Args:
        function: importable by name, as everything that is sent to another process.
        ranks: how many processes.
        args: picklable arguments.
        timeout_s: from when all have started; after this every process prints where it stands and is ended.
        threads: torch threads of each process.
        start_s: how long starting may take, which is mostly importing and slow on a busy machine.

    Returns:
        One result a rank; a rank that raised gives its exception instead.

    Raises:
        TimeoutError: the processes did not finish in time.
    """
    # one server imports what the function needs, and its forks begin at once; it has touched no device yet
    context: Any = torch.multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        workers, starts = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            common = (theirs, function, ranks, folder, timeout_s, threads, args)
            workers.append(context.Process(target=_serve, args=(rank, *common), daemon=True))
            starts.append(mine)
            workers[-1].start()
            theirs.close()
        deadline = time.monotonic() + start_s
        for worker, start in zip(workers, starts, strict=True):
            wait([start, worker.sentinel], max(0.0, deadline - time.monotonic()))
        deadline = time.monotonic() + timeout_s
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for rank in late:
            workers[rank].kill()
            workers[rank].join()
        if late:
            raise TimeoutError(f"ranks {late} of {ranks} were still running after {timeout_s} s")
        return [_result(folder, rank, worker.exitcode) for rank, worker in enumerate(workers)]


def connect(folder: str | Path, rank: int, ranks: int, timeout_s: float = 300) -> TorchCommunicator:
    """Join a gloo group of this machine whose ranks meet in `folder`; a folder serves one group only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    longest = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=longest)
    return TorchCommunicator.world()


def disconnect() -> None:
    """Leave the default group, if there is one."""
    if dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()


def _serve(
    rank: int, started: Any, function: Callable, ranks: int, folder: str, timeout_s: float, threads: int, args: tuple
) -> None:
    torch.set_num_threads(threads)
    try:
        communicator = connect(folder, rank, ranks)
        started.send(rank)
        # the launcher ends a process that is late; this only says where it stood
        faulthandler.dump_traceback_later(max(1.0, timeout_s - 2))
        with using(communicator):
            result = function(communicator, *args)
        communicator.drain()
    except Exception as error:
        error.add_note(traceback.format_exc())
        result = error
    torch.save(result, Path(folder) / f"result-{rank}")
    faulthandler.cancel_dump_traceback_later()
    disconnect()


def _result(folder: str, rank: int, code: int | None) -> Any:
    path = Path(folder) / f"result-{rank}"
    if not path.exists():
        return RankFailed(f"rank {rank} ended with exit code {code} and left no result")
    return torch.load(path, weights_only=False)
