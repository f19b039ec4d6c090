"""The ledgers of all sessions as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from fastdiff_app.live.server import Live

SINGLE = {
    "fps": "Frames shown a second",
    "jitter_ms": "Mean difference of one frame's age from the next one's",
    "first_frame_ms": "From the session's start to the first frame shown",
    "prompt_to_pixel_frames": "Most frames shown until a new prompt was seen",
    "energy_j_per_frame": "Joules of the accelerators by their driver",
}


def exposition(live: Live) -> bytes:
    """The text of `/metrics`; sessions are numbered by age and carry no name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(live))  # type: ignore[arg-type]
    return generate_latest(registry)


class _Collector:
    def __init__(self, live: Live):
        self.live = live

    def collect(self) -> Iterator[Any]:
        summaries = [session.ledger.summary() for session in self.live.worker.sessions]
        yield GaugeMetricFamily("fastdiff_viewers", "People connected", value=len(summaries))
        yield CounterMetricFamily("fastdiff_refused", "Connections refused because all places were taken",
                                  value=self.live.refused)  # fmt: skip
        shown = CounterMetricFamily("fastdiff_frames_shown", "Frames shown", labels=["session"])
        taken = CounterMetricFamily("fastdiff_frames_in", "Frames that came", labels=["session"])
        dropped = CounterMetricFamily("fastdiff_frames_dropped", "Frames not shown", labels=["session", "cause"])
        ages = GaugeMetricFamily("fastdiff_age_ms", "Age of frames when shown", labels=["session", "quantile"])
        stages = GaugeMetricFamily("fastdiff_stage_ms", "Time in a stage", labels=["session", "stage", "quantile"])
        missed = CounterMetricFamily("fastdiff_deadlines_missed", "Frames older than asked", labels=["session"])
        single = {key: GaugeMetricFamily(f"fastdiff_{key}", said, labels=["session"]) for key, said in SINGLE.items()}
        for number, found in enumerate(summaries):
            name = str(number)
            shown.add_metric([name], found["frames"]["shown"])
            taken.add_metric([name], found["frames"]["in"])
            for cause, count in found["frames"]["dropped"].items():
                dropped.add_metric([name, cause], count)
            for quantile, value in (found["age_ms"] or {}).items():
                ages.add_metric([name, quantile], value)
            for stage, spread in found["stages_ms"].items():
                for quantile, value in spread.items():
                    stages.add_metric([name, stage, quantile], value)
            for key, family in single.items():
                if found[key] is not None:
                    family.add_metric([name], found[key])
            if found["deadline"]:
                missed.add_metric([name], found["deadline"]["missed"])
        yield from (shown, taken, dropped, ages, stages, missed, *single.values())
