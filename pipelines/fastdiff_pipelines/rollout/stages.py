"""A causal transformer's blocks on several ranks, moved from slow ranks to fast ones while a video runs.

Every rank holds the whole model and the keys and values of its own blocks. Each call runs through the ranks in turn and
its velocity goes back to all of them, so that every rank's session stands where a single one would. Which rank gets how
many blocks follows StreamDiffusionV2's rule (https://arxiv.org/abs/2511.07399) from what every rank measured; keys and
values of moved blocks travel with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.parallel.communicator import Communicator
from fastdiff.parallel.stages import BlockStages, rebalanced
from fastdiff.video.cache import KeyValueCache
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text


class StagedCausal:
    """One rank's end of a causal transformer; called as a `CausalWan` is. Use as a context manager.

    Args:
        causal: the plug on this rank's copy of the model.
        communicator: the ranks, in the order of the stages.
        counts: blocks of each rank; equal shares if not given.
        clock: seconds.

    Raises:
        Unsupported, ValueError: as `BlockStages`.
    """

    def __init__(
        self,
        causal: CausalWan,
        communicator: Communicator,
        counts: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.causal, self.communicator, self.clock = causal, communicator, clock
        self.shape, self.dtype, self.device = causal.shape, causal.dtype, causal.device
        total, ranks = causal.shape.layers, communicator.size
        self.counts = tuple(counts) or tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))
        self.block_s = 0.0
        self._stages = BlockStages(causal.transformer, communicator, self.counts)
        # by the order they were made in, which is the same on every rank
        self._caches: WeakValueDictionary[int, KeyValueCache] = WeakValueDictionary()
        self._made = 0
        self._timed()

    def __enter__(self) -> StagedCausal:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stages.__exit__(kind, error, trace)

    def cache(self, rows: int, frames: int, height: int, width: int, **options: Any) -> KeyValueCache:
        """A cache of this rank's blocks.

        Raises:
            Unsupported: sinks that give way by likeness, of which every rank sees another part.
        """
        if options.get("evict_below") is not None:
            raise Unsupported("ranks would disagree about which sink to evict; set evict_below=None, or use one rank")
        first, last = self._stages.first, self._stages.last
        shape, tokens = self.shape, self.shape.tokens(height, width)
        given = {"dtype": self.dtype, "device": self.device, **options}
        cache = KeyValueCache(last - first + 1, rows, frames, tokens, shape.heads, shape.head, first=first, **given)
        self._caches[self._made] = cache
        self._made += 1
        return cache

    def __call__(self, x: Tensor, timestep: Tensor, text: Text, **options: Any) -> Tensor:
        """The velocity on every rank; see `CausalWan`."""
        velocity = self.causal(x, timestep, text, **options)
        last = self.communicator.size - 1
        if last == 0:
            return velocity
        if self.communicator.rank == last:
            others = dict.fromkeys(range(last), velocity.contiguous())
            self.communicator.exchange("velocity", others, {}, velocity).wait()
            return velocity
        shape = {last: tuple(velocity.shape)}
        return self.communicator.exchange("velocity", {}, shape, velocity).wait()[last]

    recache = CausalWan.recache

    def rebalance(self, total_s: float | None = None, block_s: float | None = None) -> tuple[int, ...]:
        """Move blocks, with what they keep, so that all ranks take equally long. Every rank calls it at the same place.

        Args:
            total_s: what this rank spent since the last time, decoding and all; what its blocks took if None.
            block_s: what its blocks took; as measured if None.

        Returns:
            The new counts.
        """
        block_s = self.block_s if block_s is None else block_s
        caches = dict(self._caches)
        alive = [float(number in caches) for number in range(self._made)]
        own = torch.tensor([block_s if total_s is None else total_s, block_s, *alive], dtype=torch.float64)
        every = self.communicator.gather("balance", own).wait()
        totals, blocks = ([float(every[rank][part]) for rank in range(self.communicator.size)] for part in (0, 1))
        counts = rebalanced(self.counts, totals, blocks)
        if counts != self.counts:
            before, self.counts = self.counts, counts
            for number in range(self._made):
                # one that some rank has let go of belongs to a video that has ended
                if all(float(told[2 + number]) for told in every.values()):
                    move_layers(self.communicator, caches[number], before, counts)
            self._stages.hooks.undo()
            self._stages = BlockStages(self.causal.transformer, self.communicator, counts)
            self._timed()
        self.block_s = 0.0
        return self.counts

    def _timed(self) -> None:
        """Measure what this rank's blocks take; installed below the stages' hooks, so waiting is not counted."""
        for number in range(self._stages.first, self._stages.last + 1):
            wrapped = self._stages.blocks[number].__dict__["forward"]
            inner = wrapped.inner

            def timed(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                began = self.clock()
                output = inner(*args, **kwargs)
                self.block_s += self.clock() - began
                return output

            wrapped.inner = timed


def move_layers(communicator: Communicator, cache: KeyValueCache, before: Sequence[int], after: Sequence[int]) -> None:
    """Hand keys and values of moved layers over, in place; what every rank knows alike stays."""
    owners, heirs = (_owners(counts) for counts in (before, after))
    rank = communicator.rank
    mine = [layer for layer, heir in enumerate(heirs) if heir == rank]
    for store in (cache.keys, cache.values):
        for name in ("values", "scales"):
            held = getattr(store, name)
            if held is None:
                continue
            # float8 has no transfer of its own everywhere; bytes have
            plain = held.view(torch.uint8) if held.element_size() == 1 else held
            new = plain.new_zeros(len(mine), *plain.shape[1:])
            for layer, (owner, heir) in enumerate(zip(owners, heirs, strict=True)):
                if owner == heir == rank:
                    new[layer - mine[0]] = plain[layer - cache.first]
                elif owner == rank:
                    part = plain[layer - cache.first].contiguous()
                    communicator.exchange("cache", {heir: part}, {}, part).wait()
                elif heir == rank:
                    shape = {owner: tuple(plain.shape[1:])}
                    new[layer - mine[0]] = communicator.exchange("cache", {}, shape, plain).wait()[owner]
            setattr(store, name, new.view(held.dtype) if held.element_size() == 1 else new)
    cache.first, cache.layers = mine[0], len(mine)


def _owners(counts: Sequence[int]) -> list[int]:
    """Rank of every layer."""
    edges = list(accumulate(counts))
    return [next(rank for rank, edge in enumerate(edges) if layer < edge) for layer in range(edges[-1])]
