"""How ranks enter and leave together: nobody waits for a rank that failed, was cancelled or went its own way."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.hooks import Hooks
from fastdiff.parallel.communicator import FAILED, FINISHED, PROCEED, Communicator, RankFailed, Stopped, current

_FRESH = 8


def enter(communicator: Communicator, fresh: bool = True) -> bool:
    """Begin a forward that all ranks run; return whether it is a fresh one, which it is if any rank wants it so.

    Raises:
        Stopped: a rank ended its call before this forward.
        RankFailed: a rank is on the way out with an error.
    """
    flags = communicator.agree(PROCEED + _FRESH * fresh)
    failed = [rank for rank, flag in enumerate(flags) if flag % _FRESH == FAILED]
    if failed:
        raise _known(RankFailed(f"rank {failed[0]} failed outside the model; its own error says why"), communicator)
    ended = [rank for rank, flag in enumerate(flags) if flag % _FRESH == FINISHED]
    if ended:
        raise _known(Stopped(f"rank {ended[0]} ended the call early, so all ranks did"), communicator)
    return any(flag & _FRESH for flag in flags)


@contextmanager
def together(communicator: Communicator) -> Iterator[None]:
    """Run the inside of a forward; an error in it leaves the group, which wakes the ranks that wait for this one."""
    try:
        yield
    except BaseException as error:
        communicator.fail(error)
        raise


def guard_call(hooks: Hooks, pipe: Any, communicator: Communicator) -> None:
    """Make calls of `pipe` end together: by a result on every rank, or by an error on every rank."""

    def around(inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = inner(*args, **kwargs)
        except BaseException as error:
            # peers are at the start of a forward or at the end of the call, and learn it there
            if id(communicator) not in getattr(error, "fastdiff_known", ()):
                with suppress(RankFailed):
                    communicator.agree(FAILED)
            _known(error, communicator)
            raise
        finally:
            communicator.drain()
        flags = communicator.agree(FINISHED)
        early = [rank for rank, flag in enumerate(flags) if flag % _FRESH != FINISHED]
        if not early:
            return result
        if flags[early[0]] % _FRESH == FAILED:
            raise _known(RankFailed(f"rank {early[0]} failed outside the model; its own error says why"), communicator)
        stopped = Stopped(f"this rank ended the call early while rank {early[0]} had steps left, so all ranks stopped")
        raise _known(stopped, communicator)

    if communicator.size > 1:
        hooks.override(pipe, "__call__", around)
        hooks.on_undo(communicator.drain)


def _known(error: BaseException, communicator: Communicator) -> BaseException:
    """Mark that the whole group knows of `error`, so that no rank announces it there again."""
    known = getattr(error, "fastdiff_known", ())
    error.__dict__["fastdiff_known"] = (*known, id(communicator))
    return error


def check_same_input(communicator: Communicator, x: Tensor) -> None:
    """Raise unless every rank holds the same input: ranks that draw their own noise would make a patchwork.

    Raises:
        Unsupported: the inputs differ.
    """
    if communicator.size == 1 or x.is_meta:
        return
    own = x.double().sum().reshape(1)
    parts = communicator.gather("check", own).wait()
    bits = [int(part.view(torch.int64)) for part in parts.values()]
    if len(set(bits)) > 1:
        raise Unsupported("ranks were given different inputs; give all the same latents or equally seeded generators")


def group_of(groups: int, inner: bool) -> Communicator:
    """This rank's communicator when ranks form `groups` equal groups of neighbours.

    Args:
        groups: how many.
        inner: the group of neighbours itself, or (False) the ranks that hold the same place in each group.

    Raises:
        Unsupported: the ranks cannot be divided so.
    """
    world = current()
    if world.size == 1:
        return world
    if world.size % groups:
        raise Unsupported(f"{world.size} ranks cannot form {groups} equal groups; use a multiple of {groups} ranks")
    size = world.size // groups
    if inner:
        members = [range(first, first + size) for first in range(0, world.size, size)]
    else:
        members = [range(place, world.size, size) for place in range(size)]
    return world if len(members) == 1 else world.subgroup(members)
