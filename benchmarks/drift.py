"""`bench drift`: does a rollout without end keep to its words, and which remedy against drift does what?

The embedded `mini-wan` with its student, several prompts side by side, 1,000 chunks each. Rows are `<setting>-<chunk>`;
settings are those of `bench video`'s `fastdiff` row with one thing changed:
    rolling: as it is: four frames of context, positions relative to the cache, chunks in flight together.
    sinks: the first frame of the context stays for good.
    sinks-evicted: it gives way when it is no longer like what is made.
    absolute: positions counted from the first frame on, as models that cannot roll do.
    recache: the context computed anew every 16 chunks.
    noised: finished frames enter the context at a noise level of 0.05.
    clean: one chunk at a time, finished frames only (Self-Forcing's way); `clean-absolute` with positions as above.
    autoencoder: the scenes themselves, encoded and decoded chunk by chunk: the most a rollout can reach.

`attribute` is the mean over background, colour, shape, direction and pace as the detector reads the 16 frames up to
that chunk, `track_error_px` the distance from a line of the caption's velocity; `attribute_change` is paired with the
first mark of the same setting. Nothing is timed.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.moving import SEED
from benchmarks.record import Record, Row
from fastdiff.miniature import moving, moving_detector, wan, wan_rollout, wan_training, world
from fastdiff.quality import mean_interval, paired_difference
from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff_pipelines.rollout import ChunkRollout

STEPS = 4
MARKS = (10, 30, 100, 300, 1000)
_ONE = {"batched": False, "kind": "clean"}
SETTINGS: dict[str, dict[str, Any]] = {
    "rolling": {},
    "sinks": {"sinks": 1},
    "sinks-evicted": {"sinks": 1, "evict_below": 0.7},
    "absolute": {"positions": "absolute"},
    "recache": {"recache_every": 16},
    "noised": {"level": 0.05},
    "clean": _ONE,
    "clean-absolute": {**_ONE, "positions": "absolute"},
}

CEILING = "autoencoder"


def run(full: bool = False, pipe: Any = None, rollouts: int = 0, only: str | None = None) -> Record:
    """Runs the benchmark.

    Args:
        full: 128 rollouts of each setting instead of 16.
        pipe: the pipeline to measure; the embedded one, with its student, where None.
        rollouts: how many; 0 chooses.
        only: one of `SETTINGS`, or `CEILING`.
    """
    from benchmarks.video import embedded

    pipe, missing = (pipe, "") if pipe is not None else embedded()
    record = Record("drift")
    if missing:
        record.rows = [Row(name, note=missing) for name in (*SETTINGS, CEILING)]
        return record.finish()
    scenes = scenes_of(rollouts or (128 if full else 16))
    for name, settings in SETTINGS.items():
        if only in (None, name):
            record.rows += rows(name, followed(pipe, scenes, MARKS, **settings))
    if only in (None, CEILING):
        record.rows += rows(CEILING, _seen(_through_autoencoder(pipe, scenes, MARKS[-1]), scenes, MARKS))
    return record.finish()


def scenes_of(count: int) -> list[world.Scene]:
    """Scenes that no training run draws."""
    rng = np.random.default_rng(SEED + 1)
    return [moving.scene(rng) for _ in range(count)]


def followed(
    pipe: Any, scenes: list[world.Scene], marks: Sequence[int], **settings: Any
) -> dict[int, dict[str, np.ndarray]]:
    """What the detector reads at each mark, of rollouts of the scenes' captions side by side: float64 ``[n]`` each."""
    with ChunkRollout(pipe, height=wan.SIZE, width=wan.SIZE, steps=STEPS) as rollout:
        captions = [world.caption(scene) for scene in scenes]
        return _seen(rollout(captions, chunks=marks[-1], **settings), scenes, marks)


def _through_autoencoder(pipe: Any, scenes: list[world.Scene], chunks: int) -> Iterator[np.ndarray]:
    """Chunks uint8 ``[B, 1 or 4, H, W, 3]`` of the scenes, each encoded and decoded after those before it."""
    session, first = StreamingVAE(pipe.vae), 0
    for count in itertools.islice(itertools.chain([1], itertools.repeat(wan.PER_LATENT)), chunks):
        drawn = wan_training.pixels([moving.render(scene, count, wan.SIZE, first) for scene in scenes])
        latents = session.encode(drawn.to(pipe.vae.device, pipe.vae.dtype))
        assert latents is not None, "a whole chunk makes a latent, and that a chunk again"
        frames = session.decode(latents)
        assert frames is not None
        yield wan_rollout.as_uint8(frames).cpu().numpy()
        first += count


@torch.no_grad()
def _seen(
    chunks: Iterable[np.ndarray], scenes: list[world.Scene], marks: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    recent: list[np.ndarray] = []
    found = {}
    for number, frames in enumerate(chunks, start=1):
        recent = [*recent, frames][-4:]
        if number in marks:
            found[number] = _read(np.concatenate(recent, axis=1), scenes)
    return found


def _read(clips: np.ndarray, scenes: list[world.Scene]) -> dict[str, np.ndarray]:
    found = moving_detector.score(list(clips), scenes)
    return found | {"attribute": np.mean([found[name] for name in moving_detector.ATTRIBUTES], axis=0)}


def rows(name: str, found: dict[int, dict[str, np.ndarray]]) -> list[Row]:
    """`<name>-<mark>`, one a mark, each against the first."""
    first = next(iter(found))
    made = []
    for mark, seen in found.items():
        quality = {figure: mean_interval(values) for figure, values in seen.items()}
        if mark != first:
            quality["attribute_change"] = paired_difference(seen["attribute"], found[first]["attribute"], seed=0)
        made.append(Row(f"{name}-{mark}", quality=quality))
    return made


def plot(record: Record, picture: Path) -> None:
    """`attribute` over chunks, a line a setting, its 95 % interval behind it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in (*SETTINGS, CEILING):
        seen = [row.quality["attribute"] for mark in MARKS for row in record.rows if row.method == f"{name}-{mark}"]
        if len(seen) == len(MARKS):
            (line,) = axes.plot(MARKS, [one.value for one in seen], marker="o", label=name)
            band = [one.low for one in seen], [one.high for one in seen]
            axes.fill_between(MARKS, *band, alpha=0.08, color=line.get_color())
    axes.set(xscale="log", xlabel="chunk", ylabel="attributes right", ylim=(0, 1.02))
    axes.set_xticks(MARKS, [f"{mark:,}" for mark in MARKS])
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
