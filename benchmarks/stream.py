"""`bench stream`: one video, same weights, frames, noise, size and threads, through every way of diffusing it.

Rows:
    diffusers: its image-to-image pipeline as a user calls it, 25 steps at strength 0.5 with guidance 5.
    diffusers-equal: the same pipeline with exactly our sampler, number of denoiser calls and guidance (none).
    sequential: a fair loop, with cached embeddings and no pipeline around it, one frame after another.
    fastdiff: the stream; both also compiled.
    streamdiffusion: the published 0.1.1 in its own environment (`make peers`), fed the same noise.

Methods take turns frame by frame in one run, so that a busy moment of the machine falls on all of them alike.
`ms_median` is one frame, `first_frame_ms` from handing over a clip's first frame to having its result, and
`max_abs_difference` is to `sequential` on pixels in 0..1.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

import fastdiff
from benchmarks.peers.streamdiffusion import StreamDiffusionPeer
from benchmarks.record import Record, Row, could_not_run
from fastdiff.quality import Interval, mean_interval
from fastdiff.runtime.compile import Compile
from fastdiff.sampling.schedule import consistency_timesteps
from fastdiff_app.demo import Demo, attributes, demo
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import Failure
from fastdiff_app.methods import DiffusersLoop, Method, Run, StreamLoop, equal_loop, round_robin, to_bytes
from fastdiff_pipelines import SequentialStream, Stream
from fastdiff_pipelines.prepared import draw

SETTINGS = {"steps": 4, "strength": 0.5, "guidance": "none", "guidance_scale": 1.0, "sampler": "lcm", "seed": 0}
USUAL = {"num_inference_steps": 25, "strength": 0.5, "guidance_scale": 5.0}
STEPS = 4
CALLS = int(USUAL["num_inference_steps"] * USUAL["strength"])
WARM_FRAMES = 6


@dataclass
class Contender:
    """One row in the making.

    Attributes:
        start: gives the method ready for a clip's prompt.
        nfe: pictures the denoiser sees for one frame.
        milliseconds: its own measurement of each push where it has one (the peer), else None.
    """

    name: str
    start: Callable[[str], Method]
    nfe: int
    milliseconds: list[float] | None = None
    runs: list[Run] = field(default_factory=list)
    failed: BaseException | None = None


def _plain(kind: type, pipe: Any, size: int) -> Callable[[str], Method]:
    return lambda prompt: StreamLoop(kind(pipe, prompt, height=size, width=size, **SETTINGS))


def _contenders(stack: ExitStack, size: int, compiled: bool, peer: bool) -> Iterator[Contender]:
    def fresh(plan: fastdiff.Plan | None = None) -> Any:
        pipe = load_pipeline(None, "image-to-image")
        if plan is not None:
            stack.enter_context(fastdiff.accelerate(pipe, plan))
        return pipe

    usual, equal = fresh(), fresh()
    yield Contender("diffusers", lambda prompt: DiffusersLoop(usual, prompt, SETTINGS["seed"], **USUAL), 2 * CALLS)
    yield Contender("diffusers-equal", lambda prompt: equal_loop(equal, prompt, SETTINGS["seed"], SETTINGS), STEPS)
    exact = fastdiff.Plan.of("exact")
    members = tuple(member for member in exact if not isinstance(member, Compile))
    whole = Compile(on_cpu=True)
    yield Contender("sequential", _plain(SequentialStream, fresh(), size), STEPS)
    if compiled:
        pipe = fresh(fastdiff.Plan((whole,)))
        yield Contender("sequential-compiled", _plain(SequentialStream, pipe, size), STEPS)
    yield Contender("fastdiff", _plain(Stream, fresh(exact), size), STEPS)
    if compiled:
        pipe = fresh(fastdiff.Plan((*members, whole)))
        yield Contender("fastdiff-compiled", _plain(Stream, pipe, size), STEPS)
    if peer:
        yield _peer(stack, fresh(), size)


def _peer(stack: ExitStack, pipe: Any, size: int) -> Contender:
    try:
        factor = pipe.vae_scale_factor
        blank = torch.empty(STEPS, pipe.unet.config.in_channels, size // factor, size // factor)
        timesteps = consistency_timesteps(pipe.scheduler, STEPS, SETTINGS["strength"])
        noise = draw(SETTINGS["seed"], 0, blank).numpy()
        peer = stack.enter_context(StreamDiffusionPeer(pipe, timesteps, noise, size, size))
    except (OSError, ChildProcessError) as error:
        return Contender("streamdiffusion", _never, STEPS, failed=error)

    def start(prompt: str) -> Method:
        with torch.no_grad():
            peer.prepare(pipe.encode_prompt(prompt, "cpu", 1, False)[0].numpy())
        return peer

    return Contender("streamdiffusion", start, STEPS, peer.milliseconds)


def _never(prompt: str) -> Method:
    raise RuntimeError("this method did not start")


def run(
    full: bool = False, size: int = 64, clips: int = 0, frames: int = 0, compiled: bool = True, peer: bool = True
) -> Record:
    """Runs the benchmark.

    Args:
        full: three times as many clips.
        clips, frames: how many clips of how many frames each; 0 chooses.
        compiled, peer: False leaves the compiled rows, or the peer's, out.
    """
    shots = [demo(seed, frames or 24, size) for seed in range(clips or (12 if full else 4))]
    record = Record("stream")
    with ExitStack() as stack:
        contenders = list(_contenders(stack, size, compiled, peer))
        for contender in contenders:
            _warm(contender, shots[0])
        for shot in shots:
            _clip([contender for contender in contenders if not contender.failed], shot)
    reference = next(contender for contender in contenders if contender.name == "sequential")
    record.rows = [_row(contender, reference, shots) for contender in contenders]
    return record.finish()


def _warm(contender: Contender, shot: Demo) -> None:
    """Compiles, allocates and fills caches, outside the measurement; a method that cannot start is set aside."""
    if contender.failed:
        return
    try:
        with _quiet():
            method = contender.start(shot.prompt)
            for frame_id, frame in enumerate(shot.frames[:WARM_FRAMES]):
                method.push(frame, frame_id)
            method.flush()
    except (Failure, RuntimeError, NotImplementedError, OSError) as error:
        contender.failed = error
    if contender.milliseconds is not None:
        contender.milliseconds.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Compilers warn about what a benchmark's reader need not know."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _clip(contenders: list[Contender], shot: Demo) -> None:
    runs = [Run(contender.name, contender.start(shot.prompt)) for contender in contenders]
    round_robin(runs, list(shot.frames))
    for contender, done in zip(contenders, runs, strict=True):
        contender.runs.append(done)


def _row(contender: Contender, reference: Contender, shots: list[Demo]) -> Row:
    if contender.failed:
        return could_not_run(contender.name, contender.failed)
    own = contender.milliseconds
    taken = own if own is not None else [ms for done in contender.runs for ms in done.milliseconds]
    row = Row.timed(contender.name, taken, nfe=contender.nfe)
    firsts = [done.first_frame_ms for done in contender.runs if done.first_frame_ms is not None]
    row.quality["first_frame_ms"] = Interval(median(firsts), min(firsts), max(firsts), len(firsts))
    largest, count = 0.0, 0
    for done, plain in zip(contender.runs, reference.runs, strict=True):
        for frame_id in done.images.keys() & plain.images.keys():
            largest = max(largest, float(np.abs(done.images[frame_id] - plain.images[frame_id]).max()))
            count += 1
    row.quality["max_abs_difference"] = Interval.exact(largest, count)
    pictures = [to_bytes(done.images[i]) for done in contender.runs for i in sorted(done.images)]
    truths = [shot.truths[i] for shot, done in zip(shots, contender.runs, strict=True) for i in sorted(done.images)]
    row.quality |= {name: mean_interval(right) for name, right in attributes(pictures, truths).items()}
    return row
