"""Load a pipeline: the embedded model, a folder or a hub id, with one clear error when that does not work."""

import json
from pathlib import Path
from typing import Any

from fastdiff import miniature

TASKS = ("text-to-image", "image-to-image")


class LoadError(OSError):
    """A model could not be loaded. The message says why and what to do."""


def load(
    name_or_path: Any = None,
    task: str = "text-to-image",
    device: Any = None,
    dtype: Any = None,
    lora: str | None = None,
    recipe: str = "auto",
) -> Any:
    """Return a plain diffusers pipeline, a published few-step model with the scheduler it was made for.

    Args:
        name_or_path: None or "mini-sd" for the model that ships with fastdiff, "mini-dit" for the transformer and
            "mini-wan" for the video model that do; a folder in diffusers' format; or a hub id.
        task: "text-to-image" or "image-to-image".
        device: as torch names it; None takes a GPU when there is one.
        dtype: a torch dtype or its name; None takes float32 on a CPU and bfloat16 (float16 before Ampere) on a GPU.
        lora: a LoRA to load as well: a file, a folder, a hub id, or a hub id and a file in it (owner/model/file).
        recipe: "auto" sets the scheduler of a published few-step model or LoRA (`fastdiff.published`) and says so in
            the log; "none" leaves it alone; the name of a recipe takes that one.

    Raises:
        ValueError: an unknown task, dtype or recipe.
        LoadError: not found, offline, or not a diffusers pipeline.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    _check_torch()
    import torch
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline

    _check_recipe(recipe)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype, device)
    name = "mini-sd" if name_or_path is None else str(name_or_path)
    if name in miniature.MODELS:
        name = str(_embedded(name))
    _check_folder(name)
    auto = AutoPipelineForImage2Image if task == "image-to-image" else AutoPipelineForText2Image
    try:
        try:
            pipe = auto.from_pretrained(name, dtype=dtype, **_absent(name))
        except ValueError as error:
            if "AutoPipeline can't find" not in str(error):
                raise
            # a class diffusers has no task table for is loaded as it names itself
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **_absent(name))
            if (task == "image-to-image") != ("Img2Img" in type(pipe).__name__):
                raise LoadError(f"{name} is a {type(pipe).__name__}, which diffusers cannot use for {task}") from error
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_reason(name, error)) from error
    if lora is not None:
        _add_lora(pipe, str(lora))
    _settle(pipe, recipe)
    return pipe.to(device)


def _check_recipe(recipe: str) -> None:
    from fastdiff import published

    if recipe not in published.CHOICES:
        published.named(recipe)


def _settle(pipe: Any, recipe: str) -> None:
    from fastdiff import published

    chosen = published.chosen(pipe, recipe)
    if chosen is not None:
        published.settle(pipe, chosen)


def _add_lora(pipe: Any, lora: str) -> None:
    """Load a LoRA under a name that tells which it is, at the weight it was published with."""
    from fastdiff import published

    path, name = Path(lora).expanduser(), published.adapter_name(lora)
    place, file = lora, None
    if path.is_file():
        place, file = str(path.parent), path.name
    elif not path.is_dir() and lora.count("/") > 1:
        place, file = "/".join(lora.split("/")[:2]), "/".join(lora.split("/")[2:])
    try:
        pipe.load_lora_weights(place, weight_name=file, adapter_name=name)
    except Exception as error:
        raise LoadError(f"the LoRA {_reason(lora, error)}") from error
    known = published.by_name(lora)
    pipe.set_adapters([name], [known.lora_scale if known else 1.0])


def _check_torch() -> None:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise LoadError(
            f'{error.name} is not installed; run: pip install "fastdiff[cpu]" or "fastdiff[cuda]"'
        ) from error


def _dtype(dtype: Any, device: Any) -> Any:
    import torch

    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else torch.float16
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    return found


def _embedded(name: str) -> Path:
    try:
        return miniature.path(name)
    except FileNotFoundError as error:
        raise LoadError(str(error)) from error


def _check_folder(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_file():
        raise LoadError(f"{name} is a file; give a folder in diffusers' format or a hub id such as owner/model")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise LoadError(f"{name} is not a diffusers pipeline: it has no model_index.json")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LoadError(f"there is no folder {name}")


def _absent(name: str) -> dict[str, None]:
    """Parts a folder was saved without, as arguments: diffusers wants to be told that they are missed on purpose."""
    index = Path(name).expanduser() / "model_index.json"
    if not index.is_file():
        return {}
    entries = json.loads(index.read_text("utf-8"))
    return {part: None for part, kind in entries.items() if kind == [None, None]}


def _reason(name: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if Path(name).expanduser().is_dir():
        return f"{name} could not be loaded: {first}"
    if kinds & {"RepositoryNotFoundError", "GatedRepoError", "HFValidationError"}:
        return f"the hub has no model {name} that you may read ({first}); check the name, or log in to the hub"
    if kinds & {"OSError", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "HfHubHTTPError"}:
        return f"{name} is not on this machine and could not be downloaded; go online once, or give a folder ({first})"
    return f"{name} could not be loaded: {first}"
