"""Pipelines of the page's other tabs: apart from the live one, loaded when first needed, one picture at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np

from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.failures import Failure, one_line
from fastdiff_app.generate import native_size
from fastdiff_app.images import fitted
from fastdiff_app.methods import to_bytes


class Studio:
    """Pipelines for pictures that are not live.

    Args:
        name: as `fastdiff_app.engine.load_pipeline` takes it.
        plan: applied to the accelerated ones.
    """

    def __init__(self, name: str | None, plan: str | None):
        self.name, self.plan = name, plan
        self._pipes: dict[tuple[str, bool], tuple[Any, Any]] = {}
        self._lock = threading.Lock()

    def pipe(self, task: str, fast: bool) -> tuple[Any, str]:
        """A pipeline and what was engaged on it; plain diffusers where not `fast`."""
        key = task, fast
        if key not in self._pipes:
            made = load_pipeline(self.name, task)
            handle = None
            if fast:
                handle = accelerated(made, read_plan(self.plan))
                self._pipes[key] = made, (handle, handle.__enter__())
            else:
                self._pipes[key] = made, None
        made, held = self._pipes[key]
        return made, "" if held is None else str(held[1].report())

    def steps(self, fast: bool = True, **asked: Any) -> Iterator[tuple[int, np.ndarray | None, float]]:
        """A picture in the making: (step, picture so far or None, seconds), the last one finished.

        Raises:
            Failure: the model refuses what is asked.
        """
        with self._lock:
            task = "image-to-image" if asked.get("image") is not None else "text-to-image"
            pipe, _ = self.pipe(task, fast)
            yield from _run(pipe, asked)

    def finished(self, fast: bool, **asked: Any) -> tuple[np.ndarray, float]:
        """The picture uint8 ``[H, W, 3]`` and the seconds it took."""
        *_, (_, picture, seconds) = self.steps(fast, preview=False, **asked)
        assert picture is not None
        return picture, seconds


def _run(pipe: Any, asked: dict[str, Any]) -> Iterator[tuple[int, np.ndarray | None, float]]:
    import torch

    preview = asked.pop("preview", True)
    seed, image = int(asked.pop("seed")), asked.pop("image", None)
    options = {**asked, "generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
    if image is not None:
        from PIL import Image

        options["image"] = fitted(Image.fromarray(image), *native_size(pipe))
    else:
        options.pop("strength", None)
    found: queue.Queue[Any] = queue.Queue()
    started = perf_counter()

    def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        shown = None
        if preview and "latents" in values and hasattr(pipeline, "vae"):
            with torch.no_grad():
                latents = values["latents"][:1] / float(getattr(pipeline.vae.config, "scaling_factor", None) or 1.0)
                pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0][0]
            shown = to_bytes((pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        found.put((step + 1, shown, perf_counter() - started))
        return values

    def work() -> None:
        try:
            made = pipe(**options, callback_on_step_end=after).images[0]
            found.put((-1, to_bytes(made), perf_counter() - started))
        except Exception as error:
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while True:
        one = found.get()
        if isinstance(one, Exception):
            raise Failure(2, one_line(one)) from one  # type: ignore[arg-type]
        yield one
        if one[0] == -1:
            thread.join()
            return
