"""Live sessions: frames of cameras through a model that several people share, with every millisecond accounted for."""

from fastdiff_pipelines.live.controller import Budget, DeadlineController, Decision, Rung, measure
from fastdiff_pipelines.live.controls import Controls
from fastdiff_pipelines.live.identity import IdentityStream
from fastdiff_pipelines.live.ledger import Finished, Journey, Ledger
from fastdiff_pipelines.live.lora import LiveLora
from fastdiff_pipelines.live.recording import Recording, replay
from fastdiff_pipelines.live.session import LiveSession
from fastdiff_pipelines.live.turns import Turns, jain
from fastdiff_pipelines.live.worker import LiveWorker

__all__ = [
    "Budget",
    "Controls",
    "DeadlineController",
    "Decision",
    "Finished",
    "IdentityStream",
    "Journey",
    "Ledger",
    "LiveLora",
    "LiveSession",
    "LiveWorker",
    "Recording",
    "Rung",
    "Turns",
    "jain",
    "measure",
    "replay",
]
