"""Virtual ranks, their clock, and what happens when they disagree."""

import pytest
import torch

from fastdiff.parallel.clock import Event, Network, replay
from fastdiff.parallel.communicator import Alone, Communicator, RankFailed, current
from fastdiff.parallel.simulator import FlopCount, Simulator, replica
from tests.parallel.nets import sd


def test_gathers_exchanges_and_subgroups():
    def one(communicator: Communicator):
        own = torch.full((2,), float(communicator.rank))
        everybody = communicator.gather("a", own, [(2,)] * 4).wait()
        ring = communicator.exchange(
            "b", {(communicator.rank + 1) % 4: own}, {(communicator.rank - 1) % 4: (2,)}, own
        ).wait()
        pair = communicator.subgroup([[0, 2], [1, 3]])
        inner = pair.gather("c", own).wait()
        return torch.stack(list(everybody.values())), next(iter(ring.values())), list(inner.values()), current()

    run = Simulator(4).run(one)
    for rank, (everybody, ring, inner, used) in enumerate(run.results):
        assert everybody[:, 0].tolist() == [0, 1, 2, 3]
        assert ring[0] == (rank - 1) % 4
        assert [float(part[0]) for part in inner] == [rank % 2, rank % 2 + 2] or rank >= 2
        assert used.size == 4
        assert run.traffic[rank].received == {"a": 24, "b": 8, "c": 8}
        assert run.traffic[rank].operations == {"a": 1, "b": 1, "c": 1}
    assert isinstance(current(), Alone)


def test_results_may_be_awaited_in_any_order():
    def one(communicator: Communicator):
        sizes = (3, 1, 2)
        begun = [communicator.gather("x", torch.full((size,), float(size))) for size in sizes]
        return [begun[place].wait()[1 - communicator.rank].tolist() for place in (2, 0, 1)]

    for result in Simulator(2).run(one).results:
        assert result == [[2.0, 2.0], [3.0, 3.0, 3.0], [1.0]]


def test_a_run_repeats_itself():
    def one(communicator: Communicator):
        x = torch.randn(4, generator=torch.Generator().manual_seed(communicator.rank))
        for _ in range(3):
            x = torch.stack(list(communicator.gather("x", x).wait().values())).mean(0).sin()
        return x

    first, second = Simulator(3).run(one), Simulator(3).run(one)
    assert all(torch.equal(a, b) for a, b in zip(first.results, second.results, strict=True))
    assert first.events == second.events


def test_a_rank_that_waits_for_nothing_is_told():
    def one(communicator: Communicator):
        if communicator.rank == 0:
            communicator.gather("x", torch.zeros(1)).wait()

    with pytest.raises(RankFailed, match="rank 1, which sends nothing"):
        Simulator(2).run(one)


def test_the_first_error_is_the_one_that_is_raised():
    def one(communicator: Communicator):
        if communicator.rank == 2:
            raise ZeroDivisionError("here")
        communicator.gather("x", torch.zeros(1)).wait()

    with pytest.raises(ZeroDivisionError, match="here"):
        Simulator(3).run(one)


def test_gradients_are_refused():
    def one(communicator: Communicator):
        communicator.gather("x", torch.zeros(1, requires_grad=True))

    with pytest.raises(RuntimeError, match="no_grad"):
        Simulator(2).run(one)


def test_the_clock_by_hand():
    network = Network(latency_s=1, bytes_per_s=10)
    exchange = [
        [Event("compute", flops=2), Event("start", sends={1: 30}, receives=(1,)), Event("wait", operation=1)],
        [Event("start", sends={0: 10}, receives=(0,)), Event("compute", flops=20), Event("wait", operation=0)],
    ]
    # rank 0 sends from 2 to 2 + 1 + 3; rank 1 computes until 20; rank 0 has its message at 2
    assert replay(exchange, network, 1.0) == [2.0, 20.0]
    # a fast second device waits for the first one's message
    assert replay(exchange, network, [1.0, 100.0]) == [2.0, 6.0]
    gather = [
        [Event("start", sends=dict.fromkeys({0, 1, 2, 3} - {rank}, 10), receives=(), everybody=True)]
        for rank in range(4)
    ]
    for rank, events in enumerate(gather):
        receives = tuple(sorted({0, 1, 2, 3} - {rank}))
        events[0] = Event("start", sends=events[0].sends, receives=receives, everybody=True)
        events.append(Event("wait", operation=0))
    # two latencies and three messages of a second each
    assert replay(gather, network, 1.0) == [5.0] * 4
    with pytest.raises(ValueError, match="never sent"):
        replay([exchange[0], []], network, 1.0)


def test_operations_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(64, 8))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), FlopCount() as own:
        model(x)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(x)
    assert own.total == theirs.get_total_flops() > 0
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    with FlopCount() as own:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert own.total == 2 * 2 * (2 * 5 * 7 * 8)


def test_replicas_share_weights_and_nothing_else():
    model = sd()
    twin = replica(model)
    assert twin.conv_in is not model.conv_in
    assert twin.conv_in.weight is model.conv_in.weight
