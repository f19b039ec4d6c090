"""`bench switch`: another colour is asked for in the middle of a video; how soon is it there, and the old one gone?

The embedded `mini-wan` with its student, several prompts side by side. Rows are `<setting>-<chunk>`, chunks counted
from the first that comes out after the change:
    rolling: as it streams; chunks in flight begin again under the new words.
    once: as `rolling`, but the first chunk under them is decoded once only, by a decoder that remembers the old ones.
    clean: one chunk at a time.
    kept: as `clean`, but what was remembered is left as it was under the old words.

`new_colour` and `old_colour` are the shares of videos whose four frames of that chunk show that colour, `attribute` the
mean over the new words by the detector. Nothing is timed.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.drift import STEPS, scenes_of
from benchmarks.record import Record, Row
from fastdiff.miniature import moving, moving_detector, wan, world
from fastdiff.quality import mean_interval
from fastdiff_pipelines.rollout import ChunkRollout

BEFORE, AFTER = 12, (1, 2, 3, 4, 8)
_ONE = {"batched": False, "kind": "clean"}
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "rolling": ({}, True),
    "once": ({"redecode": 0}, True),
    "clean": (_ONE, True),
    "kept": (_ONE, False),
}


def run(full: bool = False, pipe: Any = None, rollouts: int = 0) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many videos.
        pipe: the pipeline to measure; the embedded one, with its student, where None.
        rollouts: how many videos; 0 chooses.
    """
    from benchmarks.video import embedded

    pipe, missing = (pipe, "") if pipe is not None else embedded()
    record = Record("switch")
    if missing:
        record.rows = [Row(name, note=missing) for name in SETTINGS]
        return record.finish()
    before = scenes_of(rollouts or (128 if full else 32))
    after = recoloured(before)
    for name, (settings, anew) in SETTINGS.items():
        _, chunks = switched(pipe, before, after, settings, anew)
        for number in AFTER:
            record.rows.append(Row(f"{name}-{number}", quality=read(chunks[number - 1], before, after)))
    return record.finish()


def recoloured(scenes: list[world.Scene]) -> list[world.Scene]:
    """The same scenes in another colour each, which is not their background's either."""
    rng, made = np.random.default_rng(0), []
    for scene in scenes:
        words = moving.truth(scene)
        others = [name for name in world.COLOURS if name not in (words["colour"], scene.background)]
        made.append(moving.scene(rng, **{**words, "colour": str(rng.choice(others))}))
    return made


@torch.no_grad()
def switched(
    pipe: Any, before: list[world.Scene], after: list[world.Scene], settings: dict[str, Any], anew: bool = True
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Chunks uint8 [B, F, H, W, 3] that came out before the change and after it."""
    asked, asked_then = ([world.caption(scene) for scene in scenes] for scenes in (before, after))
    with (
        ChunkRollout(pipe, height=wan.SIZE, width=wan.SIZE, steps=STEPS) as rollout,
        rollout.open(asked, **settings) as session,
    ):
        made = [chunk.frames for _ in range(BEFORE) for chunk in session.generate()]
        session.update(prompts=tuple(asked_then))
        if not anew:
            session._due = session._said = False  # the context is computed again on every change of words; here not
        return made, [chunk.frames for _ in range(AFTER[-1]) for chunk in session.generate()]


def sheet(pipe: Any, videos: int = 8, shown: tuple[int, int] = (2, 5)) -> Image.Image:
    """Videos around the change, one a line: every other frame of the last chunks before it and of the first after."""
    scenes = scenes_of(videos)
    before, after = switched(pipe, scenes, recoloured(scenes), SETTINGS["rolling"][0])
    halves = [np.concatenate(part, axis=1)[:, ::2] for part in (before[-shown[0] :], after[: shown[1]])]
    lines = [
        np.concatenate([np.concatenate(list(half), axis=1) for half in pair], axis=1)
        for pair in zip(*halves, strict=True)
    ]
    made = Image.fromarray(np.concatenate(lines))
    made = made.resize((2 * made.width, 2 * made.height), Image.Resampling.NEAREST)
    place = 2 * wan.SIZE * halves[0].shape[1]
    ImageDraw.Draw(made).line([(place, 0), (place, made.height)], "red", 3)
    return made


def read(clips: np.ndarray, before: list[world.Scene], after: list[world.Scene]) -> dict[str, Any]:
    """What the detector sees of the new words, and of the old colour, in clips ``[B, F, H, W, 3]``."""
    seen = [moving_detector.look(clip).colour for clip in clips]
    found = moving_detector.score(list(clips), after)
    return {
        "new_colour": mean_interval(_share(seen, after)),
        "old_colour": mean_interval(_share(seen, before)),
        "attribute": mean_interval(np.mean([found[name] for name in moving_detector.ATTRIBUTES], axis=0)),
    }


def _share(seen: list[str], scenes: list[world.Scene]) -> np.ndarray:
    return np.array([name == scene.things[0].colour for name, scene in zip(seen, scenes, strict=True)], float)
