"""Video files in and out as uint8 frames [H, W, 3]."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff_app.failures import ExitCode, Failure, one_line
from fastdiff_app.outputs import whole_file

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".mkv", ".mov")
LARGEST_SIDE = 8192


class VideoSource:
    """Frames of a video file, read one at a time.

    Attributes:
        fps: frames per second as the file says (25 where it does not).
        height, width: pixels of its frames.
        frames: how many the file says it holds, or None where only reading it would tell.

    Raises:
        Failure: the file is missing, is not a video, or holds no frame.
    """

    def __init__(self, path: Path):
        import av

        if not path.is_file():
            raise Failure(ExitCode.INPUT, f"no such video: {path}")
        self.path = path
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise Failure(ExitCode.INPUT, f"{path} holds no video")
                stream = container.streams.video[0]
                self.fps = Fraction(stream.average_rate or 25)
                self.frames = stream.frames or None
                first = next(container.decode(stream), None)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise Failure(ExitCode.INPUT, f"{path} is not a video that can be read: {one_line(error)}") from error
        if first is None:
            raise Failure(ExitCode.INPUT, f"{path} has no frames")
        self.height, self.width = first.height, first.width
        if max(self.height, self.width) > LARGEST_SIDE:
            raise Failure(
                ExitCode.INPUT, f"{path} is {self.width}x{self.height}; at most {LARGEST_SIDE} pixels a side are read"
            )

    def read(self, height: int, width: int) -> "Iterator[np.ndarray]":
        """All frames as uint8 [height, width, 3], cut to that shape around the centre, then scaled."""
        import av
        import numpy as np
        from PIL import Image

        from fastdiff_app.images import fitted

        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(container.streams.video[0]):
                    yield np.asarray(fitted(Image.fromarray(frame.to_ndarray(format="rgb24")), height, width))
        except (av.FFmpegError, OSError) as error:
            raise Failure(ExitCode.INPUT, f"{self.path} is damaged: {one_line(error)}") from error


@contextmanager
def video_sink(path: Path, fps: Fraction, height: int, width: int) -> "Iterator[Callable[[np.ndarray], None]]":
    """Gives a function that adds one uint8 [H, W, 3] frame to an H.264 file.

    The file appears when the block ends well, with at least one frame; otherwise nothing is left.
    """
    import av

    written = 0
    with whole_file(path) as part:
        try:
            container = av.open(str(part), "w")
            stream = container.add_stream("libx264", rate=fps, options={"crf": "14"})
        except (av.FFmpegError, OSError) as error:
            raise Failure(ExitCode.OUTPUT, f"cannot write {path}: {one_line(error)}") from error
        stream.height, stream.width = height, width
        # 4:2:0 halves the sides, which must then be even
        stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"

        def write(frame: "np.ndarray | None") -> None:
            nonlocal written
            picture = None if frame is None else av.VideoFrame.from_ndarray(frame, format="rgb24")
            try:
                container.mux(stream.encode(picture))
            except (av.FFmpegError, OSError) as error:
                raise Failure(ExitCode.OUTPUT, f"cannot write {path}: {one_line(error)}") from error
            written += 1

        with container:
            yield write
            if not written:
                raise Failure(ExitCode.INPUT, f"no frame came out, so {path} is not written")
            write(None)


def write_video(path: Path, frames: "np.ndarray", fps: int) -> None:
    """Writes uint8 [F, H, W, 3] as one file."""
    with video_sink(path, Fraction(fps), frames.shape[1], frames.shape[2]) as write:
        for frame in frames:
            write(frame)
