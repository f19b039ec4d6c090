"""The model behind the page: loaded once, streams made of it for every viewer, its ladder measured on this machine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.generate import native_size
from fastdiff_pipelines.live import Budget, Controls, DeadlineController, IdentityStream, LiveLora, Rung, measure
from fastdiff_pipelines.settings import Settings

IDENTITY = "identity"
IDENTITY_SIZE = (512, 512)


@dataclass
class LiveModel:
    """A model for live sessions; a context manager, inside of which its plan is applied.

    Attributes:
        name: a hub id or a folder, "identity", or None for the embedded miniature.
        settings: what viewers get at first.
        size: (height, width), or None for the model's own.
        target_ms: age that pictures should not exceed; None leaves settings alone.
    """

    name: str | None
    settings: Settings
    plan: str | None = None
    size: tuple[int, int] | None = None
    target_ms: float | None = None
    interval_ms: float = 1000 / 30
    pipe: Any = None
    lora: LiveLora | None = None
    report: str = ""
    rungs: tuple[Rung, ...] = ()
    _held: ExitStack = field(default_factory=ExitStack)

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or "mini-sd, the embedded miniature"

    def __enter__(self) -> LiveModel:
        if self.name == IDENTITY:
            self.size = self.size or IDENTITY_SIZE
            return self
        self.pipe = load_pipeline(self.name, "image-to-image")
        if any(hasattr(one, "lora_A") for one in self.pipe.unet.modules()) if hasattr(self.pipe, "unet") else False:
            self.lora = LiveLora(self.pipe.unet)
        handle = self._held.enter_context(accelerated(self.pipe, read_plan(self.plan)))
        self.report = str(handle.report())
        self.size = self.size or native_size(self.pipe)
        if self.target_ms is not None:
            self.rungs = measure(self.ladder(), self._timed)
        return self

    def __exit__(self, *_: Any) -> None:
        self._held.close()

    def open(self, scale: float = 1.0, plan: str | None = None) -> Any:
        """A new stream at a share of the size."""
        from fastdiff_pipelines import Stream

        assert self.size is not None
        height, width = (max(16, round(side * scale / 8) * 8) for side in self.size)
        if self.name == IDENTITY:
            return IdentityStream(height, width)
        made = Stream(self.pipe, self.settings.prompt, height=height, width=width, **self.options())
        made.warmup()
        return made

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
        found.append(Rung("half size", {"similarity": 0.98, "steps": last, "scale": 0.5}, depth=last))
        return found

    def _timed(self, rung: Rung) -> float:
        """One full push at a rung."""
        key = (rung.changes.get("scale", 1.0), rung.changes.get("steps"))
        cache = self.__dict__.setdefault("_measured", {})
        if key not in cache:
            stream = self.open(key[0])
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
