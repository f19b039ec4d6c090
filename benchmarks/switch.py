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
        for number, clips in switched(pipe, before, after, settings, anew).items():
            record.rows.append(Row(f"{name}-{number}", quality=read(clips, before, after)))
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
    pipe: Any, before: list[world.Scene], after: list[world.Scene], settings: dict[str, Any], anew: bool
) -> dict[int, np.ndarray]:
    """Frames uint8 [B, F, H, W, 3] of the chunks after the change, by their number."""
    asked, asked_then = ([world.caption(scene) for scene in scenes] for scenes in (before, after))
    with (
        ChunkRollout(pipe, height=wan.SIZE, width=wan.SIZE, steps=STEPS) as rollout,
        rollout.open(asked, **settings) as session,
    ):
        for _ in range(BEFORE):
            session.generate()
        session.update(prompts=tuple(asked_then))
        if not anew:
            session._due = session._said = (
                False  # the context is computed again on every change of words; here it is not
            )
        made = [chunk.frames for _ in range(AFTER[-1]) for chunk in session.generate()]
    return {number: made[number - 1] for number in AFTER}


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
