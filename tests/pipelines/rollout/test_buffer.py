"""StreamDiT's moving buffer over networks with known answers."""

import itertools

import pytest
import torch
from torch import Tensor

from fastdiff_pipelines.rollout.buffer import MovingBuffer, Partition, buffered
from fastdiff_pipelines.rollout.noise import draw
from tests.pipelines.rollout.tiny import rollout

SHAPE = (2, 3, 3)


class Net:
    """A network that treats every frame alike, in float64, and remembers what it was told."""

    def __init__(self):
        self.told: list[Tensor] = []
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, told: Tensor) -> Tensor:
        self.told.append(told[0] / 1000)
        self.seen.append(x)
        return torch.sin(3 * x) + told[:, None, :, None, None] / 1000


def noise(number: int, frames: int) -> Tensor:
    return draw(0, 1, (SHAPE[0], frames, *SHAPE[1:]), number, 0).double()


def run(partition: Partition, chunks: int, net: Net, shift: float = 1.0) -> list[Tensor]:
    buffer = MovingBuffer(net, lambda number: noise(number, partition.frames), partition, shift)
    made = [done for _ in range(chunks) if (done := buffer.advance()) is not None]
    return made + list(buffer.flush())


def alone(number: int, frames: int, steps: int, shift: float = 1.0) -> Tensor:
    """Ordinary sampling of one chunk."""
    x, net = noise(number, frames), Net()
    even = [1 - i / steps for i in range(steps + 1)]
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in even]
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * net(x, torch.full((1, frames), 1000 * now, dtype=torch.float64))
    return x


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(("chunks", "frames", "micro_steps"), [(1, 4, 6), (4, 1, 1), (3, 2, 2), (2, 1, 5)])
def test_every_frame_is_sampled_with_all_steps_and_nothing_else(
    chunks: int, frames: int, micro_steps: int, shift: float
) -> None:
    partition = Partition(chunks, frames, micro_steps)
    made = run(partition, 7, Net(), shift)
    assert len(made) == 7
    for number, done in enumerate(made):
        torch.testing.assert_close(done, alone(number, frames, partition.steps, shift), rtol=0, atol=1e-12)


def test_the_staircase() -> None:
    partition, net = Partition(chunks=3, frames=2, micro_steps=2), Net()
    buffer = MovingBuffer(net, lambda number: noise(number, 2), partition)
    departures = []
    for call in range(8):
        before = buffer.taken
        if buffer.advance() is not None:
            departures.append(call)
            # what was one place further on is what each has become
            assert buffer.taken == tuple(partition.micro_steps * (i + 1) for i in (1, 0))
        assert call < 3 or before == (4, 2)
    assert departures == list(range(2, 8))
    full = net.told[-2]
    assert full.tolist() == pytest.approx([2 / 6, 2 / 6, 4 / 6, 4 / 6, 1, 1])
    assert net.told[-1].tolist() == pytest.approx([1 / 6, 1 / 6, 3 / 6, 3 / 6, 5 / 6, 5 / 6])
    assert (full.diff() >= 0).all()


def test_one_frame_and_one_step_is_fifo_diffusion() -> None:
    partition, net = Partition(chunks=4, frames=1, micro_steps=1), Net()
    run(partition, 9, net)
    assert net.told[5].tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert len(net.told) == 9 + 3


def test_references_are_seen_and_stay() -> None:
    partition, net = Partition(chunks=2, frames=1, micro_steps=1, references=2), Net()
    made = run(partition, 6, net)
    assert net.told[-2].tolist() == pytest.approx([0, 0, 0.5, 1.0])
    assert torch.equal(net.seen[-2][:, :, :2], torch.cat(made[2:4], dim=2))


def test_frames_of_a_real_transformer_with_one_timestep_each() -> None:
    with rollout() as model:
        parts = list(buffered(model, "a red circle", Partition(chunks=3, frames=1, micro_steps=2), chunks=5))
        assert [part.shape[1] for part in parts] == [1, 4, 4, 4, 4]
        assert all(torch.isfinite(part).all() for part in parts)
        text = model.encode(["a red circle"])
        x, told = draw(0, 1, (4, 3, 2, 2), 0), torch.tensor([[100.0, 500.0, 900.0]])
        with torch.no_grad():
            apart = model.causal(x, told, text)
            assert not torch.allclose(apart, model.causal(x, torch.tensor([500.0]), text))
            assert torch.equal(model.causal(x, torch.full((1, 3), 500.0), text).round(decimals=4),
                               model.causal(x, torch.tensor([500.0]), text).round(decimals=4))  # fmt: skip


def test_a_number_of_chunks_that_is_none_is_refused() -> None:
    with rollout() as model:
        for chunks in (0, -3):
            with pytest.raises(ValueError, match=f"chunks={chunks}"):
                next(buffered(model, "x", chunks=chunks))


@pytest.mark.parametrize("options", [{"chunks": 0}, {"frames": 0}, {"micro_steps": 0}, {"references": -1}])
def test_impossible_partitions_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Partition(**options)
