"""The cost model: against the best of everything in the simulator, and against published figures."""

from typing import Any

import pytest

import fastdiff
from fastdiff.parallel.clock import NETWORKS, Network, replay
from fastdiff.parallel.communicator import Alone
from fastdiff.parallel.cost import BAND, Candidate, Machine, break_even, candidates, choose, predict
from fastdiff.parallel.inventory import Inventory, take
from fastdiff.parallel.patch import PatchParallel
from fastdiff.parallel.probe import probe
from fastdiff.parallel.published import SDXL_TENSORRT, fit, table
from fastdiff.parallel.simulator import Simulator, replica
from tests.parallel.nets import inputs, pipeline, sd

STEPS, WARMUP = 4, 1


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    return take(sd(), inputs("sd", batch=2))


def _options() -> list[Candidate]:
    found = candidates(4, guided=True, lossy=True, steps=20)
    return [Candidate(one.branches, one.strips, one.policy, one.portion, WARMUP) for one in found]


@pytest.fixture(scope="module")
def recorded() -> dict[Candidate, Any]:
    """Every candidate run once on virtual ranks; what each computed and sent."""
    pipe = pipeline(sd())

    def one(communicator, plan):
        twin = replica(pipe)
        allowed = [_with_few_steps(part) for part in plan]
        with fastdiff.accelerate(twin, allowed):
            return twin(steps=STEPS, **inputs("sd", batch=2))

    found = {}
    for option in _options():
        found[option] = Simulator(option.ranks, count_flops=True).run(one, option.accelerations()).events
    return found


def _with_few_steps(one: Any) -> Any:
    if isinstance(one, PatchParallel):
        return PatchParallel(**{**one.settings(), "few_steps": True})
    return one


@pytest.mark.slow
def test_the_choice_is_within_ten_percent_of_the_best(inventory: Inventory, recorded: dict[Candidate, Any]):
    chosen = set()
    for latency_s in (1e-7, 1e-6, 1e-5, 1e-4):
        for bytes_per_s in (1e7, 1e8, 1e9, 1e10, 1e11):
            network = Network(latency_s, bytes_per_s)
            best = choose(inventory, Machine(1e10), network, _options(), STEPS).best.candidate
            times = {option: max(replay(events, network, 1e10)) for option, events in recorded.items()}
            assert times[best] <= 1.1 * min(times.values()), (network, best, min(times, key=times.__getitem__))
            chosen.add(best)
    assert len(chosen) >= 2  # the networks are different enough to want different plans


def test_strips_follow_unequal_devices(recorded: dict[Candidate, Any]):
    """One device half as fast: two thirds of the rows on the fast one take 1.5 times less than halves."""
    pipe = pipeline(sd())

    def one(communicator, shares):
        twin = replica(pipe)
        with fastdiff.accelerate(twin, PatchParallel(shares=shares)):
            return twin(**inputs("sd", rows=24))

    makespans = []
    for shares in ((1, 1), (2, 1)):
        events = Simulator(2, count_flops=True).run(one, shares).events
        makespans.append(max(replay(events, Network(0, 1e15), [2e9, 1e9])))
    assert makespans[0] / makespans[1] == pytest.approx(1.5, abs=0.1)


def test_a_choice_says_why_and_labels_predictions(inventory: Inventory):
    choice = choose(inventory, Machine(1e10), Network(1e-6, 1e11, "fast link"), _options(), 20)
    assert "times as fast as one device over fast link" in str(choice)
    assert "prediction" in str(choice)
    best = choice.best
    assert best.low_s == pytest.approx(best.latency_s * (1 + BAND[0]))
    assert best.high_s == pytest.approx(best.latency_s * (1 + BAND[1]))
    alone = predict(inventory, Machine(1e10), NETWORKS["pcie4"], Candidate(), 20)
    assert "measured speed" in str(alone)
    assert alone.latency_s == pytest.approx(20 * inventory.flops / 1e10)


def test_memory_decides_when_it_must(inventory: Inventory):
    whole = predict(inventory, Machine(1e10), Network(1, 1), Candidate(), 20)
    cut = predict(inventory, Machine(1e10), Network(1, 1), Candidate(2, 2), 20)
    assert cut.memory_bytes < whole.memory_bytes
    machine = Machine(1e10, memory_bytes=whole.memory_bytes - 1)
    assert choose(inventory, machine, Network(1, 1), _options(), 20).best.candidate.ranks > 1
    with pytest.raises(MemoryError, match="no plan fits"):
        choose(inventory, Machine(1e10, memory_bytes=1), Network(1, 1), _options(), 20)


def test_few_steps_and_low_pictures_leave_fewer_candidates(inventory: Inventory):
    assert {one.policy for one in candidates(4, True, True, 8)} == {"sync"}
    assert max(one.ranks for one in candidates(4, False, True, 50)) == 4
    low = take(sd(), inputs("sd", rows=2, batch=2))
    assert choose(low, Machine(1e10), Network(0, 1e15), _options(), 20).best.candidate.strips == 1


def test_break_even_is_where_sending_just_hides(inventory: Inventory):
    machine, option = Machine(1e10), Candidate(1, 2, "stale")
    needed = break_even(inventory, machine, Network(1e-6, 1), option)
    slower, faster = (predict(inventory, machine, Network(1e-6, needed * k), option, 100) for k in (0.5, 2))
    assert slower.exposed > 0.2
    assert faster.exposed < slower.exposed / 2
    assert break_even(inventory, machine, Network(1.0, 1), option) == float("inf")


def test_published_latencies_are_explained():
    rows = table()
    assert len(rows) == 5
    for row in rows:
        assert row.fit_error < 0.06, row
        # what really happened lies in the band that predictions carry
        assert 1 + BAND[0] <= 1 / (1 + row.blind_error) <= 1 + BAND[1], row


def test_the_fit_recovers_its_own_model():
    assert fit([(n, 2 + 12 / n) for n in (1, 2, 4)]) == pytest.approx((2, 12))
    # more than proportional speed-up has no serial part
    assert fit([(1, 10.0), (2, 4.0)])[0] == 0
    serial, parallel = fit(SDXL_TENSORRT[:2])
    assert (serial + parallel / 4) / SDXL_TENSORRT[2][1] == pytest.approx(0.89, abs=0.01)


def test_a_probe_measures_this_device(inventory: Inventory):
    found = probe(sd(), inputs("sd", batch=2), inventory, Alone(), budget_s=0.5)
    assert found.network is None
    assert found.machine.flops_per_s > 0
    assert all(factor >= 1 for _, factor in found.machine.inefficiency)
    assert choose(inventory, found.machine, NETWORKS["loopback"], _options(), 20).predictions
