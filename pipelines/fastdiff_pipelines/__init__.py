"""Ways to run a model: image stream, live session, batch job."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff_pipelines.latest import LatestFrame
    from fastdiff_pipelines.sequential import SequentialStream
    from fastdiff_pipelines.settings import Settings
    from fastdiff_pipelines.similarity import Similarity
    from fastdiff_pipelines.slots import NotFinite, Output
    from fastdiff_pipelines.stream import Stream

_HOMES = {
    "LatestFrame": "latest",
    "NotFinite": "slots",
    "Output": "slots",
    "SequentialStream": "sequential",
    "Settings": "settings",
    "Similarity": "similarity",
    "Stream": "stream",
}
__all__ = ["LatestFrame", "NotFinite", "Output", "SequentialStream", "Settings", "Similarity", "Stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
