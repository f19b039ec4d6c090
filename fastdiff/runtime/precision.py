"""Number format and memory layout of the denoiser and the decoder, chosen by measuring on this machine.

Only the chosen modules change; tensors are converted where they enter and leave them, so latents, scheduler and text
embeddings keep the precision they had. Times, positions and guidance are never shortened: bfloat16 cannot tell
timestep 999 from 1000.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice
from fastdiff.anatomy import anatomy, capture, default_size, denoiser_arguments, is_precise, keeps_float32
from fastdiff.hooks import Hooks

DTYPES = (None, "keep", "float32", "bfloat16", "float16")
FORMATS = (None, "contiguous", "channels_last")
COMPONENTS = ("denoiser", "decoder")
_PROBE_PIXELS = 256
_WORTH_IT = 0.95


@dataclass(frozen=True)
class Precision(Acceleration):
    """Run denoiser and decoder in another number format or memory layout.

    Args:
        dtype: None measures and takes the fastest of the pipeline's own and bfloat16; "keep" leaves numbers alone
            (exact); or a torch dtype by name.
        memory_format: None measures; or "contiguous", "channels_last" (for convolutions).
        components: which of "denoiser" and "decoder" to change. The encoder stays as it is, since it draws random
            numbers and another dtype draws others.
    """

    stage: ClassVar[str] = "weights"
    dtype: str | None = None
    memory_format: str | None = None
    components: tuple[str, ...] = COMPONENTS

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        check_choice("Precision", "dtype", self.dtype, DTYPES)
        check_choice("Precision", "memory_format", self.memory_format, FORMATS)
        object.__setattr__(self, "components", tuple(self.components))
        for component in self.components:
            check_choice("Precision", "components", component, COMPONENTS)

    @property
    def exact(self) -> bool:
        """True when only the memory layout may change."""
        return self.dtype == "keep"

    def supports(self, pipe: Any) -> Verdict:
        """Refused for quantised weights, which have a format of their own."""
        import torch

        for name, module in _targets(pipe, self.components):
            for parameter in module.parameters():
                if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
                    return Verdict(False, f"the {name} holds quantised weights; leave it out of components")
                if parameter.is_meta:
                    return Verdict(False, f"the {name} is offloaded; load it without offloading")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Measure where settings are None, then convert."""
        hooks.counter.expects = "nothing"
        held: list[Any] = []
        hooks.counter.held = lambda: sum(tensor.nbytes for tensor in held)
        for name, module in _targets(pipe, self.components):
            options = self._options(module)
            now = options[0]
            chosen, said = now, "as asked"
            if len(options) > 1 and _decodes_frames(pipe, name, module):
                said = "not measured: it decodes frames, and not one by one"
            elif len(options) > 1:
                chosen, said = _measured(pipe, name, module, options)
            if chosen == now and self._is_now(module, now):
                hooks.counter.note(f"{name}: left in {' '.join(now)} ({said})")
                continue
            hooks.counter.expects = "engaged"
            hooks.counter.note(f"{name}: {' '.join(chosen)} ({said})")
            held += _convert(module, chosen, hooks)

    def _options(self, module: Any) -> list[tuple[str, str]]:
        """What may be chosen for a module as (dtype, memory format); the pipeline's own comes first."""
        import torch

        own = _dtype_name(module)
        dtypes = [own] if self.dtype == "keep" else [self.dtype] if self.dtype else list(dict.fromkeys([own, _short()]))
        has_layout = any(isinstance(part, torch.nn.Conv2d) for part in module.modules())
        formats = [self.memory_format] if self.memory_format else ["contiguous", "channels_last"]
        if not has_layout:
            formats = ["contiguous"]
        return list(itertools.product(dtypes, formats))

    def _is_now(self, module: Any, option: tuple[str, str]) -> bool:
        return option == (_dtype_name(module), _format_name(module))


def _targets(pipe: Any, components: tuple[str, ...]) -> list[tuple[str, Any]]:
    parts = anatomy(pipe)
    found = list(parts.denoisers.items()) if "denoiser" in components else []
    decoder = getattr(parts.vae, "decoder", None)
    if "decoder" in components and hasattr(decoder, "parameters"):
        found.append((f"{parts.vae_name}.decoder", decoder))
    return found


def _decodes_frames(pipe: Any, name: str, module: Any) -> bool:
    import torch

    return name not in anatomy(pipe).denoisers and any(isinstance(part, torch.nn.Conv3d) for part in module.modules())


def _short() -> str:
    import torch

    # before Ampere a GPU computes bfloat16 in float32
    return "float16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False) else "bfloat16"


def _dtype_name(module: Any) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _format_name(module: Any) -> str:
    import torch

    for parameter in module.parameters():
        strided = parameter.dim() == 4 and not parameter.is_contiguous()
        if strided and parameter.is_contiguous(memory_format=torch.channels_last):
            return "channels_last"
    return "contiguous"


def _convert(module: Any, option: tuple[str, str], hooks: Hooks) -> list[Any]:
    """Convert weights and buffers, cast at the module's boundary; return the originals kept for undoing."""
    dtype, kept = _swap_weights(module, option, hooks.on_undo)

    def around(inner: Callable, *args: Any, **kwargs: Any) -> Any:
        hooks.counter.count(True)
        named = denoiser_arguments(module, args, kwargs)
        outer = next((value.dtype for value in named.values() if _is_float(value)), dtype)
        shortened = {name: value if is_precise(name) else _cast(value, dtype) for name, value in named.items()}
        positional = [shortened.pop(name) for name in list(shortened)[: len(args)]]
        return _cast(inner(*positional, **shortened), outer)

    hooks.wrap(module, "forward", around)
    return kept


def _swap_weights(module: Any, option: tuple[str, str], on_undo: Callable) -> tuple[Any, list[Any]]:
    import torch

    dtype, layout = (
        getattr(torch, option[0]),
        getattr(torch, f"{option[1]}_format" if option[1] == "contiguous" else option[1]),
    )
    precise = keeps_float32(module)
    kept = []
    for path, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        wanted = tensor.dtype if any(part in path.split(".") for part in precise) else dtype
        before = tensor.data
        after = before.to(wanted, memory_format=layout) if before.dim() == 4 else before.to(wanted)
        if after is before:
            continue
        tensor.data = after
        kept.append(before)
        on_undo(lambda tensor=tensor, before=before: setattr(tensor, "data", before))
    return dtype, kept


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: Any) -> Any:
    """Cast every floating tensor in nested lists, tuples, dicts and diffusers outputs."""
    if _is_float(value):
        return value.to(dtype)
    if isinstance(value, dict):  # diffusers' outputs are dicts too, built from keywords
        cast = {key: item if is_precise(str(key)) else _cast(item, dtype) for key, item in value.items()}
        return cast if type(value) is dict else type(value)(**cast)
    if isinstance(value, (list, tuple)):
        made = [_cast(item, dtype) for item in value]
        # a list that needs no cast stays the list it is: causal video autoencoders write their cache into one
        return value if all(new is old for new, old in zip(made, value, strict=True)) else type(value)(made)
    return value


def _measured(pipe: Any, name: str, module: Any, options: list[tuple[str, str]]) -> tuple[tuple[str, str], str]:
    """Return the fastest option and a sentence about it, from the notebook of earlier probes if it is there."""
    side = min(_PROBE_PIXELS, *default_size(pipe))
    key = _fingerprint(name, module, options, side)
    notebook = _Notebook()
    times = notebook.read().get(key)
    if times is None:
        times = _probe(pipe, name, module, options, side)
        notebook.write(key, times)
    own = times[0]
    best = min(range(len(options)), key=times.__getitem__)
    if times[best] > _WORTH_IT * own:
        return options[0], "measured: nothing else is faster here"
    return options[best], f"measured {own / times[best]:.2f}x over {' '.join(options[0])} at {side} pixels"


def _probe(pipe: Any, name: str, module: Any, options: list[tuple[str, str]], side: int) -> list[float]:
    """Seconds of one forward for each option: the least of three after one to warm up."""
    import torch

    parts = anatomy(pipe)
    if name in parts.denoisers:
        caught, args, kwargs = capture(pipe, side, side)
        if caught is not module:
            raise Unsupported(f"the probe did not reach {name}; give Precision a dtype and a memory format instead")
    else:
        weight = next(module.parameters())
        cells = max(side // parts.scale, 1)
        args = (torch.randn(1, parts.latent_channels or 4, cells, cells, device=weight.device, dtype=weight.dtype),)
        kwargs = {}
    seconds = []
    for option in options:
        undo = Hooks("probe", None)  # type: ignore[arg-type]
        undo.counter.count = lambda accelerated: None
        try:
            _convert(module, option, undo)
            seconds.append(_seconds(module, args, kwargs, limit=2 * min(seconds, default=float("inf"))))
        except RuntimeError:
            seconds.append(float("inf"))  # this machine has no kernel for it
        finally:
            undo.undo()
    if seconds[0] == float("inf"):
        raise Unsupported(f"{name} could not be run for measuring; give Precision a dtype and a memory format instead")
    return seconds


def _seconds(module: Any, args: tuple, kwargs: dict[str, Any], limit: float) -> float:
    import torch

    best = float("inf")
    with torch.no_grad():
        for attempt in range(4):
            start = time.perf_counter()
            module(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            best = min(best, elapsed) if attempt else best
            if attempt and elapsed > limit:
                break
    return best


def _fingerprint(name: str, module: Any, options: list[tuple[str, str]], side: int) -> str:
    import torch

    weight = next(module.parameters())
    shapes = [(path, tuple(parameter.shape)) for path, parameter in module.named_parameters()]
    machine = torch.cuda.get_device_name() if weight.is_cuda else f"{os.cpu_count()}:{torch.get_num_threads()}"
    facts = (type(module).__name__, name, shapes, options, side, str(weight.device), machine, torch.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


class _Notebook:
    """Earlier probes of this user on this machine, in one small JSON file."""

    def __init__(self):
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(root) / "fastdiff" / "precision.json"

    def read(self) -> dict[str, list[float]]:
        try:
            notes = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # absent or damaged: the probe is simply made again
        return notes if isinstance(notes, dict) else {}

    def write(self, key: str, times: list[float]) -> None:
        notes = {**self.read(), key: times}
        beside = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(notes), encoding="utf-8")
            beside.replace(self.path)
        except OSError:
            beside.unlink(missing_ok=True)  # a read-only home only means measuring again next time
