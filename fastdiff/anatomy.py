"""What a pipeline is made of, found by structure and not by tables of class names.

The only file that knows diffusers' private names.
"""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastdiff.acceleration import Unsupported
from fastdiff.hooks import MISSING, innermost

PIPELINE_CONFIG = "_internal_dict"
COMPILED_CALL = "_compiled_call_impl"
HOOK_REGISTRY = "_diffusers_hook"
TIMESTEPS = ("timestep", "timesteps", "t")
_PRECISE = ("timestep", "guidance", "sigma", "_ids", "rotary", "time_ids")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one pipeline.

    Attributes:
        denoisers: name to module; usually one, two for pipelines with two experts.
        vae: the autoencoder, or None; `vae_name` its name on the pipeline.
        text_encoders, tokenizers: name to component.
        guidance: "batched" (both branches in one denoiser call), "separate" (two calls), or "none".
        scale: pixels per latent cell along one side.
    """

    denoisers: dict[str, Any]
    vae_name: str
    vae: Any
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    scheduler: Any
    guidance: str
    scale: int

    @property
    def denoiser(self) -> Any:
        """The first denoiser."""
        return next(iter(self.denoisers.values()))

    @property
    def latent_channels(self) -> int | None:
        """Channels of a latent as the autoencoder makes it; None without an autoencoder."""
        return None if self.vae is None else latent_channels(self.vae)


def anatomy(pipe: Any) -> Anatomy:
    """Describe a pipeline.

    Raises:
        Unsupported: nothing in it looks like a denoiser.
    """
    components = {name: part for name, part in pipe.components.items() if part is not None}
    denoisers = {name: part for name, part in components.items() if is_denoiser(part)}
    if not denoisers:
        raise Unsupported(
            f"{type(pipe).__name__} has no component whose forward takes a timestep, so there is no denoiser to "
            f"accelerate; its components are {', '.join(components)}"
        )
    vaes = [name for name, part in components.items() if _is_autoencoder(part)]
    vae_name = "vae" if "vae" in vaes else (vaes[0] if vaes else "")
    return Anatomy(
        denoisers=denoisers,
        vae_name=vae_name,
        vae=components.get(vae_name),
        text_encoders={name: part for name, part in components.items() if _is_text_encoder(part)},
        tokenizers={name: part for name, part in components.items() if "tokenizer" in name},
        scheduler=components.get("scheduler"),
        guidance=_guidance(public_class(pipe), tuple(denoisers)),
        scale=_scale(pipe, components.get(vae_name)),
    )


def public_class(pipe: Any) -> type:
    """The class the pipeline had before `accelerate` gave it one of its own."""
    return next(kind for kind in type(pipe).__mro__ if "_fastdiff_handle" not in kind.__dict__)


def forward_names(part: Any) -> tuple[str, ...]:
    """The names of the arguments a module's forward takes; empty for anything that is not a module."""
    forward = getattr(type(part), "forward", None)
    if forward is None or not hasattr(part, "parameters"):
        return ()
    if hasattr(part, "_orig_mod"):  # compiled by the user with torch.compile(module)
        forward = type(part._orig_mod).forward
    return _parameter_names(forward)


def is_denoiser(part: Any) -> bool:
    """True for a module whose forward takes a timestep and that is not an adapter such as a ControlNet."""
    names = forward_names(part)
    return any(name in names for name in TIMESTEPS) and "controlnet_cond" not in names


def denoiser_arguments(denoiser: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one denoiser call by name."""
    return {**dict(zip(forward_names(denoiser), args, strict=False)), **kwargs}


def is_precise(name: str) -> bool:
    """True for a denoiser input that loses too much in a short float: times, positions and guidance."""
    return name == "t" or any(part in name for part in _PRECISE)


def conditioning(arguments: dict[str, Any]) -> list[Any]:
    """The tensors of a denoiser call that tell one guidance branch from the other."""
    import torch

    chosen = [value for name, value in arguments.items() if "encoder_hidden_states" in name or name == "cap_feats"]
    chosen += [arguments[name] for name in ("pooled_projections", "class_labels") if name in arguments]
    flat = [item for value in chosen for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def latent_channels(vae: Any) -> int | None:
    """Channels of the latents an autoencoder makes."""
    config = vae.config
    return getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)


def blocks(denoiser: Any) -> list[tuple[str, Any]]:
    """The repeated blocks a diffusers cache can hook: children of the lists diffusers knows, in order of execution."""
    import torch
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS

    found = []
    for name, child in denoiser.named_children():
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, torch.nn.ModuleList):
            found += [(f"{name}.{index}", block) for index, block in enumerate(child)]
    return found


def block_metadata(block: Any) -> Any:
    """What diffusers' registry knows about a block's arguments and outputs; None when it knows nothing."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def attentions(denoiser: Any) -> list[tuple[str, Any]]:
    """Every attention module of a denoiser, by structure."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return [(name, part) for name, part in denoiser.named_modules() if isinstance(part, _ATTENTION_CLASSES)]


def taylorseer_matches(denoiser: Any) -> int:
    """How many modules diffusers' TaylorSeer hooks with its default patterns."""
    from diffusers.hooks.taylorseer_cache import _TRANSFORMER_BLOCK_IDENTIFIERS

    names = [name for name, _ in denoiser.named_modules()]
    return sum(any(re.fullmatch(pattern, name) for pattern in _TRANSFORMER_BLOCK_IDENTIFIERS) for name in names)


def opens_cache_context(pipe: Any) -> bool:
    """True when the pipeline tells diffusers' caches which guidance branch it calls for."""
    return "cache_context(" in _source(public_class(pipe))


def compiled_regions(denoiser: Any) -> list[Any]:
    """The blocks diffusers compiles one by one (`compile_repeated_blocks`); empty when it names none."""
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    return [part for part in denoiser.modules() if type(part).__name__ in names]


def diffusers_hooks(module: Any) -> list[tuple[Any, str, Any]]:
    """Every diffusers hook under a module as (hooked module, hook name, hook)."""
    found = []
    for part in module.modules():
        registry = part.__dict__.get(HOOK_REGISTRY)
        if registry is not None:
            found += [(part, name, hook) for name, hook in registry.hooks.items()]
    return found


def original_forward(module: Any) -> tuple[Any, str]:
    """Where a module's own forward is kept, as (owner, attribute), beneath our wrappers and diffusers' hooks."""
    wrapped = innermost(module, "forward")
    if wrapped is not None:
        return wrapped, "inner"
    registry = module.__dict__.get(HOOK_REGISTRY)
    if registry is not None and registry._fn_refs:
        first = registry._fn_refs[0]
        return first, "forward" if first.original_forward is None else "original_forward"
    return module, "forward"


def step_count(pipe: Any) -> int | None:
    """How many denoising steps the running call takes, as far as the pipeline or its scheduler says."""
    count = getattr(pipe, "_num_timesteps", None)
    return count if isinstance(count, int) else None


def step_index(pipe: Any) -> int | None:
    """Where the scheduler of the running call stands, -1 before its first step; None for those that do not count."""
    index = getattr(getattr(pipe, "scheduler", None), "_step_index", MISSING)
    if index is None:
        return -1
    return index if isinstance(index, int) else None


def is_last_step(pipe: Any, calls: int) -> bool:
    """True when a denoiser call that `calls` others of its branch precede belongs to the last step."""
    count = step_count(pipe)
    if count is not None:
        return calls >= count - 1
    index, scheduler = step_index(pipe), getattr(pipe, "scheduler", None)
    return index is not None and scheduler is not None and max(index, 0) >= len(scheduler.timesteps) - 1


def keeps_float32(module: Any) -> tuple[str, ...]:
    """Name parts of submodules whose author wants them in float32."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def default_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels that the pipeline would use if none were given, as far as its parts say."""
    parts = anatomy(pipe)
    config = parts.denoiser.config
    cells = getattr(config, "sample_size", None) or getattr(pipe, "default_sample_size", None) or 64
    cells = cells if isinstance(cells, int) else max(cells[-2:])
    return cells * parts.scale, cells * parts.scale


class _Captured(BaseException):
    """Ends a pipeline call at its first denoiser call. A BaseException, so that no pipeline catches it."""


def capture(pipe: Any, height: int, width: int) -> tuple[Any, tuple, dict[str, Any]]:
    """Run a pipeline up to its first denoiser call and return (denoiser, args, kwargs) of that call.

    Nothing of the pipeline is changed, its generator state included. Costs one pass of the text encoders.

    Raises:
        Unsupported: the pipeline needs inputs that cannot be made up, or does not take this size.
    """
    import torch

    runner = copy.copy(pipe)
    runner.__class__ = public_class(pipe)
    if getattr(pipe, "scheduler", None) is not None:
        runner.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    runner.set_progress_bar_config(disable=True)
    caught = []
    try:
        with _stopped(anatomy(pipe).denoisers, caught), torch.random.fork_rng(devices=[]), torch.no_grad():
            runner(**_made_up_inputs(runner, height, width))
    except _Captured:
        return caught[0]
    except Exception as error:
        raise Unsupported(f"a trial call of {type(runner).__name__} at {width}x{height} failed: {error}") from error
    raise Unsupported(f"{type(runner).__name__} finished a call without calling its denoiser")


@contextmanager
def _stopped(denoisers: dict[str, Any], caught: list) -> Iterator[None]:
    # the registry as well: a pipeline that opens a cache context leaves an empty one behind
    attributes = [(part, name) for part in denoisers.values() for name in ("forward", HOOK_REGISTRY)]
    before = [part.__dict__.get(name, MISSING) for part, name in attributes]

    def stop_at(part: Any):
        def forward(*args: Any, **kwargs: Any) -> Any:
            caught.append((part, args, kwargs))
            raise _Captured

        return forward

    try:
        for part in denoisers.values():
            part.__dict__["forward"] = stop_at(part)
        yield
    finally:
        for (part, name), value in zip(attributes, before, strict=True):
            if value is MISSING:
                part.__dict__.pop(name, None)
            else:
                part.__dict__[name] = value


def _made_up_inputs(pipe: Any, height: int, width: int) -> dict[str, Any]:
    import torch
    from PIL import Image

    names = inspect.signature(type(pipe).__call__).parameters
    made_up = {
        "prompt": "a photo",
        "image": Image.new("RGB", (width, height)),
        "mask_image": Image.new("L", (width, height), 255),
        "class_labels": [0],
        "height": height,
        "width": width,
        "num_inference_steps": 4,
        "num_frames": 9,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    return {name: value for name, value in made_up.items() if name in names}


@cache
def _parameter_names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def _is_autoencoder(part: Any) -> bool:
    return (
        callable(getattr(part, "encode", None))
        and callable(getattr(part, "decode", None))
        and hasattr(part, "config")
        and hasattr(part, "parameters")
    )


def _is_text_encoder(part: Any) -> bool:
    return callable(getattr(part, "get_input_embeddings", None)) and "input_ids" in forward_names(part)


def _scale(pipe: Any, vae: Any) -> int:
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if isinstance(getattr(pipe, name, None), int):
            return getattr(pipe, name)
    if vae is None:
        return 1
    return 2 ** (len(getattr(vae.config, "block_out_channels", (0, 0, 0, 0))) - 1)


@cache
def _guidance(pipeline: type, denoisers: tuple[str, ...]) -> str:
    source = _source(pipeline)
    calls = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        own = isinstance(node.func, ast.Attribute) and node.func.attr in denoisers
        # pipelines with two experts call the chosen one through a variable
        chosen = isinstance(node.func, ast.Name) and any(word.arg == "timestep" for word in node.keywords)
        calls += own or chosen
    if "] * 2" in source:  # torch.cat([latents] * 2); a second call then serves something else, such as layer skipping
        return "batched"
    return "separate" if calls > 1 else "none"


@cache
def _source(pipeline: type) -> str:
    """The text of a pipeline's `__call__`; empty where it cannot be read."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(pipeline.__call__)))
    except (OSError, TypeError):
        return ""


def context_plan(denoiser: Any) -> Any:
    """How diffusers' context parallelism splits this denoiser; None when diffusers has no plan for it."""
    return getattr(denoiser, "_cp_plan", None)


def parallel_config(denoiser: Any) -> Any:
    """The parallel configuration diffusers has put on a denoiser; None when it has none."""
    return getattr(denoiser, "_parallel_config", None)


def clear_parallel_config(denoiser: Any) -> None:
    """Take diffusers' parallel configuration off a denoiser and its attention processors."""
    denoiser._parallel_config = None
    for part in denoiser.modules():
        processor: Any = getattr(part, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None


def attention_backend(denoiser: Any) -> str:
    """The attention backend diffusers was told to use for a denoiser, "native" where it was told nothing."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    processors = [getattr(part, "processor", None) for part in denoiser.modules()]
    chosen = {getattr(one, "_attention_backend", None) for one in processors} - {None}
    backend: Any = next(iter(chosen), _AttentionBackendRegistry._active_backend)
    return str(getattr(backend, "value", backend))
