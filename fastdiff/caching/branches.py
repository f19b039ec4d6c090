"""Telling guidance branches apart by what they are conditioned on, whatever a pipeline calls them or in which order."""

from collections.abc import Hashable
from typing import Any

from fastdiff.anatomy import conditioning, step_index
from fastdiff.hooks import Request


def branch_of(request: Request, owner: Hashable, arguments: dict[str, Any]) -> int:
    """Number of the guidance branch a denoiser call belongs to, in the order in which branches first appeared.

    Args:
        owner: whose memory of branches to use; one denoiser has one.
        arguments: the call's, by name. Its conditioning tensors are held, so that none is reborn at another's address.
    """
    import torch

    known = request.state((owner, "branches"), list)
    tensors = conditioning(arguments)
    step = step_index(request.pipe)
    for number, branch in enumerate(known):
        if len(branch[0]) == len(tensors) and all(a is b for a, b in zip(branch[0], tensors, strict=True)):
            branch[1] = step
            return number
    for number, branch in enumerate(known):
        # equal in content, but already called in this step: the other branch, with the same words
        if len(branch[0]) != len(tensors) or (step is not None and branch[1] == step):
            continue
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(branch[0], tensors, strict=True)):
            branch[1] = step
            return number
    known.append([tensors, step])
    return len(known) - 1
