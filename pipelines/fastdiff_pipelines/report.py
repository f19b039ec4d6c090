"""What a stream did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StreamReport:
    """Counts since the stream was made.

    Attributes:
        frames_in, frames_out: pushed, and returned as outputs (repeated ones included).
        frames_repeated: not computed, because the similarity filter found nothing new in them.
        frames_lost: pushed and never to come out: a model failed on them.
        frames_in_flight: still inside; `flush` returns them.
        denoiser_calls: calls of the denoiser.
        rows_computed, rows_padded: rows of those calls that served a frame, and rows that only kept the shape.
        encodes, decodes: calls of the autoencoder.
        warm_starts, steps_saved: frames that began at a later step, from an earlier picture, and steps not taken so.
        padded: whether calls keep one shape.
        shapes: number of different batch shapes the denoiser saw.
        recompiles: graphs built after the first by a compiled denoiser; None when it is not compiled.
        denoise_ms, encode_ms, decode_ms: total time in each.
        overhead_ms: total time in pushes beside those three.
    """

    frames_in: int
    frames_out: int
    frames_repeated: int
    frames_lost: int
    frames_in_flight: int
    denoiser_calls: int
    rows_computed: int
    rows_padded: int
    encodes: int
    decodes: int
    warm_starts: int
    steps_saved: int
    padded: bool
    shapes: int
    recompiles: int | None
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    overhead_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        frames = (
            f"{self.frames_in} frames in, {self.frames_out} out ({self.frames_repeated} repeated), "
            f"{self.frames_lost} lost, {self.frames_in_flight} in flight"
        )
        if self.warm_starts:
            frames += f"; {self.warm_starts} started warm and left out {self.steps_saved} steps"
        recompiles = "not compiled" if self.recompiles is None else f"{self.recompiles} recompiles"
        calls = (
            f"{self.denoiser_calls} denoiser calls of {self.rows_computed} rows and {self.rows_padded} padding rows, "
            f"{self.shapes} shapes, {recompiles}"
        )
        times = (
            f"encode {self.encode_ms:.0f} ms, denoise {self.denoise_ms:.0f} ms, decode {self.decode_ms:.0f} ms, "
            f"overhead {self.overhead_ms:.0f} ms"
        )
        return "\n".join((frames, calls, times))
