"""What travels over the WebSocket: frames in binary with a fixed head, everything else as small JSON.

Times in messages are milliseconds of the server's clock; a browser learns its offset to that by pings. Heads are
little-endian.

=========  ==================================================================
to us      ``1, id: uint32, captured: float64`` and a picture's bytes
to us      ``2, id: uint32, age_ms: float32, held back so far: uint32``: this picture was painted
to us      ``3, what for: uint8, scale: float32`` and a picture's bytes: a condition, of ``CONDITIONS``
from us    ``1, id: uint32, captured: float64, version: uint32`` and a picture's bytes
from us    ``2, id: uint32``: this frame has arrived (which is all a window of frames in flight needs to know)
=========  ==================================================================
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

FRAME, ACKNOWLEDGEMENT, CONDITION = 1, 2, 3
CONDITIONS = ("control", "image_prompt")
_FRAME_IN = struct.Struct("<BId")
_PAINTED = struct.Struct("<BIfI")
_CONDITION = struct.Struct("<BBf")
_FRAME_OUT = struct.Struct("<BIdI")
_ARRIVED = struct.Struct("<BI")
MOST_TEXT = 16 * 1024
TEXTS = ("ping", "set", "record")


class Wrong(ValueError):
    """A message that breaks the protocol; its sender is told why."""


@dataclass(frozen=True)
class FrameIn:
    """A picture on its way in."""

    frame_id: int
    captured_ms: float
    picture: bytes


@dataclass(frozen=True)
class Painted:
    """A picture was shown, so old; the browser held this many frames back so far."""

    frame_id: int
    age_ms: float
    held_back: int


@dataclass(frozen=True)
class ConditionIn:
    """A picture that frames from now on are to follow, and how much."""

    name: str
    scale: float
    picture: bytes


def read(data: bytes) -> FrameIn | Painted | ConditionIn:
    """A binary message, or `Wrong`."""
    kind = data[0] if data else None
    if kind == FRAME:
        if len(data) <= _FRAME_IN.size:
            raise Wrong("a frame without a picture")
        _, frame_id, captured = _FRAME_IN.unpack_from(data)
        if not math.isfinite(captured):
            raise Wrong("a frame's capture time must be a finite number")
        return FrameIn(frame_id, captured, data[_FRAME_IN.size :])
    if kind == ACKNOWLEDGEMENT:
        if len(data) != _PAINTED.size:
            raise Wrong(f"an acknowledgement has {_PAINTED.size} bytes, not {len(data)}")
        _, frame_id, age, held = _PAINTED.unpack(data)
        if not math.isfinite(age):
            raise Wrong("an age must be a finite number")
        return Painted(frame_id, age, held)
    if kind == CONDITION:
        if len(data) <= _CONDITION.size:
            raise Wrong("a condition without a picture")
        _, number, scale = _CONDITION.unpack_from(data)
        if number >= len(CONDITIONS):
            raise Wrong(f"no condition has the number {number}; there are {', '.join(CONDITIONS)}")
        return ConditionIn(CONDITIONS[number], scale, data[_CONDITION.size :])
    raise Wrong(f"no message begins with {kind}")


def read_text(text: str) -> dict[str, Any]:
    """A JSON message with a known `type`, or `Wrong`."""
    if len(text) > MOST_TEXT:
        raise Wrong(f"a text message has at most {MOST_TEXT} characters")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Wrong("a text message must be JSON") from error
    if not isinstance(found, dict) or found.get("type") not in TEXTS:
        raise Wrong(f"a text message is an object whose type is one of {', '.join(TEXTS)}")
    return found


def frame_out(frame_id: int, captured_ms: float, version: int, picture: bytes) -> bytes:
    """A picture for the browser."""
    return _FRAME_OUT.pack(FRAME, frame_id, captured_ms, version) + picture


def arrived(frame_id: int) -> bytes:
    """A frame has come in."""
    return _ARRIVED.pack(ACKNOWLEDGEMENT, frame_id)


def frame_in(frame_id: int, captured_ms: float, picture: bytes) -> bytes:
    """What a browser sends; for clients in Python."""
    return _FRAME_IN.pack(FRAME, frame_id, captured_ms) + picture


def condition(name: str, scale: float, picture: bytes) -> bytes:
    """What a browser sends; for clients in Python."""
    return _CONDITION.pack(CONDITION, CONDITIONS.index(name), scale) + picture


def painted(frame_id: int, age_ms: float, held_back: int = 0) -> bytes:
    """What a browser sends; for clients in Python."""
    return _PAINTED.pack(ACKNOWLEDGEMENT, frame_id, age_ms, held_back)


def read_frame_out(data: bytes) -> tuple[int, float, int, bytes] | int:
    """Id, capture time, version and picture of a frame, or the id that has arrived; for clients in Python."""
    if data[0] == FRAME:
        _, frame_id, captured, version = _FRAME_OUT.unpack_from(data)
        return frame_id, captured, version, data[_FRAME_OUT.size :]
    return _ARRIVED.unpack(data)[1]
