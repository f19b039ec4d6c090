"""What a session does to keep its target, in plain values: what is in force, whether it suffices, and what changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastdiff_pipelines.live.controller import DeadlineController


def pace(controller: DeadlineController | None, stream: Any, steps: int) -> dict[str, Any] | None:
    """Of the controller of an image model or the scheduler of a video stream; None where nobody keeps a target.

    Args:
        steps: what was asked for, which a scheduler's choice is compared with.
    """
    if controller is not None:
        decisions = [asdict(one) for one in list(controller.decisions)]
        return {"now": controller.rung.name, "fits": controller.fits, "decisions": decisions}
    scheduler = getattr(stream, "scheduler", None)
    if scheduler is None:
        return None
    choice = scheduler.choice
    now = "as asked" if choice.steps >= steps else f"{choice.steps} of {steps} steps"
    return {
        "now": now if choice.fits else f"{now}, too slow for the target",
        "fits": choice.fits,
        "choice": asdict(choice),
        "decisions": [asdict(one) for one in list(scheduler.decisions)],
    }
