"""Video without end: chunk after chunk from a causal video model, in bounded memory."""

from fastdiff_pipelines.rollout.chunks import Chunk
from fastdiff_pipelines.rollout.ledger import ChunkLedger
from fastdiff_pipelines.rollout.motion import Motion
from fastdiff_pipelines.rollout.rollout import ChunkRollout
from fastdiff_pipelines.rollout.session import RolloutSession
from fastdiff_pipelines.rollout.settings import Context, RolloutSettings
from fastdiff_pipelines.rollout.stream import VideoStream

__all__ = [
    "Chunk",
    "ChunkLedger",
    "ChunkRollout",
    "Context",
    "Motion",
    "RolloutSession",
    "RolloutSettings",
    "VideoStream",
]
