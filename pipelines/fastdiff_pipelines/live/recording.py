"""A live session written down so that it can be run again: the same frames, settings and decisions in the same order.

A `.fdrec` file is a line of magic and then records: a length and that many bytes of JSON, a length and that many bytes
of pixels (zlib), lengths little-endian uint32. What is stored is what the model was given, after dropping and resizing,
so a replay depends on nothing but the model, the plan and the machine, and must give the same pictures by hash.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff_pipelines.conditions import Picture
from fastdiff_pipelines.settings import Settings

MAGIC = b"fastdiff recording 1\n"
LARGEST_RECORD = 256 * 2**20


class Recording:
    """Writes a session as it happens; only the thread that runs the model may call it.

    Args:
        path: a new file.
        about: the model, the plan, the machine: whatever a replay must know or may want to check.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.frames = 0
        self._file = path.open("wb")
        self._file.write(MAGIC)
        self.write("about", **about)

    def write(self, kind: str, pixels: bytes = b"", **values: Any) -> None:
        """Add a record."""
        if self._file.closed:
            return
        head = json.dumps({"kind": kind, **_plain(values)}, ensure_ascii=False).encode()
        self._file.write(struct.pack("<I", len(head)) + head + struct.pack("<I", len(pixels)) + pixels)

    def frame(self, frame_id: int, captured: float, frame: Any) -> None:
        """Add a frame that was admitted, uint8 ``[H, W, 3]``."""
        array = np.ascontiguousarray(frame)
        if array.dtype != np.uint8:
            raise TypeError(f"a recording keeps uint8 frames, got {array.dtype}")
        self.frames += 1
        self.write("frame", zlib.compress(array.tobytes(), 1), id=frame_id, captured=captured, shape=list(array.shape))

    def close(self) -> None:
        """The file is whole."""
        self._file.close()


def read(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Records of a file, one after another; a file cut short by a crash gives what is whole.

    Raises:
        ValueError: not a recording.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a recording of fastdiff")
        while True:
            parts = []
            for _ in range(2):
                size = file.read(4)
                if len(size) < 4:
                    return
                length = struct.unpack("<I", size)[0]
                if length > LARGEST_RECORD:
                    raise ValueError(f"{path} is damaged: a record of {length} bytes")
                data = file.read(length)
                if len(data) < length:
                    return
                parts.append(data)
            try:
                yield json.loads(parts[0]), parts[1]
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from error


@dataclass
class Replayed:
    """What a replay found.

    Attributes:
        frames: frames that went in.
        same, different: pictures that came out equal, or not, by hash; `first_different` is the first one's id.
    """

    frames: int = 0
    same: int = 0
    different: int = 0
    first_different: str | None = None


def replay(
    path: Path,
    open: Callable[[float, str | None], Any],
    lora: Any = None,
    on_output: Callable[[Any], None] = lambda output: None,
) -> Replayed:
    """Run a recording again.

    Args:
        open: makes streams as it did for the session that was recorded.
        on_output: is given every output.
    """
    found = Replayed()
    streams: dict[tuple[float, str | None], Any] = {}
    stream: Any = None
    waiting: tuple[np.ndarray, int, float] | None = None
    for head, pixels in read(path):
        kind = head["kind"]
        if kind == "open":
            place = (head["scale"], head["plan"])
            streams[place] = stream = streams.get(place) or open(*place)
        elif kind == "change":
            if lora is not None and head["lora"]:
                lora.set(head["lora"])
            if head["settings"]:
                stream.update(**_settings(head["settings"]))
        elif kind == "frame":
            array = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(head["shape"])
            waiting = array, head["id"], head["captured"]
        elif kind in ("push", "flush"):
            outputs = stream.flush() if kind == "flush" else stream.push(*(waiting or ()))
            found.frames += kind == "push"
            for output in outputs:
                on_output(output)
            made = {str(one.frame_id): digest(one.image) for one in outputs}
            for name in made.keys() | head["outputs"].keys():
                if made.get(name) == head["outputs"].get(name):
                    found.same += 1
                else:
                    found.different += 1
                    found.first_different = found.first_different or name
    return found


def digest(image: Any) -> str:
    """SHA-256 of a uint8 ``[H, W, 3]`` picture."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Picture):
        image = np.asarray(value.image)
        return {"scale": value.scale, "shape": list(image.shape), "pixels": zlib.compress(image.tobytes(), 1).hex()}
    return value


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them, with tuples and pictures again."""
    found: dict[str, Any] = {}
    names = {field.name for field in fields(Settings)}
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(tuple(one) if isinstance(one, list) else one for one in value)
        elif name in ("control", "image_prompt") and isinstance(value, dict):
            image = np.frombuffer(zlib.decompress(bytes.fromhex(value["pixels"])), np.uint8).reshape(value["shape"])
            value = Picture(image, value["scale"])
        found[name] = value
    unknown = [name for name in found if name not in names | {"on_update", "similarity"}]
    if unknown:
        raise ValueError(f"the recording has settings that this version does not know: {', '.join(unknown)}")
    return found
