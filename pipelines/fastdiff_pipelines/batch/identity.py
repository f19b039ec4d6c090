"""What a model or adapter is, whichever folder it lies in."""

import hashlib
from pathlib import Path

from fastdiff_pipelines.batch.errors import MODEL, JobError, one_line

_WHOLE = 64 * 2**20
_BLOCK, _BLOCKS = 2**16, 256
_IGNORED = (".md", ".txt.lock", ".lock")


def file_digest(path: Path) -> str:
    """sha256 of a file's name, size and bytes; of files above 64 MiB, of 256 blocks spread over them."""
    size = path.stat().st_size
    found = hashlib.sha256(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(2**20):
                found.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def folder_digest(folder: Path) -> str:
    """Digest over all files that can change an output, in order of their relative names."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.name.endswith(_IGNORED) and not any(part.startswith(".") for part in name.parts):
            found.update(f"{name.as_posix()}={file_digest(path)};".encode())
    return found.hexdigest()


def resolve_model(name: str | None) -> tuple[Path, str]:
    """Finds a model before any worker starts.

    Args:
        name: a diffusers folder, a hub id (downloaded now if it is not here), or None for the embedded model.

    Returns:
        Its folder, and what identifies it: a short name and its revision or a digest.

    Raises:
        JobError: there is no such model.
    """
    if name is None:
        from fastdiff import miniature

        try:
            folder = miniature.path()
        except FileNotFoundError as error:
            raise JobError(MODEL, one_line(error)) from error
        return folder, f"mini-sd@{folder_digest(folder)[:16]}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise JobError(MODEL, f"{name} is no diffusers model: it has no model_index.json")
        return folder.resolve(), f"{folder.resolve().name}@{folder_digest(folder)[:16]}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise JobError(MODEL, f"no model at {name}; give a diffusers folder or a hub id such as owner/name")
    try:
        from diffusers import DiffusionPipeline

        folder = Path(DiffusionPipeline.download(name))
    except Exception as error:
        # the hub's client raises dozens of classes; for the user they all mean the same
        raise JobError(MODEL, f"cannot get {name}: {one_line(error)}") from error
    return folder, f"{name}@{folder.name}"


def adapter_digest(source: str) -> str:
    """What identifies a LoRA file or folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return folder_digest(path)[:16]
    if path.is_file():
        return file_digest(path)[:16]
    raise ValueError(f"no adapter at {source}; give a LoRA file or folder that is on this machine")
