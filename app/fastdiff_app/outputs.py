"""Files are written under a temporary name beside their place and renamed when whole, so none is ever half there."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastdiff_app.failures import ExitCode, Failure

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def check_writable(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raises `Failure` now if `path` could not be written later, before any work is spent."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise Failure(ExitCode.USAGE, f"cannot write {path}: its name must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise Failure(ExitCode.OUTPUT, f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _part(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Failure(ExitCode.OUTPUT, f"cannot write {path}: {error.strerror or error}") from error


def _part(path: Path) -> Path:
    # the suffix stays last, because encoders choose the container by it
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write; it becomes `path` when the block ends well and vanishes when it does not."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        # an error about another file is not ours to explain
        if error.errno not in _DISK and error.filename not in (str(part), str(path.parent)):
            raise
        raise Failure(ExitCode.OUTPUT, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
