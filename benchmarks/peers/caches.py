"""Other people's caches for a UNet, at settings that take as long as something else does.

DeepCache keeps its outermost branch, whose cached steps are its cheapest. cache-dit has no adapter for UNets.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.peers.pipelines import PeerFailed, PipelinePeer

Draw = Callable[[list[str], list[int]], tuple[Tensor, float]]
Probe = tuple[list[str], list[int]]


def started(stack: ExitStack, name: str, pipe: Any) -> PipelinePeer | str:
    """A peer's process with a copy of the pipeline, or why there is none."""
    try:
        return stack.enter_context(PipelinePeer(name, pipe))
    except (OSError, ChildProcessError) as error:
        return str(error)


def quickest(draw: Draw, probe: Probe, times: int = 2) -> float:
    """Least milliseconds that these pictures took."""
    return min(draw(*probe)[1] for _ in range(times))


@dataclass
class DeepCache:
    """DeepCache 0.1.1.

    Attributes:
        probe: prompts and seeds that settings are found with; they are not measured afterwards.
        whole, cached: milliseconds of a whole and of a cached step of all of the probe.
        note: why it cannot run; empty where it can.
    """

    peer: PipelinePeer | None
    steps: int
    guidance: float
    probe: Probe
    whole: float = 0.0
    cached: float = 0.0
    note: str = ""

    @classmethod
    def measured(cls, peer: PipelinePeer | str, steps: int, guidance: float, probe: Probe) -> "DeepCache":
        """Times it with every step whole and with one."""
        if isinstance(peer, str):
            return cls(None, steps, guidance, probe, note=peer)
        found = cls(peer, steps, guidance, probe)
        try:
            whole, least = (quickest(found.draw_with(interval), probe) for interval in (1, steps))
        except (PeerFailed, ChildProcessError) as error:
            return cls(None, steps, guidance, probe, note=str(error)[:200])
        found.whole = whole / steps
        found.cached = (least - found.whole) / (steps - 1)
        return found

    def draw_with(self, interval: int) -> Draw:
        """Its pictures with every so many steps whole."""
        settings = {"cache_interval": interval, "cache_branch_id": 0}
        assert self.peer is not None
        draw = self.peer.draw
        return lambda some, noise: draw(some, noise, self.steps, self.guidance, settings)

    def taken(self, interval: int) -> float:
        """Expected milliseconds of the probe."""
        computed = -(-self.steps // interval)
        return computed * self.whole + (self.steps - computed) * self.cached

    def nearest(self, goal: float, tolerance: float) -> tuple[Draw | None, str]:
        """Its pictures at the interval that comes nearest to `goal` milliseconds of the probe, and what was chosen.

        Of the four intervals expected nearest, the one that was when it ran.
        """
        if self.note:
            return None, self.note
        expected = {-(-self.steps // interval): interval for interval in range(self.steps, 1, -1)}
        near = sorted(expected.values(), key=lambda interval: abs(self.taken(interval) - goal))[:4]
        if self.taken(near[0]) > goal * (1 + 4 * tolerance):
            most = self.taken(1) / self.taken(self.steps)
            return None, f"not reachable: at most {most:.2f} times faster, with one step of all computed whole"
        times = {interval: quickest(self.draw_with(interval), self.probe) for interval in near}
        interval = min(times, key=lambda one: abs(times[one] - goal))
        return self.draw_with(interval), f"interval {interval}, branch 0"


def cache_dit(pipe: Any, steps: int, guidance: float) -> str:
    """What cache-dit says to a UNet."""
    with ExitStack() as stack:
        peer = started(stack, "cache-dit", pipe)
        if isinstance(peer, str):
            return peer
        try:
            peer.draw(["a red circle"], [0], 4, guidance, {})
        except (PeerFailed, ChildProcessError) as error:
            longest = _longest_list(pipe.unet)
            own = f"a BlockAdapter takes lists of transformer blocks, and this UNet's hold {longest} each"
            return f"not reachable: {str(error)[:160]} ({own}, of which the first is always computed)"
    return f"not reachable: it accepts the UNet and leaves all {steps} steps in"


def _longest_list(unet: Any) -> int:
    return max(len(part.transformer_blocks) for part in unet.modules() if hasattr(part, "transformer_blocks"))
