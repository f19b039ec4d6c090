"""Which accelerations can really act on a pipeline on this machine, why not, and how much memory a size will take."""

import inspect
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AuditRow:
    """One acceleration, or one setting of it, on this pipeline here."""

    name: str
    settings: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes for one call: weights of all components, peak activations of denoiser and decoder."""

    height: int
    width: int
    weights: int
    denoiser: int
    decoder: int

    @property
    def peak(self) -> int:
        """Everything loaded, and the larger of the two activations, which do not live at the same time."""
        return self.weights + max(self.denoiser, self.decoder)


@dataclass(frozen=True)
class Audit:
    """What `audit` found. `str()` gives a table.

    Attributes:
        pipeline: class name; machine: device and versions.
        rows: every acceleration with the verdict on it.
        warnings: what diffusers itself would do on this model without saying so.
        memory: the estimate, or None with the reason among the warnings.
    """

    pipeline: str
    machine: str
    rows: tuple[AuditRow, ...]
    warnings: tuple[str, ...]
    memory: Memory | None

    def __str__(self) -> str:
        lines = [f"{self.pipeline} on {self.machine}"]
        for row in self.rows:
            lines.append(f"  {'yes' if row.ok else 'no ':<4}{row.settings:<60}{row.reason}".rstrip())
        if self.memory is not None:
            gib = [
                f"{part / 2**30:.2f}"
                for part in (self.memory.weights, self.memory.denoiser, self.memory.decoder, self.memory.peak)
            ]
            lines.append(
                f"memory at {self.memory.width}x{self.memory.height}: weights {gib[0]} GiB, denoiser {gib[1]} GiB, "
                f"decoder {gib[2]} GiB, peak about {gib[3]} GiB"
            )
        lines += [f"beware: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def audit(pipe: Any, height: int | None = None, width: int | None = None) -> Audit:
    """Ask every acceleration whether it can act on this pipeline here, and estimate memory.

    Nothing is run but one pass of the text encoders (to see the denoiser's inputs) and shape arithmetic.

    Args:
        pipe: a diffusers pipeline, accelerated or not.
        height, width: in pixels; None takes the pipeline's own size.
    """
    from fastdiff.anatomy import default_size, public_class

    own = default_size(pipe)
    warnings = _silent(pipe)
    memory = None
    try:
        memory = estimate_memory(pipe, height or own[0], width or own[1])
    except Exception as error:
        warnings.append(f"memory could not be estimated: {error}")
    return Audit(public_class(pipe).__name__, _machine(pipe), tuple(_rows(pipe)), tuple(warnings), memory)


def estimate_memory(pipe: Any, height: int, width: int) -> Memory:
    """Estimate bytes for one call at a size by running shapes, not numbers, through the real forwards.

    Raises:
        Unsupported: the pipeline needs inputs that cannot be made up, or does not take this size.
    """
    import torch

    from fastdiff.anatomy import anatomy, capture

    parts = anatomy(pipe)
    denoiser, args, kwargs = capture(pipe, height, width)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(tensor): tensor for part in modules for tensor in (*part.parameters(), *part.buffers())}
    decoder = 0
    vae_decoder = getattr(parts.vae, "decoder", None)
    if isinstance(vae_decoder, torch.nn.Module) and parts.latent_channels:
        weight = next(vae_decoder.parameters())
        shape = (1, parts.latent_channels, height // parts.scale, width // parts.scale)
        latents = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        decoder = peak_bytes(vae_decoder, (latents,), {})
    return Memory(
        height,
        width,
        weights=sum(tensor.nbytes for tensor in tensors.values()),
        denoiser=peak_bytes(denoiser, args, kwargs),
        decoder=decoder,
    )


def peak_bytes(module: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Most bytes of tensors, beside the weights, alive at once in one forward; computed on shapes alone.

    Workspaces inside kernels are not seen, nor what an allocator keeps back.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    living: dict[int, list[int]] = {}  # storage: [tensors on it, bytes]
    now = peak = 0

    def note(tensor: Any) -> None:
        nonlocal now, peak
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in living:
            living[key] = [0, storage.nbytes()]
            now += storage.nbytes()
            peak = max(peak, now)
        living[key][0] += 1
        weakref.finalize(tensor, forget, key)

    def forget(key: int) -> None:
        nonlocal now
        living[key][0] -= 1
        if not living[key][0]:
            now -= living.pop(key)[1]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in weights:
                    note(leaf)
            return output

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    named = (*module.named_parameters(), *module.named_buffers())
    with torch.no_grad(), fake:
        twins: dict[str, Any] = {name: fake.from_tensor(tensor.detach()) for name, tensor in named}
        weights = {twin.untyped_storage()._cdata for twin in twins.values()}
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: fake.from_tensor(tensor), (args, kwargs))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                note(leaf)
        with Watch():
            torch.func.functional_call(module, twins, args, kwargs)
    return peak


def _rows(pipe: Any) -> list[AuditRow]:
    from fastdiff.caching.diffusers_cache import METHODS, DiffusersCache
    from fastdiff.plan import MEMBERS, member

    rows = []
    for kind in MEMBERS:
        settings = [member(kind)()]
        if kind == "DiffusersCache":
            settings = [DiffusersCache(method=name, ratios=(1.0,) if name == "mag" else ()) for name in METHODS]
        for one in settings:
            verdict = one.supports(pipe)
            label = f"{kind}({getattr(one, 'method', '')!r})" if kind == "DiffusersCache" else kind
            rows.append(AuditRow(kind, label, verdict.ok, verdict.reason))
    return rows


def _silent(pipe: Any) -> list[str]:
    """What diffusers' own caches would do wrong on this model, most without saying so."""
    from fastdiff.anatomy import anatomy

    found = [line for name, denoiser in anatomy(pipe).denoisers.items() for line in _silent_on(pipe, name, denoiser)]
    if "strength" in inspect.signature(_public_call(pipe)).parameters:
        found.append(
            "diffusers' MagCache counts steps from 0: image to image begins part-way, at another step's ratios"
        )
    found.append("diffusers' caches keep their state when a call ends in an exception; the next picture differs")
    return found


def _silent_on(pipe: Any, name: str, denoiser: Any) -> Iterator[str]:
    """The lines on one denoiser."""
    from fastdiff.anatomy import anatomy, attentions, compiled_regions, opens_cache_context, taylorseer_matches
    from fastdiff.caching.diffusers_cache import refusal

    guidance, meant = anatomy(pipe).guidance, hasattr(denoiser, "enable_cache")
    if not meant:
        yield f"the {name} has no enable_cache: diffusers' caches are not meant for a {_kind(denoiser)}"
    if not taylorseer_matches(denoiser):
        yield f"diffusers' TaylorSeer with its default patterns matches no module of the {name}: a no-op"
    for method, called in (("first_block", "FirstBlockCache"), ("mag", "MagCache")):
        reason = refusal(denoiser, method)
        if reason:
            yield f"diffusers' {called} on the {name}: it {reason}"
    if guidance == "separate" and attentions(denoiser):
        yield f"diffusers' PAB hands one guidance branch of the {name} the attention of the other"
    if not attentions(denoiser):
        yield f"diffusers' PAB and FasterCache know no attention of the {name}: a no-op on it"
    if meant and guidance != "batched":
        yield (
            f"diffusers' FasterCache takes half of each call of the {name} for a negative branch, which is not in it; "
            "unless is_guidance_distilled is set, it raises on one picture and mixes several"
        )
    if meant and not any("NucleusMoE" in type(part).__name__ for part in denoiser.modules()):
        yield f"diffusers' TextKVCache knows the blocks of NucleusMoE alone: a no-op on the {name}"
    if not opens_cache_context(pipe):
        yield (
            f"{_kind(pipe)} opens no cache context: diffusers' FirstBlockCache and TaylorSeer raise on the "
            f"{name}, and MagCache mixes guidance branches"
        )
    if not _passes_sigma(pipe):
        yield f"{_kind(pipe)} tells caches no sigma: diffusers' SeaCache on the {name} is a no-op"
    if compiled_regions(denoiser):
        yield f"diffusers' MagCache after compile_repeated_blocks leaves every block of the {name} eager"


def _public_call(pipe: Any) -> Any:
    """The pipeline's own `__call__`, whatever stands around it."""
    from fastdiff.anatomy import public_class

    return inspect.unwrap(public_class(pipe).__call__)


def _kind(part: Any) -> str:
    from fastdiff.anatomy import public_class

    return public_class(part).__name__


def _passes_sigma(pipe: Any) -> bool:
    """True when the pipeline's `__call__` gives `cache_context` the noise level that SeaCache needs."""
    try:
        source = inspect.getsource(_public_call(pipe))
    except (OSError, TypeError):
        return False
    calls = re.findall(r"cache_context\((.*?)\):", source, flags=re.DOTALL)
    return any("sigma=" in call for call in calls)


def _machine(pipe: Any) -> str:
    import diffusers
    import torch

    from fastdiff.anatomy import anatomy

    device = next(anatomy(pipe).denoiser.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}"
