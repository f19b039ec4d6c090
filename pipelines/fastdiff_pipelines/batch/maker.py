"""From items to pixels with a diffusers pipeline: load, accelerate, and call it with one CPU generator for each item.

Noise drawn on the CPU is the same for an item whatever device, rank or batch it lands in; the pipeline prepares the
latents row by row from the list of generators. So rows of a batch differ from lone calls only by the rounding of
kernels that take other routes at other batch sizes.
"""

import gc
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from fastdiff_pipelines.batch.errors import MODEL, PLAN, Broken, Cancelled, JobError, one_line
from fastdiff_pipelines.batch.items import Adapter, Item
from fastdiff_pipelines.batch.settings import Settings

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Made:
    """What one call gave.

    Attributes:
        pixels: for each item float [H, W, 3], or [F, H, W, 3] for a clip, in 0..1; may hold NaN.
        seconds: time spent in "encode", "denoise" and "decode", where the pipeline lets one see them.
        peak_bytes: most memory held: of the device, or of this process where the device is the CPU.
    """

    pixels: "list[np.ndarray]"
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


class Maker(Protocol):
    """Makes items of one bucket. Any exception means that none of them was made."""

    def __call__(self, items: Sequence[Item], is_aborted: Callable[[], bool]) -> Made: ...

    def relieve(self) -> str | None:
        """Takes the next measure that saves memory and names it; None when there is none left."""
        ...

    def restore(self) -> None:
        """Takes all measures back."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in ("out of memory", "can't allocate memory"))
    )


def is_broken(error: BaseException) -> bool:
    """Whether an exception leaves the device useless for this process."""
    text = str(error)
    return any(words in text for words in ("device-side assert", "illegal memory access", "unspecified launch failure"))


class DiffusersMaker:
    """Runs a pipeline under a plan.

    Args:
        model: a diffusers folder.
        plan: a `fastdiff.Plan`.
        device: "cpu", "cuda:0" and the like.
        dtype: "auto" or a torch type's name.

    Raises:
        JobError: the model cannot be loaded, or the plan cannot act on it.
    """

    def __init__(self, model: Path, plan: Any, device: str = "cpu", dtype: str = "auto"):
        import fastdiff

        self.plan, self.device = plan, device
        precision = {} if dtype == "auto" else {"dtype": _torch_type(dtype)}
        try:
            self.pipe: Any = fastdiff.load(str(model), device=device, **precision)
        except Exception as error:
            # what a damaged folder raises depends on which of its files is damaged
            raise JobError(MODEL, f"cannot load {model.name}: {one_line(error)}") from error
        self.pipe.set_progress_bar_config(disable=True)
        self._parameters = inspect.signature(type(self.pipe).__call__).parameters
        self._adapters: tuple[Adapter, ...] = ()
        self._measures: list[str] = []
        self.handle: Any = self._accelerated()

    def _accelerated(self) -> Any:
        import fastdiff

        try:
            return fastdiff.accelerate(self.pipe, self.plan)
        except (fastdiff.Unsupported, ValueError, TypeError) as error:
            raise JobError(PLAN, f"the plan does not fit this model: {one_line(error)}") from error

    def __call__(self, items: Sequence[Item], is_aborted: Callable[[], bool]) -> Made:
        import numpy as np

        self._wear(items[0].adapters)
        clock = _Clock(self.device, items[0].steps, is_aborted)
        arguments = self.arguments(items)
        if "callback_on_step_end" in self._parameters:
            arguments["callback_on_step_end"] = clock.step
        try:
            made = self.pipe(**arguments)
        except RuntimeError as error:
            if is_broken(error):
                raise Broken(one_line(error)) from error
            raise
        pixels = made.images if hasattr(made, "images") else made.frames
        if len(pixels) != len(items):
            raise RuntimeError(f"the pipeline gave {len(pixels)} outputs for {len(items)} prompts")
        return Made([np.asarray(one) for one in pixels], clock.finish(), _peak_bytes(self.device))

    def arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for items of one bucket.

        Raises:
            ValueError: the pipeline has no place for something the items ask for.
        """
        import torch

        first = items[0]
        found: dict[str, Any] = {
            "prompt": [item.prompt for item in items],
            "num_inference_steps": first.steps,
            "guidance_scale": first.guidance,
            "generator": [torch.Generator("cpu").manual_seed(item.seed or 0) for item in items],
            "output_type": "np",
        }
        if any(item.negative for item in items):
            found["negative_prompt"] = [item.negative for item in items]
        if first.height is not None:
            found |= {"height": first.height, "width": first.width}
        if first.frames is not None:
            found["num_frames"] = first.frames
        # a **kwargs counts for nothing: diffusers' pipelines have one for outdated names and ignore all others
        missing = [name for name in found if name not in self._parameters]
        if missing:
            raise ValueError(f"{type(self.pipe).__name__} takes no {' or '.join(missing)}")
        return found

    def _wear(self, adapters: tuple[Adapter, ...]) -> None:
        """Loads the LoRAs a bucket asks for; those of the bucket before leave the weights as they were."""
        if adapters == self._adapters:
            return
        # hooks hold modules that adapters replace, so they go first and come back after
        self.handle.remove()
        try:
            if self._adapters:
                self.pipe.unload_lora_weights()
            self._adapters = ()
            names = []
            for number, one in enumerate(adapters):
                names.append(f"adapter{number}")
                self._load_adapter(one, names[-1])
            if names:
                self.pipe.set_adapters(names, [one.scale for one in adapters])
            self._adapters = adapters
        except BaseException:
            if hasattr(self.pipe, "unload_lora_weights"):
                self.pipe.unload_lora_weights()
            raise
        finally:
            self.handle = self._accelerated()

    def _load_adapter(self, one: Adapter, name: str) -> None:
        if not hasattr(self.pipe, "load_lora_weights"):
            raise ValueError(f"{type(self.pipe).__name__} takes no LoRA")
        path = Path(one.source)
        try:
            if path.is_dir():
                self.pipe.load_lora_weights(str(path), adapter_name=name)
            else:
                self.pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        except Exception as error:
            # a damaged or foreign file raises whatever its reader stumbles over
            raise ValueError(f"cannot use the adapter {path.name}: {one_line(error)}") from error

    def relieve(self) -> str | None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        vae: Any = getattr(self.pipe, "vae", None)
        if "tiled decoding" not in self._measures and hasattr(vae, "enable_tiling"):
            vae.enable_tiling()
            if hasattr(vae, "enable_slicing"):
                vae.enable_slicing()
            self._measures.append("tiled decoding")
        elif "offloading" not in self._measures and self.device.startswith("cuda"):
            self.pipe.enable_model_cpu_offload(device=self.device)
            self._measures.append("offloading")
        else:
            return None
        return self._measures[-1]

    def restore(self) -> None:
        if "offloading" in self._measures:
            self.pipe.remove_all_hooks()
            self.pipe.to(self.device)
        if "tiled decoding" in self._measures:
            self.pipe.vae.disable_tiling()
            if hasattr(self.pipe.vae, "disable_slicing"):
                self.pipe.vae.disable_slicing()
        self._measures.clear()


def load(settings: Settings, device: str) -> DiffusersMaker:
    """The model of a job on a device, with the job's threads.

    Raises:
        JobError: it cannot be loaded, or the plan is none.
    """
    import torch
    from diffusers.utils import logging

    from fastdiff import Plan

    logging.set_verbosity_error()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    common = settings.common
    try:
        plan = Plan.from_json(common.plan) if common.plan else Plan()
    except ValueError as error:
        raise JobError(PLAN, one_line(error)) from error
    return DiffusersMaker(Path(settings.model), plan, device, common.dtype)


class _Clock:
    """Splits a call's time at the ends of its steps, and stops it there when asked to."""

    def __init__(self, device: str, steps: int, is_aborted: Callable[[], bool]):
        self.device, self.steps, self.is_aborted = device, steps, is_aborted
        self.start = perf_counter()
        self.ends: list[float] = []

    def step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.is_aborted():
            raise Cancelled
        if self.device.startswith("cuda") and index in (0, self.steps - 1):
            import torch

            torch.cuda.synchronize(self.device)
        self.ends.append(perf_counter())
        return tensors

    def finish(self) -> dict[str, float]:
        """The first step is taken to be as long as the others on average; what lies before it is encoding."""
        now = perf_counter()
        if len(self.ends) < 2:
            return {"call": now - self.start}
        per_step = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        encode = max(0.0, self.ends[0] - self.start - per_step)
        return {"encode": encode, "denoise": self.ends[-1] - self.start - encode, "decode": now - self.ends[-1]}


def _torch_type(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise JobError(PLAN, f"no precision is called {name!r}; take auto, float32, float16 or bfloat16")
    return found


def _peak_bytes(device: str) -> int | None:
    import torch

    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
    except ImportError:
        return None
    import sys

    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
