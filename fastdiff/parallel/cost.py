"""How long a plan would take on given machines and links, and which plan to choose. Every figure is a prediction.

The model is the usual one: computing takes operations over speed, an exchange takes a latency and bytes over bandwidth,
and what is not fresh hides behind computing. `clock.replay` says the same of a recorded run; the tests hold the choice
made here to the best found there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdiff.acceleration import Acceleration
from fastdiff.parallel.clock import Network
from fastdiff.parallel.inventory import Inventory
from fastdiff.parallel.patch import FEW_STEPS
from fastdiff.parallel.strips import Strips

BAND = (-0.13, 0.20)
"""How far a real latency may lie from a predicted one beyond the measured number of devices: models of this kind came
out up to 17 % too fast and 15 % too slow against published figures (`published.table`)."""


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        flops_per_s: effective speed on the whole picture.
        overhead_s: what a forward costs beside its operations.
        memory_bytes: free memory; 0 if unknown.
        inefficiency: (ranks, factor) pairs: how much slower than its share a strip of 1 / ranks of the rows runs.
        measured: how many devices these figures were measured on; predictions for more carry `BAND`.
    """

    flops_per_s: float
    overhead_s: float = 0.0
    memory_bytes: int = 0
    inefficiency: tuple[tuple[int, float], ...] = ()
    measured: int = 1

    def factor(self, ranks: int) -> float:
        """The inefficiency of strips for so many ranks: the nearest measured number at or below."""
        return max([1.0, *(factor for measured, factor in self.inefficiency if measured <= ranks)])


@dataclass(frozen=True)
class Candidate:
    """One way to use the ranks: guidance branches apart, and so many strips of each branch's picture."""

    branches: int = 1
    strips: int = 1
    policy: str = "sync"
    portion: float = 0.3
    warmup: int = 4

    @property
    def ranks(self) -> int:
        """Devices it uses."""
        return self.branches * self.strips

    @property
    def name(self) -> str:
        """A short name, such as "branch 2 x stale 4"."""
        parts = [f"branch {self.branches}"] if self.branches > 1 else []
        parts += [f"{self.policy} {self.strips}"] if self.strips > 1 else []
        return " x ".join(parts) or "single"

    def accelerations(self) -> list[Acceleration]:
        """What to put into a plan."""
        from fastdiff.parallel.branches import BranchParallel
        from fastdiff.parallel.patch import PatchParallel

        chosen: list[Acceleration] = []
        if self.strips > 1:
            settings: dict[str, Any] = {"policy": self.policy, "portion": self.portion, "warmup": self.warmup}
            chosen.append(PatchParallel(groups=self.branches, **settings))
        if self.branches > 1:
            chosen.append(BranchParallel(self.branches))
        return chosen


@dataclass(frozen=True)
class Prediction:
    """What a candidate would cost.

    Attributes:
        latency_s: of all denoising steps of one picture.
        low_s, high_s: the band around it; equal to it where the machine was measured with so many devices.
        exposed: part of the latency spent waiting for others.
        step_bytes: received a rank in a steady step.
        memory_bytes: a rank's weights, activations and kept keys and values.
        fits: whether that is within the machine's memory.
    """

    candidate: Candidate
    latency_s: float
    low_s: float
    high_s: float
    exposed: float
    step_bytes: int
    memory_bytes: int
    fits: bool

    def __str__(self) -> str:
        label = (
            "measured speed" if self.low_s == self.high_s else f"prediction, {self.low_s:.3g} to {self.high_s:.3g} s"
        )
        size = f"{self.memory_bytes / 2**30:.2f} GiB" + ("" if self.fits else ", does not fit")
        return (
            f"{self.candidate.name:<24}{self.latency_s:>10.4g} s  ({label})  {self.exposed:>4.0%} waiting  "
            f"{self.step_bytes / 1e6:>9.2f} MB a step  {size}"
        )


@dataclass(frozen=True)
class Choice:
    """The best prediction, all of them (fastest first), and why."""

    best: Prediction
    predictions: tuple[Prediction, ...]
    reason: str

    def __str__(self) -> str:
        return "\n".join([self.reason, *(f"  {prediction}" for prediction in self.predictions)])


def predict(inventory: Inventory, machine: Machine, network: Network, candidate: Candidate, steps: int) -> Prediction:
    """Predict one candidate for a picture of `steps` steps.

    Args:
        inventory: of a forward with all guidance branches in its batch.
    """
    part = _branch(inventory, candidate.branches)
    computing = _computing(part, machine, candidate.strips)
    guidance = 0.0 if candidate.branches == 1 else _guidance(part, network, candidate)
    if candidate.strips == 1:
        talk_fresh = talk_steady = 0.0
        received = 0
    else:
        strips = _strips(part, candidate.strips)
        # the busiest rank decides: one with a neighbour on either side
        rank = candidate.strips // 2 - (candidate.strips == 2)
        portion = candidate.portion if candidate.policy == "partial" else None
        received = part.forward_bytes(strips, rank, portion)
        talk_fresh = _talk(part, network, candidate.strips, part.forward_bytes(strips, rank))
        talk_steady = _talk(part, network, candidate.strips, received)
    fresh = computing + talk_fresh + guidance
    # the output is gathered at once even when everything else may be late
    out = 0.0 if candidate.strips == 1 else _ends(part, network, candidate.strips)
    steady = fresh if candidate.policy == "sync" else max(computing + out, talk_steady) + guidance
    in_sync = steps if candidate.policy == "sync" or candidate.strips == 1 else min(steps, candidate.warmup + 1)
    latency = in_sync * fresh + (steps - in_sync) * steady
    kept = part.keys_and_values * part.item if candidate.policy != "sync" else 0
    memory = part.weights + part.activation // candidate.strips + kept
    known = candidate.ranks <= machine.measured
    return Prediction(
        candidate,
        latency,
        latency if known else latency * (1 + BAND[0]),
        latency if known else latency * (1 + BAND[1]),
        max(0.0, 1 - steps * computing / latency),
        received,
        memory,
        not machine.memory_bytes or memory <= machine.memory_bytes,
    )


def candidates(ranks: int, guided: bool, lossy: bool, steps: int) -> list[Candidate]:
    """Every way to use up to `ranks` ranks.

    Args:
        guided: the batch holds two guidance branches.
        lossy: also "stale" and "partial", which few-step models do not suit.
    """
    policies = ("sync", "stale", "partial") if lossy and steps > FEW_STEPS else ("sync",)
    found = []
    for branches in (1, 2) if guided else (1,):
        strips = 1
        while branches * strips <= ranks:
            found += [Candidate(branches, strips, policy) for policy in (policies if strips > 1 else ("sync",))]
            strips *= 2
    return found


def choose(
    inventory: Inventory, machine: Machine, network: Network, options: Sequence[Candidate], steps: int
) -> Choice:
    """Predict every candidate and choose the fastest that fits.

    Raises:
        MemoryError: none fits.
    """
    options = [option for option in options if _possible(inventory, option)]
    predictions = sorted(
        (predict(inventory, machine, network, option, steps) for option in options),
        # with equal times the fewer devices and the exact policy
        key=lambda one: (one.latency_s, one.candidate.ranks, one.candidate.policy != "sync"),
    )
    fitting = [one for one in predictions if one.fits]
    if not fitting:
        smallest = min(predictions, key=lambda one: one.memory_bytes)
        raise MemoryError(
            f"no plan fits {machine.memory_bytes / 2**30:.1f} GiB; the smallest, {smallest.candidate.name}, needs "
            f"{smallest.memory_bytes / 2**30:.1f} GiB a device"
        )
    best = fitting[0]
    alone = next((one for one in predictions if one.candidate.ranks == 1), best)
    times = alone.latency_s / best.latency_s
    link = network.name or f"{network.latency_s * 1e6:.0f} us and {network.bytes_per_s / 1e9:.1f} GB/s"
    reason = (
        f"{best.candidate.name}: predicted {times:.2f} times as fast as one device over {link}; "
        f"{best.exposed:.0%} of the time is waiting for other devices"
    )
    return Choice(best, tuple(predictions), reason)


def break_even(inventory: Inventory, machine: Machine, network: Network, candidate: Candidate) -> float:
    """Bytes per second at which a candidate's steady traffic just hides behind its computing; inf if it never does."""
    part = _branch(inventory, candidate.branches)
    strips = _strips(part, candidate.strips)
    portion = candidate.portion if candidate.policy == "partial" else None
    received = part.forward_bytes(strips, candidate.strips // 2 - (candidate.strips == 2), portion)
    gathers, neighbours = part.operations()
    starting = (gathers * math.ceil(math.log2(candidate.strips)) + neighbours) * network.latency_s
    spare = _computing(part, machine, candidate.strips) - starting
    return received / spare if spare > 0 else math.inf


def _branch(inventory: Inventory, branches: int) -> Inventory:
    """The inventory of one branch's share of the batch."""
    if branches == 1:
        return inventory
    return replace(
        inventory,
        sample=(inventory.sample[0] // branches, *inventory.sample[1:]),
        attentions=[replace(one, batch=one.batch // branches) for one in inventory.attentions],
        convolutions=[replace(one, values=one.values // branches) for one in inventory.convolutions],
        normalizations=[values // branches for values in inventory.normalizations],
        flops=inventory.flops // branches,
        output=inventory.output // branches,
        activation=inventory.activation // branches,
    )


def _strips(inventory: Inventory, count: int) -> Strips:
    rows = inventory.sample[-2]
    lowest = min([rows, *(one.rows for one in inventory.attentions), *(one.rows for one in inventory.convolutions)])
    return Strips.share(rows, [1.0] * count, -(-rows // lowest))


def _possible(inventory: Inventory, candidate: Candidate) -> bool:
    if inventory.sample[0] % candidate.branches:
        return False
    try:
        _strips(inventory, candidate.strips)
    except ValueError:
        return False
    return True


def _computing(part: Inventory, machine: Machine, strips: int) -> float:
    return part.flops * machine.factor(strips) / (strips * machine.flops_per_s) + machine.overhead_s


def _talk(part: Inventory, network: Network, strips: int, received: int) -> float:
    gathers, neighbours = part.operations()
    latencies = gathers * math.ceil(math.log2(strips)) + neighbours
    return latencies * network.latency_s + received / network.bytes_per_s


def _ends(part: Inventory, network: Network, strips: int) -> float:
    received = part.output_bytes(_strips(part, strips), 0)
    return 2 * math.ceil(math.log2(strips)) * network.latency_s + received / network.bytes_per_s


def _guidance(part: Inventory, network: Network, candidate: Candidate) -> float:
    stages = 2 * math.ceil(math.log2(candidate.branches))
    received = (candidate.branches - 1) * part.output * part.item
    return stages * network.latency_s + received / network.bytes_per_s
