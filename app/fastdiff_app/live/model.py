"""The model behind the page: loaded once, streams made of it for every viewer, its ladder measured on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.generate import native_size
from fastdiff_app.video_models import makes_video
from fastdiff_pipelines.live import Budget, Controls, DeadlineController, IdentityStream, LiveLora, Rung, measure
from fastdiff_pipelines.settings import Settings

if TYPE_CHECKING:
    from fastdiff import Plan

IDENTITY = "identity"
IDENTITY_SIZE = (512, 512)
CHEAPEST = "fast"
NO_REPLAY = "a video model keeps a target by the clock, so no replay would give the same pictures"


@dataclass
class LiveModel:
    """A model for live sessions; a context manager, inside of which its plan is applied.

    Attributes:
        name: a hub id or a folder, "identity", or None for the embedded miniature.
        settings: what viewers get at first.
        size: (height, width), or None for the model's own.
        target_ms: age that pictures should not exceed; None leaves settings alone.
        interval_ms: from one frame of the camera to the next.
        compile, strict: of the plan, as `read_plan` and `accelerated` take them.
    """

    name: str | None
    settings: Settings
    plan: str | None = None
    size: tuple[int, int] | None = None
    target_ms: float | None = None
    interval_ms: float = 1000 / 30
    compile: bool | None = None
    strict: bool = False
    pipe: Any = None
    lora: LiveLora | None = None
    report: str = ""
    rungs: tuple[Rung, ...] = ()
    rollout: Any = None
    _held: ExitStack = field(default_factory=ExitStack)
    _others: dict[str, Any] = field(default_factory=dict)
    _costs: dict[tuple[int, int], Any] = field(default_factory=dict)
    _measured: dict[Any, tuple[Any, np.ndarray]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or "mini-sd, the embedded miniature"

    def __enter__(self) -> LiveModel:
        plan = read_plan(self.plan, self.compile)
        if self.name == IDENTITY:
            self.size = self.size or IDENTITY_SIZE
            return self
        # what fails on the way in is never left, so it undoes itself
        with self._held as held:
            self._enter(plan)
            self._held = held.pop_all()
        return self

    @property
    def replays(self) -> bool:
        """Whether a recorded session can be run again to the same pictures."""
        return self.rollout is None or self.target_ms is None

    def _enter(self, plan: Plan) -> None:
        self._held.callback(self._others.clear)
        self._held.callback(self._measured.clear)
        self._held.callback(self._costs.clear)
        self.pipe = load_pipeline(self.name, "image-to-image")
        if any(hasattr(one, "lora_A") for one in self.pipe.unet.modules()) if hasattr(self.pipe, "unet") else False:
            self.lora = LiveLora(self.pipe.unet)
        self._held.enter_context(a_processor_left(self.pipe))
        handle = self._held.enter_context(accelerated(self.pipe, plan, self.strict))
        self.report = str(handle.report())
        self.size = self.size or native_size(self.pipe)
        if makes_video(self.pipe):
            from fastdiff_pipelines.rollout import ChunkRollout

            self.rollout = self._held.enter_context(ChunkRollout(self.pipe, height=self.size[0], width=self.size[1]))
        # a plan or a model that cannot stream says so now and not to the first viewer
        self.open()
        if self.target_ms is not None and self.rollout is None:
            self.rungs = worthwhile(measure(self.ladder(), self._timed), self.interval_ms)

    def __exit__(self, *_: Any) -> None:
        self._held.close()

    def open(self, scale: float = 1.0, plan: str | None = None) -> Any:
        """A new stream at a share of the size."""
        from fastdiff_pipelines import Stream

        assert self.size is not None
        height, width = (max(16, round(side * scale / 8) * 8) for side in self.size)
        if self.name == IDENTITY:
            return IdentityStream(height, width)
        if self.rollout is not None:
            return self._video(height, width)
        made = Stream(self._planned(plan), self.settings.prompt, height=height, width=width, **self.options())
        made.warmup()
        return made

    def _video(self, height: int, width: int) -> Any:
        """A stream of a video model; with a target it keeps up with the camera by steps and chunks."""
        from fastdiff_pipelines.rollout import ChunkRollout, VideoStream
        from fastdiff_pipelines.rollout.slo import SloScheduler, Target, measured_costs

        assert self.rollout is not None
        rollout = self.rollout
        if (height, width) != (rollout.height, rollout.width):
            rollout = ChunkRollout(self.pipe, height=height, width=width, causal=rollout.causal)
        scheduler = None
        if self.target_ms is not None:
            fps = 1000 / self.interval_ms
            steps = tuple(range(1, self.settings.steps + 1))
            target = Target(self.target_ms, fps=fps, source_fps=fps)
            # once for each size, before anybody came: beside a viewer's frames calls would seem slower than they are
            if (height, width) not in self._costs:
                self._costs[height, width] = measured_costs(rollout)
            scheduler = SloScheduler(self._costs[height, width], target, steps=steps, chunks=(1,))
        made = VideoStream(rollout, self.settings, scheduler)
        made.warmup()
        return made

    def _planned(self, plan: str | None) -> Any:
        """The pipeline under another plan than the one asked for: one of its own, as plans change pipelines."""
        if plan is None:
            return self.pipe
        if plan not in self._others:
            made = load_pipeline(self.name, "image-to-image")
            # what reuses a denoiser call cannot act on a stream, whose every call holds other frames
            cheap = read_plan(plan, self.compile)
            cheap = replace(cheap, accelerations=[member for member in cheap if member.stage != "blocks"])
            self._held.enter_context(accelerated(made, cheap))
            self._others[plan] = made
        return self._others[plan]

    @property
    def conditions(self) -> list[str]:
        """The pictures that frames can follow besides their own: "control", "image_prompt"."""
        found = ["control"] if getattr(self.pipe, "controlnet", None) is not None else []
        adapted = getattr(getattr(self.pipe, "unet", None), "encoder_hid_proj", None) is not None
        return found + (["image_prompt"] if adapted else [])

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a stream with the settings viewers get at first."""
        names = ("negative_prompt", "steps", "strength", "guidance", "guidance_scale", "sampler", "noise", "seed")
        return {name: getattr(self.settings, name) for name in names}

    def controls(self) -> Controls:
        """New controls for a viewer."""
        return Controls(self.settings, self.lora.scales if self.lora is not None else None)

    def controller(self) -> DeadlineController | None:
        """A new controller for a viewer; None where no target was asked for."""
        if self.target_ms is None or not self.rungs:
            return None
        return DeadlineController(self.rungs, Budget(self.target_ms, self.interval_ms))

    def ladder(self) -> list[Rung]:
        """From the settings as asked for to the cheapest still wanted; costs are yet to be measured."""
        steps = self.settings.steps
        found = [Rung("as asked", drops=False, depth=steps), Rung("drop late frames", depth=steps)]
        found.append(Rung("skip still scenes", {"similarity": 0.98}, depth=steps))
        fewer = [count for count in (3, 2, 1) if count < steps]
        found += [Rung(f"{k} steps", {"similarity": 0.98, "steps": k}, depth=k) for k in fewer]
        last = fewer[-1] if fewer else steps
        small = {"similarity": 0.98, "steps": last, "scale": 0.5}
        found.append(Rung("half size", small, depth=last))
        # adapters that move live are in the weights of one pipeline only
        if self.plan != CHEAPEST and self.lora is None and self.name != IDENTITY:
            found.append(Rung(f"half size, plan {CHEAPEST}", {**small, "plan": CHEAPEST}, depth=last))
        return found

    def _timed(self, rung: Rung) -> float:
        """One full push at a rung."""
        key = (rung.changes.get("scale", 1.0), rung.changes.get("steps"), rung.changes.get("plan"))
        cache = self._measured
        if key not in cache:
            stream = self.open(key[0], key[2])
            if key[1]:
                stream.update(steps=key[1])
            rng = np.random.default_rng(0)
            frame = rng.integers(0, 255, (*stream.size, 3), dtype=np.uint8)
            for _ in range(rung.depth):
                stream.push(frame)
            cache[key] = stream, frame
        stream, frame = cache[key]
        started = perf_counter()
        stream.push(frame)
        return (perf_counter() - started) * 1000


@contextmanager
def a_processor_left(pipe: Any) -> Iterator[None]:
    """Let a model on the CPU have one processor fewer than there are, within the block.

    Its threads wait for each other by spinning, so whatever takes a processor for a moment (a socket, a picture's
    packing, a browser) holds all of them up, and a live model is never alone.
    """
    import torch

    before = torch.get_num_threads()
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if getattr(getattr(pipe, "device", None), "type", "cpu") == "cpu":
        torch.set_num_threads(min(before, max(1, there - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worthwhile(rungs: Sequence[Rung], interval_ms: float) -> tuple[Rung, ...]:
    """The rungs without those that gave something up and, as measured, brought no time for it.

    Rungs that change nothing but what is dropped or skipped cost the same by design, and stay.
    """
    kept: list[Rung] = []
    for rung in rungs:
        gives_up = bool(rung.changes.keys() - {"similarity"})
        if kept and gives_up and rung.inside_ms(1.0, interval_ms) > 0.95 * kept[-1].inside_ms(1.0, interval_ms):
            continue
        kept.append(rung)
    return tuple(kept)
