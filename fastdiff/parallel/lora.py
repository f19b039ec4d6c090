"""A LoRA that is fetched while the first steps run, and switched in at a fixed step (SwiftDiffusion's bounded async
loading, Li et al. 2024, arXiv 2407.02031, made repeatable: *when* it takes effect depends on a setting, not on a disk).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks

_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))


@dataclass(frozen=True)
class LateLora(Acceleration):
    """Fetch a LoRA in the background and switch it into the denoiser's weights at the beginning of one step.

    The switch waits for the fetch if it must, so the picture never depends on how long that took. At the end of each
    request the weights are put back from a copy, bit for bit; the report says at which step the switch was made and
    whether it had to wait.

    Args:
        path: a `.safetensors` file, or a folder holding one.
        step: how many denoiser calls run on the plain weights; 0 switches before the first.
        scale: factor on the LoRA.
    """

    stage: ClassVar[str] = "devices"

    path: str = ""
    step: int = 2
    scale: float = 1.0

    def __post_init__(self):
        check_number(type(self).__name__, "step", self.step, 0, whole=True)
        check_number(type(self).__name__, "scale", self.scale, -100, 100)

    @property
    def exact(self) -> bool:
        """Bit-equal to having the weights at hand and switching them at the same step."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        if not hasattr(pipe, "lora_state_dict"):
            return Verdict(False, f"{type(pipe).__name__} reads no LoRA files")
        if not Path(self.path).exists() or not self.path:
            return Verdict(False, f"{self.path or 'the empty path'} is no file or folder; give the path of a LoRA")
        if len(anatomy(pipe).denoisers) > 1:
            return Verdict(False, "this pipeline has several denoisers, and a file does not say which one it is for")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        name, denoiser = next(iter(anatomy(pipe).denoisers.items()))
        switch = _Switch(self, lambda: self.read(pipe, name), denoiser, hooks)
        hooks.wrap(denoiser, "forward", switch)
        hooks.override(pipe, "__call__", switch.around_call)
        hooks.on_undo(switch.restore)

    def read(self, pipe: Any, denoiser: str) -> dict[str, Tensor]:
        """Read the file; called in a thread of its own.

        Returns:
            Names of the denoiser's layers to what is added to their weights (float32), before `scale`.

        Raises:
            Unsupported: the file also changes a text encoder, which has run before any step.
        """
        state = pipe.lora_state_dict(self.path)
        state, alphas = state if isinstance(state, tuple) else (state, None)
        others = sorted(key for key in state if not key.startswith(denoiser + "."))
        if others:
            raise Unsupported(
                f"{self.path} also changes {others[0].split('.')[0]}, which runs before the first step; "
                "load it with pipe.load_lora_weights instead"
            )
        return deltas({key.removeprefix(denoiser + "."): value for key, value in state.items()}, alphas or {}, denoiser)


def deltas(state: dict[str, Tensor], alphas: dict[str, float], prefix: str = "") -> dict[str, Tensor]:
    """What a LoRA adds to each layer's weight: up times down, scaled by alpha over rank.

    Args:
        state: names to matrices, `NAME.lora_A.weight` [rank, in] and `NAME.lora_B.weight` [out, rank] (or the older
            `NAME.lora.down.weight` and `.up.weight`); convolutions have [rank, in, k, k] and [out, rank, 1, 1].
        alphas: `NAME.alpha` (perhaps after `prefix`) to alpha; without one alpha is the rank.
    """
    changes = {}
    for down_name, up_name in _PAIRS:
        for key in [key for key in state if key.endswith(down_name)]:
            layer = key.removesuffix(down_name)
            down, up = state[key].float(), state[layer + up_name].float()
            rank = down.shape[0]
            alpha = alphas.get(layer + ".alpha", alphas.get(f"{prefix}.{layer}.alpha", rank))
            product = up.flatten(1) @ down.flatten(1)
            changes[layer] = product.view(up.shape[0], *down.shape[1:]) * (float(alpha) / rank)
    return changes


class _Fetch:
    """A read under way in a thread."""

    def __init__(self, read: Callable[[], dict[str, Tensor]]):
        self._read = read
        self._result: dict[str, Tensor] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._read()
        except Exception as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> dict[str, Tensor]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


class _Switch:
    """Counts the denoiser's calls of a request, and changes its weights before one of them."""

    def __init__(self, settings: LateLora, read: Callable[[], dict[str, Tensor]], denoiser: Any, hooks: Hooks):
        self.settings = settings
        self.read = read
        self.denoiser = denoiser
        self.hooks = hooks
        self.fetched: dict[str, Tensor] | None = None
        self.saved: dict[str, Tensor] = {}
        self.fetch: _Fetch | None = None
        self.calls = 0
        self.lock = threading.Lock()

    def around_call(self, inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.lock.acquire(blocking=False):
            raise Unsupported("two requests on one pipeline would share the switched weights; run one after the other")
        try:
            self.calls = 0
            self.fetch = None if self.fetched is not None else _Fetch(self.read)
            return inner(*args, **kwargs)
        finally:
            self.restore()
            self.lock.release()

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self.lock.locked() and self.calls == self.settings.step:
            self.switch()
        self.calls += 1
        self.hooks.counter.count(bool(self.saved))
        return inner(*args, **kwargs)

    def switch(self) -> None:
        """Wait for the weights if need be, and add them, keeping a copy of what was there."""
        if self.fetched is None:
            fetch = self.fetch or _Fetch(self.read)
            waited = not fetch.done
            self.fetched = fetch.wait()
            self.hooks.counter.note("the first fetch " + ("had to be waited for" if waited else "was hidden entirely"))
        self.hooks.counter.note(f"switched in before denoiser call {self.settings.step} (counted from 0)")
        modules = dict(self.denoiser.named_modules())
        unknown = sorted(set(self.fetched) - set(modules))
        if unknown:
            raise Unsupported(f"{self.settings.path} changes {unknown[0]}, which this denoiser does not have")
        for name, change in self.fetched.items():
            weight = modules[name].weight
            self.saved[name] = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(weight.float() + self.settings.scale * change.to(weight.device))

    def restore(self) -> None:
        """Put the plain weights back from the copy: adding and subtracting does not come back to the same bits."""
        modules = dict(self.denoiser.named_modules())
        with torch.no_grad():
            for name, weight in self.saved.items():
                modules[name].weight.copy_(weight)
        self.saved.clear()
