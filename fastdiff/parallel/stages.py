"""A transformer's blocks on several ranks, one range each, with several pictures of a stream under way at once
(StreamDiffusionV2's orchestration, Feng et al. 2025, arXiv 2511.07399).

Throughput is set by the slowest rank, latency by the sum; `rebalanced` moves blocks from slow ranks to fast ones. For a
UNet, whose skip connections cross any cut, give each rank rows of the stream's batch instead (`BranchParallel`).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import block_metadata, blocks
from fastdiff.hooks import Hooks, Requests
from fastdiff.parallel.communicator import Communicator, Pending
from fastdiff.parallel.exchange import output_sample


class BlockStages:
    """One rank's stage of a transformer. Use as a context manager; leaving it takes the hooks off.

    Args:
        denoiser: a diffusers transformer with plain lists of blocks; every rank holds all of it.
        communicator: the ranks, in the order of the stages.
        counts: blocks of each rank; equal shares if not given.

    Raises:
        Unsupported: the model has no plain list of blocks, or fewer blocks than there are ranks.
    """

    def __init__(self, denoiser: Any, communicator: Communicator, counts: Sequence[int] = ()):
        self.denoiser = denoiser
        self.communicator = communicator
        self.blocks = [block for _, block in blocks(denoiser)]
        total, ranks = len(self.blocks), communicator.size
        if total < ranks:
            raise Unsupported(
                f"{type(denoiser).__name__} has {total} blocks in plain lists for {ranks} ranks; for a UNet use "
                "BranchParallel, which gives each rank rows of the batch"
            )
        counts = list(counts) or [total // ranks + (rank < total % ranks) for rank in range(ranks)]
        if len(counts) != ranks or sum(counts) != total or min(counts) < 1:
            raise ValueError(f"counts must name {ranks} positive numbers of blocks that sum to {total}, not {counts}")
        edges = [0, *accumulate(counts)]
        self.first, self.last = edges[communicator.rank], edges[communicator.rank + 1] - 1
        self.sending: list[Pending] = []
        self.hooks = Hooks("BlockStages", Requests())
        for number, block in enumerate(self.blocks):
            self.hooks.wrap(block, "forward", _Block(self, number, block))

    def __enter__(self) -> "BlockStages":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.communicator.fail(error)
        self.communicator.drain()
        self.hooks.undo()

    def run(
        self,
        samples: Sequence[Tensor],
        timesteps: Sequence[Any],
        arguments: Callable[[int, Tensor, Any], dict[str, Any]],
        advance: Callable[[int, Tensor, Any, Tensor], Tensor],
    ) -> list[Tensor]:
        """Denoise every sample through all timesteps, `communicator.size` of them under way at once.

        Args:
            samples: the same on every rank.
            timesteps: of every sample, in order.
            arguments: (number, sample, timestep) to the denoiser's keyword arguments.
            advance: (number, denoiser output, timestep, sample) to the next sample; called on the last rank only.

        Returns:
            The finished samples on the last rank, the given ones on the others.
        """
        current, ranks = list(samples), self.communicator.size
        for start in range(0, len(samples), ranks):
            flight = range(start, min(start + ranks, len(samples)))
            for step, timestep in enumerate(timesteps):
                for number in flight:
                    self._one(number, step, timestep, len(timesteps), current, arguments, advance)
        self.communicator.drain()
        return current

    def _one(
        self, number: int, step: int, timestep: Any, steps: int, current: list[Tensor], arguments: Any, advance: Any
    ) -> None:
        rank, last = self.communicator.rank, self.communicator.size - 1
        if rank == 0 and last and step:
            current[number] = self.receive(last, current[number])
        output = output_sample(self.denoiser(**arguments(number, current[number], timestep)))
        if rank == last:
            current[number] = advance(number, output, timestep, current[number])
            if last and step < steps - 1:
                self.send(0, current[number])

    def send(self, rank: int, tensor: Tensor) -> None:
        """Start sending; what was sent before the last one must have left by now."""
        while len(self.sending) > 1:
            self.sending.pop(0).wait()
        self.sending.append(self.communicator.exchange("stage", {rank: tensor}, {}, tensor))

    def receive(self, rank: int, like: Tensor) -> Tensor:
        """Wait for a tensor shaped as `like`."""
        return self.communicator.exchange("stage", {}, {rank: tuple(like.shape)}, like).wait()[rank]


class _Block:
    """Runs a block of this rank's stage, passes by any other; hands over at the edges."""

    def __init__(self, stages: BlockStages, number: int, block: Any):
        self.stages = stages
        self.number = number
        self.metadata = block_metadata(block)
        if self.metadata is None:
            raise Unsupported(f"diffusers does not say what {type(block).__name__} takes and returns")

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        stages, communicator = self.stages, self.stages.communicator
        values = list(args)
        names = ["hidden_states"]
        if self.metadata.return_encoder_hidden_states_index is not None:
            names.append("encoder_hidden_states")
        if not stages.first <= self.number <= stages.last:
            return self._result([self._get(name, values, kwargs) for name in names])
        if self.number == stages.first and communicator.rank > 0:
            for name in names:
                self._put(name, values, kwargs, stages.receive(communicator.rank - 1, self._get(name, values, kwargs)))
        output = inner(*values, **kwargs)
        if self.number == stages.last and communicator.rank < communicator.size - 1:
            for tensor in self._parts(output, len(names)):
                stages.send(communicator.rank + 1, tensor)
        return output

    def _get(self, name: str, values: list[Any], kwargs: dict[str, Any]) -> Any:
        return self.metadata._get_parameter_from_args_kwargs(name, values, kwargs)

    def _put(self, name: str, values: list[Any], kwargs: dict[str, Any], value: Tensor) -> None:
        if name in kwargs:
            kwargs[name] = value
        else:
            old = self._get(name, values, kwargs)
            values[next(place for place, one in enumerate(values) if one is old)] = value

    def _parts(self, output: Any, count: int) -> list[Tensor]:
        if count == 1:
            return [output[self.metadata.return_hidden_states_index] if isinstance(output, tuple) else output]
        return [
            output[self.metadata.return_hidden_states_index],
            output[self.metadata.return_encoder_hidden_states_index],
        ]

    def _result(self, parts: list[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        places = (self.metadata.return_hidden_states_index, self.metadata.return_encoder_hidden_states_index)
        return tuple(part for _, part in sorted(zip(places, parts, strict=True), key=lambda pair: pair[0]))


def rebalanced(counts: Sequence[int], total_s: Sequence[float], block_s: Sequence[float]) -> tuple[int, ...]:
    """Move blocks so that all ranks take equally long, by StreamDiffusionV2's published rule.

    Args:
        counts: blocks of each rank now.
        total_s: how long each rank takes for its stage, all included.
        block_s: how long each rank takes for its blocks alone.

    Returns:
        New counts with the same sum, at least one each.
    """
    blocks_in_all = sum(counts)
    mean, each = sum(total_s) / len(total_s), sum(block_s) / blocks_in_all
    new = [max(1, round(count + (mean - total) / each)) for count, total in zip(counts, total_s, strict=True)]
    while sum(new) > blocks_in_all:
        new[new.index(max(new))] -= 1
    while sum(new) < blocks_in_all:
        new[new.index(min(new))] += 1
    return tuple(new)
