"""The main job's own input: a clip of the miniature world, and what a right answer to it looks like."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from fastdiff.miniature.world import Scene


@dataclass(frozen=True)
class Demo:
    """A clip to transform and the truth to hold the result against.

    Attributes:
        frames: uint8 [F, size, size, 3].
        prompt: what the stream is asked for.
        truths: for each frame the scene it should become: the prompt's words, at the place the frame shows.
    """

    frames: "np.ndarray"
    prompt: str
    truths: "tuple[Scene, ...]"


def demo(seed: int = 3, frames: int = 120, size: int = 64) -> Demo:
    """One object moves across the picture; the prompt asks for the same object in another colour."""
    import numpy as np

    from fastdiff.miniature import render, world

    rng = np.random.default_rng(seed)
    scene = world.moving_scene(rng, direction="right", pace="slowly")
    thing = scene.things[0]
    # a neighbour in hue, which an edit of medium strength can reach
    wanted = next(c for c in _REPAINTED[thing.colour] if c != scene.background)
    prompt = f"a {thing.size} {wanted} {thing.shape} on a {scene.texture} {scene.background} background"
    truths = []
    for frame in range(frames):
        x, y = render.centre_at(scene, frame)
        place = min(
            world.POSITIONS, key=lambda name: (world.POSITIONS[name][0] - x) ** 2 + (world.POSITIONS[name][1] - y) ** 2
        )
        moved = replace(thing, x=x, y=y, position=place, colour=wanted, rgb=world.COLOURS[wanted])
        truths.append(replace(scene, things=(moved,), motion=None))
    return Demo(render.render_clip(scene, frames, size), prompt, tuple(truths))


_REPAINTED = {
    "red": ("orange", "purple"),
    "orange": ("yellow", "red"),
    "yellow": ("orange", "green"),
    "green": ("blue", "yellow"),
    "blue": ("purple", "green"),
    "purple": ("blue", "red"),
    "white": ("yellow", "orange"),
    "black": ("blue", "purple"),
}


def attributes(images: "list[np.ndarray]", truths: "list[Scene]") -> "dict[str, np.ndarray]":
    """Right (1) or wrong (0) per picture for background, colour, position, shape and size; images uint8 [H, W, 3]."""
    from fastdiff.miniature import detector

    scores = detector.score(images, truths)
    return {name: scores[name] for name in ("background", "colour", "position", "shape", "size")}
