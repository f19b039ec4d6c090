"""`bench video`: how soon, how steadily and how long a causal video model streams, and what its clips keep to.

The embedded `mini-wan`, 17 frames of 32 pixels where a clip ends at all. `ms_median` is a frame of video, by the time
between chunks. Rows:
    whole-clip: diffusers' pipeline as a user calls it, 25 steps with guidance.
    whole-clip-equal: the same at our number of steps and without guidance.
    sequential: a causal rollout, one chunk at a time, each of its steps a call of its own.
    sliding-window: every chunk from the whole window anew, without a cache and without a streaming autoencoder.
    fastdiff: `ChunkRollout` with as many chunks in flight as steps, each with the chunks before it as they are at that
        step for its context, where `sequential` has finished ones.
    fastdiff-chunk-10, -100, -1000: what the detector reads from the 16 frames up to that chunk, of several prompts side
        by side, at the settings that were timed: `attribute` (mean over background, colour, shape, direction and pace)
        and `track_error_px`; `attribute_change` is paired with chunk 10. `sequential-chunk-...` are the same of the
        sequential rollout for a quarter of the prompts, and `attribute_difference` is to it, paired by prompt.

`first_frame_ms` counts from the call, `jitter_ms_p95` is the 95th percentile of how much neighbouring gaps between
chunks differ, `late` the share of chunks that come after a viewer at 16 frames a second needs them, `bytes_per_chunk`
the slope of the process's memory over the later half of a long run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks import drift
from benchmarks.moving import GUIDANCE
from benchmarks.record import Record, Row, could_not_run, percentile
from fastdiff.miniature import wan, wan_rollout
from fastdiff.quality import Interval, mean_interval, paired_difference
from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import Failure, one_line
from fastdiff_pipelines.rollout import ChunkRollout

STEPS, WHOLE_STEPS = 4, 25
FPS = 16
STREAMED = 60  # chunks whose gaps are measured
MARKS = (10, 100, 1000)
DRIFTING: dict[str, tuple[int, dict[str, Any]]] = {  # what share of the prompts, and how they are rolled out
    "fastdiff": (1, {}),
    "sequential": (4, {"batched": False, "kind": "clean"}),
}
PROMPT = "a big red circle moving right quickly on a plain white background"


def run(full: bool = False, pipe: Any = None, chunks: int = 0, rollouts: int = 0) -> Record:
    """Runs the benchmark.

    Args:
        full: 128 rollouts instead of 32, and the memory of 4,000 chunks instead of 2,000.
        pipe: the pipeline to measure; the embedded one, with its student, where None. Where it is not trained yet,
            random weights of the same shape are timed, and what clips keep to is left open.
        chunks, rollouts: how many for memory and for what clips keep to; 0 chooses.
    """
    note, drawn = "", pipe
    if drawn is None:
        drawn, note = embedded()
    with torch.no_grad():
        record = Record("video", _timed(drawn, chunks or (4000 if full else 2000)))
        record.rows += _drift(drawn, rollouts or (128 if full else 32), note)
    for row in record.rows:
        row.note = row.note or note
    return record.finish()


def embedded() -> tuple[Any, str]:
    """`mini-wan` as the app loads it, with the student it is streamed with where one ships; and what is missing."""
    try:
        pipe = load_pipeline("mini-wan", "text-to-image")
    except Failure as failure:
        pipe = wan.untrained()
        pipe.set_progress_bar_config(disable=True)
        return pipe, f"random weights of its shape: {one_line(failure)}"
    return pipe, ""


def _timed(pipe: Any, chunks: int) -> list[Row]:
    rows = [_clip_row("whole-clip", lambda: _whole(pipe, WHOLE_STEPS, GUIDANCE), 2 * WHOLE_STEPS)]
    rows.append(_clip_row("whole-clip-equal", lambda: _whole(pipe, STEPS, 1.0), STEPS))
    with ChunkRollout(pipe, height=wan.SIZE, width=wan.SIZE, steps=STEPS) as rollout:
        rows.append(_stream_row("sequential", lambda: rollout(PROMPT, batched=False)))
    rows.append(_stream_row("sliding-window", lambda: _windows(pipe)))
    with ChunkRollout(pipe, height=wan.SIZE, width=wan.SIZE, steps=STEPS) as rollout:
        rows.append(_stream_row("fastdiff", lambda: rollout(PROMPT)))
        rows[-1].quality["bytes_per_chunk"] = _memory_slope(rollout, chunks)
    return rows


def _whole(pipe: Any, steps: int, guidance: float) -> int:
    frames = pipe(
        PROMPT,
        height=wan.SIZE,
        width=wan.SIZE,
        num_frames=wan.FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    return frames.shape[1]


def _clip_row(method: str, make: Callable[[], int], nfe: int, repeats: int = 5) -> Row:
    """A row of whole clips: nothing can be seen before all is done."""
    make()
    taken, frames = [], 1
    for _ in range(repeats):
        began = perf_counter()
        frames = make()
        taken.append((perf_counter() - began) * 1000)
    quality = {"first_frame_ms": mean_interval(np.array(taken)), "fps": _exact(1000 * frames / float(np.median(taken)))}
    return Row.timed(method, [value / frames for value in taken], nfe=nfe, quality=quality)


def _stream_row(
    method: str, open_stream: Callable[[], Iterator[np.ndarray]], chunks: int = 60, repeats: int = 5
) -> Row:
    """A row of a stream: its first frame over several beginnings, its gaps over one long run."""
    _first(open_stream)
    firsts = [_first(open_stream) for _ in range(repeats)]
    stream, gaps, began = open_stream(), [], perf_counter()
    frames = 0
    for made in (next(stream) for _ in range(STREAMED)):
        now = perf_counter()
        gaps.append((now - began) * 1000)
        began, frames = now, len(made)
    stream.close()  # type: ignore[attr-defined]
    steady = gaps[8:]
    play = 1000 * frames / FPS
    quality = {
        "first_frame_ms": mean_interval(np.array(firsts)),
        "fps": _exact(1000 * frames / float(np.median(steady))),
        "jitter_ms_p95": _exact(percentile(np.abs(np.diff(steady)).tolist(), 95)),
        "late": mean_interval(np.array([gap > play for gap in steady], float)),
    }
    return Row.timed(method, [gap / frames for gap in steady], nfe=STEPS, quality=quality)


def _first(open_stream: Callable[[], Iterator[np.ndarray]]) -> float:
    began = perf_counter()
    stream = open_stream()
    next(stream)
    taken = (perf_counter() - began) * 1000
    stream.close()  # type: ignore[attr-defined]
    return taken


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _windows(pipe: Any) -> Iterator[np.ndarray]:
    """Chunk after chunk, each from a window of clean frames and one of noise that is computed whole at every step."""
    from fastdiff.video.causal import CausalWan

    text, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    generator, session = torch.Generator().manual_seed(0), StreamingVAE(pipe.vae)
    clean = torch.empty(1, wan.CHANNELS, 0, wan.SIZE // 8, wan.SIZE // 8)
    levels = wan_rollout.sigmas(STEPS)
    with CausalWan(pipe.transformer) as causal:
        while True:
            x = torch.randn(1, wan.CHANNELS, 1, *clean.shape[3:], generator=generator)
            for level, after in zip(levels, [*levels[1:], 0.0], strict=True):
                told = torch.tensor([[0.0] * clean.shape[2] + [1000 * level]])
                with causal.block_causal(chunk=1):
                    velocity = pipe.transformer(torch.cat([clean, x], 2), told, text, return_dict=False)[0][:, :, -1:]
                x = x - level * velocity
                if after:
                    x = (1 - after) * x + after * torch.randn(x.shape, generator=generator)
            window = torch.cat([clean, x], dim=2)
            frames = pipe.vae.decode(session.unscaled(window)).sample[0, :, -4 if clean.shape[2] else -1 :]
            yield ((frames / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
            clean = window[:, :, -wan_rollout.CONTEXT :]


def _memory_slope(rollout: ChunkRollout, chunks: int) -> Interval:
    """Bytes of the process a chunk, the slope over the later half; the interval is two standard errors."""
    stream, held, every = rollout(PROMPT, chunks=chunks), [], max(1, chunks // 40)
    for number, _ in enumerate(stream, start=1):
        if number % every == 0:
            gc.collect()
            held.append((number, _resident_bytes()))
    later = np.array(held[len(held) // 2 :], float)
    place = later[:, 0] - later[:, 0].mean()
    slope = float(place @ later[:, 1] / (place @ place))
    rest = later[:, 1] - later[:, 1].mean() - slope * place
    error = float(np.sqrt((rest @ rest) / max(1, len(later) - 2) / (place @ place)))
    return Interval(slope, slope - 2 * error, slope + 2 * error, chunks)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text("utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _drift(pipe: Any, count: int, note: str) -> list[Row]:
    """What is left of the prompts after ten, a hundred and a thousand chunks."""
    if note:
        return [could_not_run(f"{name}-chunk-{mark}", note) for name in DRIFTING for mark in MARKS]
    scenes = drift.scenes_of(count)
    seen = {
        name: drift.followed(pipe, scenes[: max(1, count // share)], MARKS, **settings)
        for name, (share, settings) in DRIFTING.items()
    }
    rows = [row for name, found in seen.items() for row in drift.rows(f"{name}-chunk", found)]
    for mark, row in zip(MARKS, rows, strict=False):
        ours, sequential = (seen[name][mark]["attribute"] for name in DRIFTING)
        row.quality["attribute_difference"] = paired_difference(ours[: len(sequential)], sequential, seed=0)
    return rows
