"""Where live frames come from: a camera, the screen, a file, a folder, a URL, or raw frames on standard input."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_app import images
from fastdiff_app.failures import ExitCode, Failure, one_line

if TYPE_CHECKING:
    import numpy as np

LIVE_PREFIXES = ("rtsp://", "rtsps://", "http://", "https://", "rtmp://", "srt://", "udp://")


def is_live(source: str) -> bool:
    """Whether frames come at their own time; others are paced."""
    return source.startswith(("camera", "screen", *LIVE_PREFIXES)) or source == "-"


def frames(source: str, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames uint8 ``[height, width, 3]``, cut around their centre.

    Args:
        source: "camera" or "camera:2" (Linux), "screen" (X11), a URL, a folder of pictures, a video file, or "-" for
            raw frames of exactly this size on standard input.

    Raises:
        Failure: there is nothing that can be read.
    """
    if source == "-":
        return _raw(height, width)
    if Path(source).is_dir():
        return _folder(Path(source), height, width)
    if source.split(":")[0] == "camera":
        number = source.partition(":")[2] or "0"
        if not number.isdecimal():
            raise Failure(ExitCode.USAGE, f"{source} is no camera; write camera or camera:1")
        return _video(f"/dev/video{number}", height, width, format="v4l2")
    if source == "screen":
        display = os.environ.get("DISPLAY")
        if not display:
            raise Failure(ExitCode.INPUT, "there is no X11 screen to take (DISPLAY is not set)")
        return _video(display, height, width, format="x11grab")
    if not source.startswith(LIVE_PREFIXES) and not Path(source).is_file():
        raise Failure(ExitCode.INPUT, f"no such source: {source}")
    return _video(source, height, width)


def paced(
    found: Iterator[np.ndarray],
    fps: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[float, np.ndarray]]:
    """Frames at the times a camera of this rate would take them, with these times."""
    began = clock()
    for number, frame in enumerate(found):
        due = began + number / fps
        if due > clock():
            sleep(due - clock())
        yield due, frame


def _video(address: str, height: int, width: int, **options: Any) -> Iterator[np.ndarray]:
    import av
    import numpy as np
    from PIL import Image

    try:
        with av.open(address, **options) as container:
            if not container.streams.video:
                raise Failure(ExitCode.INPUT, f"{address} holds no video")
            for frame in container.decode(video=0):
                yield np.asarray(images.fitted(Image.fromarray(frame.to_ndarray(format="rgb24")), height, width))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Failure(ExitCode.INPUT, f"{address} cannot be read: {one_line(error)}") from error


def _folder(folder: Path, height: int, width: int) -> Iterator[np.ndarray]:
    import numpy as np

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in images.SUFFIXES)
    if not paths:
        raise Failure(ExitCode.INPUT, f"{folder} holds no pictures ({', '.join(images.SUFFIXES)})")
    for path in paths:
        yield np.asarray(images.fitted(images.read_image(path), height, width))


def _raw(height: int, width: int) -> Iterator[np.ndarray]:
    import numpy as np

    size = height * width * 3
    while data := sys.stdin.buffer.read(size):
        if len(data) < size:
            raise Failure(ExitCode.INPUT, f"standard input ended within a frame of {width}x{height} RGB bytes")
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
