"""Moving scenes on a torus: what leaves the picture on one side enters it on the other.

So a scene has no beginning and no end: its colours, its shape and its velocity are as true in the thousandth frame as
in the first, and whatever a model changes over a long clip is the model's own drift. One big object on a plain
background; the words are those of `world`.
"""

from dataclasses import replace

import numpy as np

from . import world
from .render import distance

SIZE = 32
FRAMES = 17


def scene(rng: np.random.Generator, **fixed: str) -> world.Scene:
    """A moving scene; `fixed` pins `background colour shape direction pace`. The object starts anywhere."""
    direction = fixed.pop("direction", None) or str(rng.choice(list(world.DIRECTIONS)))
    pace = fixed.pop("pace", None) or str(rng.choice(list(world.PACES)))
    still = world.object_scene(rng, texture="plain", size="big", position="center", **fixed)
    x, y = (float(value) for value in rng.random(2))
    thing = replace(still.things[0], x=x, y=y, position="")
    return replace(still, things=(thing,), motion=world.Motion(direction, pace))


def otherwise(seen: world.Scene, rng: np.random.Generator) -> world.Scene:
    """A scene that moves as this one does, from where it does, with one to three of its other words changed."""
    words = truth(seen)
    choices = {"background": world.BACKGROUNDS, "colour": world.COLOURS, "shape": world.SHAPES}
    changed = rng.permutation(list(choices))[: rng.integers(1, len(choices) + 1)]
    made = dict(words)
    while made == words or made["colour"] == made["background"]:
        made |= {name: str(rng.choice([one for one in choices[name] if one != words[name]])) for name in changed}
    new, old = scene(rng, **made), seen.things[0]
    return replace(new, things=(replace(new.things[0], x=old.x, y=old.y),))


def centres(scene: world.Scene, frames: int, first: int = 0) -> np.ndarray:
    """The object's true centres (x, y) from frame `first` on: float64 [frames, 2] in 0..1."""
    assert scene.motion is not None
    thing = scene.things[0]
    steps = np.arange(first, first + frames, dtype=np.float64)[:, None]
    return (np.array([thing.x, thing.y]) + steps * np.array(scene.motion.velocity)) % 1.0


def cover(shape: str, size: int, places: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel the object covers at these centres [n, 2]: float32 [n, size, size] in 0..1."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    places = places.astype(np.float32)
    x = (axis[None, None, :] - places[:, 0, None, None] + 0.5) % 1 - 0.5  # [n, 1, W]
    y = (axis[None, :, None] - places[:, 1, None, None] + 0.5) % 1 - 0.5  # [n, H, 1]
    x, y = np.broadcast_arrays(x, y)
    return np.clip(0.5 - distance(shape, x, y, radius) * size, 0, 1)


def render(scene: world.Scene, frames: int = FRAMES, size: int = SIZE, first: int = 0) -> np.ndarray:
    """Frames `first` to `first + frames` as uint8 [frames, size, size, 3].

    Raises:
        ValueError: a scene that does not move, or a size or number of frames outside 8..1024 and 1 or more.
    """
    if scene.motion is None or len(scene.things) != 1 or scene.texture != "plain":
        raise ValueError("this is no moving scene: make one with moving.scene(rng)")
    if frames < 1 or not 8 <= size <= 1024:
        raise ValueError(f"{frames} frames of {size} pixels: give at least one frame and a size in 8..1024")
    thing = scene.things[0]
    alpha = cover(thing.shape, size, centres(scene, frames, first), thing.radius)[..., None]
    ground = np.asarray(world.BACKGROUNDS[scene.background][0], np.float32)
    picture = ground + alpha * (np.asarray(thing.rgb, np.float32) - ground)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def truth(scene: world.Scene) -> dict[str, str]:
    """The caption's words that `moving_detector.read` reads back."""
    assert scene.motion is not None
    thing = scene.things[0]
    return {
        "background": scene.background,
        "colour": thing.colour,
        "shape": thing.shape,
        "direction": scene.motion.direction,
        "pace": scene.motion.pace,
    }
