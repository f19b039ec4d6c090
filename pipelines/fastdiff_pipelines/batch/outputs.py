"""Outputs as files: encoded with their parameters inside, written whole or not at all.

Encoding depends on pixels and parameters alone, so equal pixels give equal bytes: no date, no duration, no worker.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_pipelines.batch.errors import OUTPUT, JobError, one_line
from fastdiff_pipelines.batch.items import canonical
from fastdiff_pipelines.batch.manifest import sync_folder

if TYPE_CHECKING:
    import numpy as np

_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "webp": b"RIFF", "mp4": b"ftyp"}


def encode(pixels: "np.ndarray", kind: str, about: dict[str, Any], fps: int = 8) -> bytes:
    """A picture or clip as the bytes of a file.

    Args:
        pixels: uint8 [H, W, 3], or [F, H, W, 3] for a clip.
        kind: "png", "jpg", "webp" (a clip becomes an animation) or "mp4" (a picture becomes one frame).
        about: goes into the file: a PNG's text chunks, the Exif user comment of JPEG and WebP, the comment of an MP4.
    """
    if kind == "mp4":
        return _mp4(pixels if pixels.ndim == 4 else pixels[None], about, fps)
    return _picture(pixels, kind, about, fps)


def _picture(pixels: "np.ndarray", kind: str, about: dict[str, Any], fps: int) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = canonical(about)
    frames = [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    extra: dict[str, Any] = {}
    if len(frames) > 1:
        if kind == "jpg":
            raise ValueError("a JPEG holds one picture; take webp, png or mp4 for clips")
        extra = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    if kind == "png":
        extra["pnginfo"] = PngInfo()
        extra["pnginfo"].add_itxt("prompt", str(about.get("prompt", "")))
        extra["pnginfo"].add_itxt("fastdiff", text)
    else:
        exif = Image.Exif()
        # the Exif standard's own way of saying that a comment is Unicode; Exif here is big-endian
        exif.endian = ">"
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        extra |= {"exif": exif, "quality": 95} | ({"subsampling": 0} if kind == "jpg" else {"method": 4})
    file = io.BytesIO()
    frames[0].save(file, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind], **extra)
    return file.getvalue()


def _mp4(frames: "np.ndarray", about: dict[str, Any], fps: int) -> bytes:
    import av

    file = io.BytesIO()
    _, height, width, _ = frames.shape
    # one encoding thread, or the bytes could differ between machines; mp4 keeps a comment only under a known name
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = canonical(about)
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "14", "threads": "1"})
        stream.height, stream.width = height, width
        # 4:2:0 halves the sides, which must then be even
        stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def read_about(path: Path) -> dict[str, Any]:
    """The parameters an output carries.

    Raises:
        ValueError: the file carries none.
    """
    head = path.open("rb").read(12)
    if head[4:8] == _MAGIC["mp4"]:
        import av

        with av.open(str(path)) as container:
            text = container.metadata.get("comment", "")
    else:
        from PIL import Image

        with Image.open(path) as image:
            if image.format == "PNG":
                text = image.info.get("fastdiff", "")
            else:
                raw = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
                text = raw[8:].decode("utf-16-be") if isinstance(raw, bytes) else raw.removeprefix("UNICODE\0")
    if not text:
        raise ValueError(f"{path} carries no parameters")
    return json.loads(text)


def has_kind(data: bytes, kind: str) -> bool:
    """Whether the first bytes are those of that kind of file."""
    return data[4:8] == _MAGIC["mp4"] if kind == "mp4" else data.startswith(_MAGIC[kind])


def sha256(data: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_folder(folder: Path) -> None:
    """Makes a folder and proves that it can be written, before any work is spent.

    Raises:
        JobError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f".probe-{os.getpid()}", b"x")
        (folder / f".probe-{os.getpid()}").unlink()
    except OSError as error:
        raise output_error(folder, error) from error


def output_error(path: Path, error: OSError) -> JobError:
    """The one line about a path that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JobError(OUTPUT, f"cannot write {path}: the disk is full; free some space and start the same job again")
    return JobError(OUTPUT, f"cannot write {path}: {error.strerror or one_line(error)}")


def write_whole(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes a file so that a reader, and a machine that lost its power, sees all of it or nothing.

    Args:
        durable: also wait until the new name is on the disk; a caller with many files can call `sync_folder` once.
    """
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    if durable:
        sync_folder(path.parent)


def remove_parts(folder: Path) -> int:
    """Removes what killed processes left half written; only when no worker is running. How many there were."""
    found = list(folder.glob(".part-*"))
    for path in found:
        with suppress(FileNotFoundError):
            path.unlink()
    return len(found)


def free_bytes(folder: Path) -> int:
    """Space left where a folder lies."""
    return shutil.disk_usage(folder).free
