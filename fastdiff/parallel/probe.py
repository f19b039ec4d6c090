"""Ten seconds of measuring: links between ranks, speed of this device on whole pictures and on strips, free memory."""

import statistics
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from fastdiff.parallel.clock import Network
from fastdiff.parallel.communicator import Communicator
from fastdiff.parallel.cost import Machine
from fastdiff.parallel.inventory import Inventory
from fastdiff.parallel.patch import granularity


@dataclass(frozen=True)
class Probe:
    """What was measured, for `cost.choose`."""

    machine: Machine
    network: Network | None


def probe(
    denoiser: Any, arguments: dict[str, Any], inventory: Inventory, communicator: Communicator, budget_s: float = 10
) -> Probe:
    """Measure this machine; every rank of the group calls it.

    Strips are run alone, without neighbours, which is how their speed can be known on a single device.

    Args:
        denoiser: the model, where it will run.
        arguments: of its forward, the sample ([B, C, h, w]) first.
        inventory: of the same forward.
        budget_s: measuring stops beginning new runs after this.
    """
    began = perf_counter()
    name, sample = next(iter(arguments.items()))
    whole_s = _forward_s(denoiser, arguments)
    factors, multiple = [], granularity(denoiser)
    ranks = 2
    while ranks <= 8 and sample.shape[-2] % (ranks * multiple) == 0 and perf_counter() - began < budget_s / 2:
        rows = sample.shape[-2] // ranks
        strip_s = _forward_s(denoiser, {**arguments, name: sample[..., :rows, :].contiguous()})
        # attention of a strip alone sees fewer keys than it will, so its share of the whole is corrected by the counts
        factors.append((ranks, max(1.0, ranks * strip_s / whole_s * _missing(inventory, ranks))))
        ranks *= 2
    machine = Machine(inventory.flops / whole_s, 0.0, free_memory(sample.device), tuple(factors), communicator.size)
    return Probe(machine, None if communicator.size == 1 else link(communicator, budget_s / 3))


def link(communicator: Communicator, budget_s: float = 3, large: int = 4_000_000) -> Network:
    """Fit latency and bandwidth of gathers among all ranks from small and large ones; medians of up to 20."""
    import math

    small_s = _gather_s(communicator, 1, budget_s / 2)
    large_s = _gather_s(communicator, large, budget_s / 2)
    stages = math.ceil(math.log2(communicator.size))
    received = (communicator.size - 1) * large
    measured = torch.tensor([small_s / stages, received / max(1e-9, large_s - small_s)], dtype=torch.float64)
    parts = communicator.gather("probe", measured).wait()
    # all ranks must choose alike, so all use rank 0's figures
    latency, bandwidth = (float(value) for value in parts[0])
    return Network(latency, bandwidth, "measured here")


def free_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device; 0, meaning unknown, elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _missing(inventory: Inventory, ranks: int) -> float:
    """FLOP of a strip with all keys over FLOP of a strip alone."""
    # queries times keys and weights times values: 4 operations per pair and channel, half of `channels` each
    scores = sum(2 * one.batch * (one.rows * one.width) ** 2 * one.channels for one in inventory.attentions)
    return inventory.flops / max(1, inventory.flops - scores * (1 - 1 / ranks))


@torch.no_grad()
def _forward_s(denoiser: Any, arguments: dict[str, Any], repeats: int = 3) -> float:
    denoiser(**arguments)
    times = []
    for _ in range(repeats):
        _finish()
        began = perf_counter()
        denoiser(**arguments)
        _finish()
        times.append(perf_counter() - began)
    return statistics.median(times)


def _gather_s(communicator: Communicator, size: int, budget_s: float) -> float:
    tensor = torch.zeros(size, dtype=torch.uint8, device=communicator.device)
    times: list[float] = []
    for _ in range(20):
        began = perf_counter()
        communicator.gather("probe", tensor).wait()
        _finish()
        times.append(perf_counter() - began)
        # ranks stop together or not at all
        if max(communicator.agree(int(sum(times) > budget_s))):
            break
    return statistics.median(times)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
