"""How long a recorded exchange would take: a start-up time and a bandwidth per link, a speed per device."""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One thing a rank did: "compute" so many `flops`, "start" an operation, "wait" for an earlier one.

    Attributes:
        flops: floating-point operations, for "compute".
        sends: destination rank to bytes, for "start".
        receives: source ranks, for "start".
        group: which group the operation belongs to; order is kept within it.
        everybody: a gather among all ranks rather than an exchange between some.
        operation: the position of the "start" event, for "wait".
    """

    sort: str
    flops: int = 0
    sends: Mapping[int, int] = field(default_factory=dict)
    receives: tuple[int, ...] = ()
    group: str = ""
    everybody: bool = False
    operation: int = 0


@dataclass(frozen=True)
class Network:
    """A link: `latency_s` a message or gather stage (alpha), `bytes_per_s` out of each rank (beta)."""

    latency_s: float
    bytes_per_s: float
    name: str = ""


NETWORKS = {
    "nvlink3": Network(15e-6, 200e9, "NVLink 3"),
    "nvlink4": Network(12e-6, 300e9, "NVLink 4"),
    "pcie4": Network(20e-6, 12e9, "PCIe 4 x16"),
    "ethernet100": Network(30e-6, 10e9, "100 Gb/s RoCE"),
    "ethernet25": Network(60e-6, 2.5e9, "25 Gb/s Ethernet"),
    "loopback": Network(200e-6, 1.5e9, "gloo on one machine"),
}
"""Effective figures per rank, to be replaced by a probe where the hardware is at hand."""


def replay(events: Sequence[Sequence[Event]], network: Network, flops_per_s: float | Sequence[float]) -> list[float]:
    """Return when each rank would finish, in seconds, given its recorded events.

    An operation begins when its sender is free to send (a rank sends one after another), takes `latency_s` (a gather
    among n ranks: ceil(log2 n) of them) and bytes / `bytes_per_s`, and overlaps with computation until somebody waits.

    Args:
        events: per rank, as `simulator.Run.events` holds them.
        network: the links.
        flops_per_s: speed of all ranks, or of each.
    """
    ranks = len(events)
    speeds = [flops_per_s] * ranks if isinstance(flops_per_s, int | float) else list(flops_per_s)
    clock, free, place = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    arrivals: dict[tuple[str, int, int], deque[float]] = defaultdict(deque)
    due: list[dict[int, list[float]]] = [{} for _ in range(ranks)]
    expected: list[dict[int, Event]] = [{} for _ in range(ranks)]
    ready = [(0.0, rank) for rank in range(ranks)]
    heapq.heapify(ready)
    blocked: set[int] = set()
    while ready:
        _, rank = heapq.heappop(ready)
        while place[rank] < len(events[rank]):
            event = events[rank][place[rank]]
            if event.sort == "compute":
                clock[rank] += event.flops / speeds[rank]
            elif event.sort == "start":
                free[rank] = _send(event, rank, max(clock[rank], free[rank]), network, arrivals)
                expected[rank][place[rank]] = event
                for other in blocked:
                    heapq.heappush(ready, (clock[other], other))
                blocked.clear()
            else:
                if not _receive(rank, event.operation, expected[rank], due[rank], arrivals):
                    blocked.add(rank)
                    break
                clock[rank] = max([clock[rank], *due[rank].pop(event.operation)])
            place[rank] += 1
    if blocked:
        raise ValueError(f"ranks {sorted(blocked)} wait for messages that were never sent; the record is incomplete")
    return clock


def _send(event: Event, rank: int, leave: float, network: Network, arrivals: dict) -> float:
    stages = math.ceil(math.log2(len(event.sends) + 1)) if event.everybody else 1
    leave += stages * network.latency_s
    whole = leave + sum(event.sends.values()) / network.bytes_per_s
    for destination, size in event.sends.items():
        leave += size / network.bytes_per_s
        # a gather is over when all of it is
        arrivals[event.group, rank, destination].append(whole if event.everybody else leave)
    return whole


def _receive(
    rank: int, operation: int, expected: dict[int, Event], due: dict[int, list[float]], arrivals: dict
) -> bool:
    """Assign arrivals to this rank's operations in the order they were started, up to `operation`."""
    for number in sorted(expected):
        event = expected[number]
        queues = [arrivals[event.group, source, rank] for source in event.receives]
        if not all(queues):
            return False
        due[number] = [queue.popleft() for queue in queues]
        del expected[number]
        if number == operation:
            break
    return operation in due
