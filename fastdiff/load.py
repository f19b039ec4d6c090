"""Load a pipeline: the embedded model, a folder or a hub id, with one clear error when that does not work."""

from pathlib import Path
from typing import Any

TASKS = ("text-to-image", "image-to-image")


class LoadError(OSError):
    """A model could not be loaded. The message says why and what to do."""


def load(name_or_path: Any = None, task: str = "text-to-image", device: Any = None, dtype: Any = None) -> Any:
    """Return a plain diffusers pipeline.

    Args:
        name_or_path: None for the model that ships with fastdiff; a folder in diffusers' format; or a hub id.
        task: "text-to-image" or "image-to-image".
        device: as torch names it; None takes a GPU when there is one.
        dtype: a torch dtype or its name; None takes float32 on a CPU and bfloat16 (float16 before Ampere) on a GPU.

    Raises:
        ValueError: an unknown task or dtype.
        LoadError: not found, offline, or not a diffusers pipeline.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    _check_torch()
    import torch
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype, device)
    name = str(_embedded() if name_or_path is None else name_or_path)
    _check_folder(name)
    auto = AutoPipelineForImage2Image if task == "image-to-image" else AutoPipelineForText2Image
    try:
        try:
            pipe = auto.from_pretrained(name, dtype=dtype)
        except ValueError as error:
            if "AutoPipeline can't find" not in str(error):
                raise
            # a class diffusers has no task table for is loaded as it names itself
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype)
            if (task == "image-to-image") != ("Img2Img" in type(pipe).__name__):
                raise LoadError(f"{name} is a {type(pipe).__name__}, which diffusers cannot use for {task}") from error
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_reason(name, error)) from error
    return pipe.to(device)


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


def _embedded() -> Path:
    from fastdiff import miniature

    try:
        return miniature.path()
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
