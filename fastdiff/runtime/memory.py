"""How much memory a computation needs at once, counted from live storages, on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and nobody has let go of."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # a view of something that was there before is no new memory
                if storage._cdata not in given:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def peak_bytes(compute: Callable[[], Any]) -> tuple[Any, int]:
    """What `compute` returns, and the most bytes of tensors made by it that were alive after any one operation.

    Weights and inputs do not count; nor does what a single operation allocates and frees inside itself.
    """
    with torch.no_grad(), _Live() as live:
        result = compute()
    return result, live.peak
