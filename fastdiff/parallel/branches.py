"""Rows of a denoiser's batch on different ranks: the two guidance branches of a picture, or the slots of a stream.

Exact: rows of a batch do not meet inside a denoiser. One exchange a step, of one latent a row.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments
from fastdiff.hooks import Hooks
from fastdiff.parallel.agreement import check_same_input, enter, group_of, guard_call, together
from fastdiff.parallel.communicator import Communicator, current
from fastdiff.parallel.exchange import output_sample, with_sample
from fastdiff.parallel.strips import Range, Strips


@dataclass(frozen=True)
class BranchParallel(Acceleration):
    """Give each group of ranks a part of the denoiser's batch.

    With classifier-free guidance in one batched call, 2 branches put the conditional and the unconditional half on two
    devices; three-way guidance (image editing) takes 3. For a stream, as many branches as ranks spread its slots. A
    call with fewer rows than branches runs whole on every rank, and the report says so.

    Args:
        branches: how many parts; the number of ranks must be a multiple. Beside `PatchParallel(groups=branches)`, the
            ranks of each part share its picture.
    """

    stage: ClassVar[str] = "devices"

    branches: int = 2

    def __post_init__(self):
        check_number(type(self).__name__, "branches", self.branches, 2, whole=True)

    @property
    def exact(self) -> bool:
        """Always: only the batch size of a call changes."""
        return True

    def conflict(self, other: Acceleration) -> str:
        if type(other).__name__ == "Compile":
            return "ranks exchange rows around the model, which a compiled graph cannot; compile without it"
        return ""

    def supports(self, pipe: Any) -> Verdict:
        ranks = current().size
        if ranks % self.branches and ranks > 1:
            return Verdict(False, f"{ranks} ranks cannot form {self.branches} equal groups")
        if anatomy(pipe).guidance == "separate":
            reason = "this pipeline calls its denoiser once a branch; use PatchParallel or ContextParallel"
            return Verdict(False, reason)
        return Verdict(True, "" if ranks > 1 else "one rank: nothing was installed; launch more with torchrun")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        communicator = group_of(self.branches, inner=False)
        if communicator.size == 1:
            hooks.counter.expects = "nothing"
            return
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", _Rows(denoiser, communicator, hooks))
        guard_call(hooks, pipe, communicator)


class _Rows:
    """Runs one denoiser on this rank's rows of the batch."""

    def __init__(self, denoiser: Any, communicator: Communicator, hooks: Hooks):
        self.denoiser = denoiser
        self.communicator = communicator
        self.hooks = hooks

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = denoiser_arguments(self.denoiser, args, kwargs)
        sample = next(iter(arguments.values()))
        batch, ranks = sample.shape[0], self.communicator.size
        enter(self.communicator)
        if batch < ranks:
            self.hooks.counter.count(False)
            self.hooks.counter.note(f"a call with {batch} rows ran whole on each of {ranks} ranks")
            return inner(*args, **kwargs)
        self._check(sample)
        strips = Strips.share(batch, [1.0] * ranks)
        with together(self.communicator):
            own = strips.own(self.communicator.rank)
            output = inner(**{name: _rows(value, batch, own) for name, value in arguments.items()})
            whole = self._join(output_sample(output), strips)
        self.hooks.counter.count(True)
        return with_sample(output, whole)

    def _check(self, sample: Tensor) -> None:
        request = self.hooks.requests.current()
        checked = [] if request is None else request.state(("rows checked", id(self)), list)
        if not checked:
            check_same_input(self.communicator, sample)
            checked.append(True)

    def _join(self, part: Tensor, strips: Strips) -> Tensor:
        shapes = [(rows, *part.shape[1:]) for rows in strips.heights]
        return torch.cat(list(self.communicator.gather("output", part, shapes).wait().values()))


def _rows(value: Any, batch: int, own: Range) -> Any:
    """The part of an argument that belongs to rows `own` of a batch; what has no batch is kept."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] < batch or value.shape[0] % batch:
            return value
        # frames of a video may be folded into the batch
        each = value.shape[0] // batch
        return value[own[0] * each : own[1] * each]
    if isinstance(value, dict):
        return {key: _rows(part, batch, own) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows(part, batch, own) for part in value)
    return value
