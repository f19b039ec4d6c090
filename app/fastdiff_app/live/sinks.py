"""Where live pictures go: a file, a folder, a stream's URL, a window, a virtual camera, or raw frames to stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff_app import images, video
from fastdiff_app.failures import ExitCode, Failure, is_installed, one_line

if TYPE_CHECKING:
    import numpy as np


class Ended(Exception):
    """Whoever looked has gone, as by closing the window; nothing is wrong."""


URLS = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts", "udp": "mpegts"}
SMALLEST_WINDOW = 512


@contextmanager
def sink(target: str, fps: float, height: int, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that takes one uint8 ``[H, W, 3]`` picture.

    Args:
        target: a video file, a folder (made if its name has no suffix), an RTMP or SRT URL, "virtual" for a virtual
            camera (package pyvirtualcam), "window", or "-" for raw frames on standard output.

    Raises:
        Failure: it cannot be written.
    """
    scheme = target.partition("://")[0]
    if target == "-":
        yield _standard_output
    elif target == "virtual":
        with _virtual(fps, height, width) as write:
            yield write
    elif target == "window":
        with _window(height, width) as write:
            yield write
    elif "://" in target:
        if scheme not in URLS:
            raise Failure(ExitCode.USAGE, f"{target}: pictures go to {', '.join(URLS)} addresses")
        with _url(target, URLS[scheme], fps, height, width) as write:
            yield write
    elif Path(target).suffix.lower() in video.SUFFIXES:
        rate = Fraction(fps).limit_denominator(1000)
        with video.video_sink(Path(target), rate, height, width) as write:
            yield write
    elif Path(target).suffix == "":
        yield _Folder(Path(target))
    else:
        files = ", ".join(video.SUFFIXES)
        raise Failure(ExitCode.USAGE, f"{target}: write a {files} file, a folder, a URL, window or -")


class _Folder:
    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def __call__(self, picture: np.ndarray) -> None:
        images.write_image(self.folder / f"{self.count:06}.png", picture)
        self.count += 1


def _standard_output(picture: np.ndarray) -> None:
    try:
        sys.stdout.buffer.write(picture.tobytes())
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise Failure(ExitCode.OUTPUT, "nobody reads standard output any more") from error


@contextmanager
def _url(target: str, container_format: str, fps: float, height: int, width: int) -> Iterator[Callable]:
    import av

    options = {"preset": "ultrafast", "tune": "zerolatency"}
    with _sending(target):
        container = av.open(target, "w", format=container_format)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"

    def write(picture: np.ndarray) -> None:
        with _sending(target):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    try:
        yield write
    except BaseException:
        # what went wrong is what counts, and not that the end cannot be sent either
        with suppress(av.FFmpegError, OSError):
            container.close()
        raise
    with _sending(target), container:
        container.mux(stream.encode(None))


@contextmanager
def _sending(target: str) -> Iterator[None]:
    """Says of what the block does with an address what went wrong."""
    import av

    try:
        yield
    except av.ProtocolNotFoundError as error:
        scheme = target.partition("://")[0]
        said = f"this PyAV's FFmpeg knows no {scheme}; send to rtmp or udp, or build PyAV against one that does"
        raise Failure(ExitCode.MISSING, said) from error
    except (av.FFmpegError, OSError) as error:
        raise Failure(ExitCode.OUTPUT, f"cannot send to {target}: {one_line(error)}") from error


@contextmanager
def _window(height: int, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    if not is_installed("tkinter"):
        raise Failure(ExitCode.MISSING, "a window needs Python's tkinter (Debian: apt install python3-tk)")
    import tkinter

    from PIL import Image, ImageTk

    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        raise Failure(ExitCode.OUTPUT, f"no window: {one_line(error)}") from error
    root.title("fastdiff")
    # small models' pictures by whole multiples, so that they can be seen
    times = max(1, SMALLEST_WINDOW // max(height, width))
    shown = ImageTk.PhotoImage("RGB", (width * times, height * times))
    tkinter.Label(root, image=shown, borderwidth=0).pack()
    closed: list[bool] = []
    root.protocol("WM_DELETE_WINDOW", lambda: closed.append(True))

    def write(picture: np.ndarray) -> None:
        shown.paste(Image.fromarray(picture.repeat(times, axis=0).repeat(times, axis=1)))
        root.update()
        if closed:
            raise Ended

    try:
        yield write
    finally:
        root.destroy()


@contextmanager
def _virtual(fps: float, height: int, width: int) -> Iterator[Callable]:
    if not is_installed("pyvirtualcam"):
        raise Failure(ExitCode.MISSING, "a virtual camera needs: python -m pip install 'fastdiff[virtual]'")
    import pyvirtualcam  # type: ignore[import-not-found]

    try:
        camera = pyvirtualcam.Camera(width=width, height=height, fps=fps)
    except RuntimeError as error:
        raise Failure(ExitCode.OUTPUT, f"no virtual camera: {one_line(error)}") from error

    def write(picture: np.ndarray) -> None:
        try:
            camera.send(picture)
        except RuntimeError as error:
            raise Failure(ExitCode.OUTPUT, f"the virtual camera takes no picture: {one_line(error)}") from error

    with camera:
        yield write
