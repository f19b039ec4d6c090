"""Blocks on different ranks."""

import pytest
import torch

import fastdiff
from fastdiff.parallel.clock import Network, replay
from fastdiff.parallel.simulator import Simulator, replica
from fastdiff.parallel.stages import BlockStages, rebalanced
from tests.parallel.nets import dit, sd

STEPS = (9, 5)


def _arguments(number: int, sample: torch.Tensor, timestep: int) -> dict:
    prompt = torch.full((1, 5, 12), number / 10)
    return {"hidden_states": sample, "encoder_hidden_states": prompt, "timestep": torch.tensor([timestep])}


def _advance(number: int, output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
    return sample - 0.1 * output[:, :4]


@torch.no_grad()
def test_stages_are_one_device_bit_for_bit_and_overlap():
    model = dit(4)
    torch.manual_seed(1)
    samples = [torch.randn(1, 4, 8, 8) for _ in range(4)]
    truth = []
    for number, sample in enumerate(samples):
        for timestep in STEPS:
            output = model(**_arguments(number, sample, timestep)).sample
            sample = _advance(number, output, timestep, sample)
        truth.append(sample)

    def one(communicator, counts=()):
        with BlockStages(replica(model), communicator, counts) as stages:
            return stages.run(samples, STEPS, _arguments, _advance)

    finished = {}
    for ranks, counts in ((1, ()), (2, ()), (2, (1, 3))):
        run = Simulator(ranks, count_flops=True).run(one, counts)
        assert all(torch.equal(a, b) for a, b in zip(run.results[-1], truth, strict=True))
        finished[ranks, counts] = max(replay(run.events, Network(0, 1e15), 1e9))
    # two stages, eight passes each: a little more than half the time; unequal stages cost
    assert finished[2, ()] < 0.75 * finished[1, ()]
    assert finished[2, (1, 3)] > finished[2, ()]


def test_blocks_move_by_the_published_rule():
    assert rebalanced((11, 11, 10), (2, 1, 1), (2, 1, 1)) == (6, 13, 13)
    assert rebalanced((8, 8), (1, 1), (1, 1)) == (8, 8)
    assert rebalanced((2, 2), (100, 1), (100, 1)) == (1, 3)


def test_a_unet_is_refused_with_the_remedy():
    with pytest.raises(fastdiff.Unsupported, match="BranchParallel"):
        Simulator(2).run(lambda communicator: BlockStages(sd(), communicator))
