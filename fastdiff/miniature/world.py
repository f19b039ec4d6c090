"""The miniature world: scenes with known truth, and the captions that describe them.

A scene is a frozen description; `render.render` turns it into pixels and `caption` into words. Everything is drawn
from a `numpy.random.Generator`, so a seed names a scene for ever. Lengths are fractions of the picture's side, so a
scene has no resolution of its own.
"""

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 225, 50),
    "green": (40, 150, 60),
    "blue": (45, 80, 215),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
# Two tones each: the ground itself, and the second tone of its texture.
BACKGROUNDS = {
    "white": ((245, 245, 245), (200, 200, 200)),
    "black": ((15, 15, 15), (62, 62, 62)),
    "gray": ((128, 128, 128), (100, 100, 100)),
    "blue": ((45, 80, 215), (30, 55, 150)),
    "green": ((40, 150, 60), (26, 104, 42)),
    "pink": ((250, 160, 190), (208, 126, 152)),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.16, "big": 0.26}
POSITIONS = {"center": (0.5, 0.5), "left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LANDMARKS = ("house", "tree", "mountain")
GROUNDS = {"grass": (70, 160, 60), "sand": (225, 195, 120), "snow": (240, 245, 250), "water": (50, 110, 190)}
TIMES = {
    "day": ((135, 195, 240), (255, 230, 90)),
    "night": ((18, 20, 60), (235, 235, 225)),
    "sunset": ((245, 130, 70), (255, 70, 40)),
}
LANDMARK_COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PACES = {"slowly": 0.008, "quickly": 0.02}


@dataclass(frozen=True)
class Thing:
    """One object: named attributes, and the exact numbers that were drawn for them.

    `x`, `y` is the centre and `radius` the size in fractions of the side; `rgb` in 0..255.
    """

    shape: str
    colour: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Motion:
    """A straight path that is reflected at the frame's edges: `direction` and `pace` are the caption's words."""

    direction: str
    pace: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Fractions of the side per frame, (x, y)."""
        dx, dy = DIRECTIONS[self.direction]
        return dx * PACES[self.pace], dy * PACES[self.pace]


@dataclass(frozen=True)
class Landscape:
    """A landmark on some ground, at a time of day, with the sun or moon on one side."""

    landmark: str
    colour: str
    ground: str
    time: str
    side: str
    x: float
    horizon: float


@dataclass(frozen=True)
class Scene:
    """What is in the picture. Exactly one of `things` (one, or two with a `relation`) and `landscape` is set."""

    background: str = "white"
    texture: str = "plain"
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    motion: Motion | None = None
    landscape: Landscape | None = None

    @property
    def kind(self) -> str:
        """ "object", "pair", "moving" or "landscape"."""
        if self.landscape:
            return "landscape"
        if self.motion:
            return "moving"
        return "pair" if len(self.things) == 2 else "object"

    @property
    def attributes(self) -> dict[str, str]:
        """The named truth of this scene, with the detector's keys."""
        if self.landscape:
            land = self.landscape
            return {"ground": land.ground, "time": land.time, "side": land.side}
        truth = {"background": self.background, "texture": self.texture}
        if self.relation:
            # Canonical, since "a left of b" is "b right of a": only "left of" and "above" are said.
            names = [thing.colour for thing in self.things]
            swap = self.relation in ("right of", "below")
            word = "left of" if self.relation in ("left of", "right of") else "above"
            relation = f" {word} ".join(names[::-1] if swap else names)
            return truth | {"colours": " ".join(sorted(names)), "relation": relation}
        thing = self.things[0]
        truth |= {"colour": thing.colour, "shape": thing.shape, "size": thing.size}
        return truth if self.motion else truth | {"position": thing.position}


def _pick(rng: np.random.Generator, names) -> str:
    names = tuple(names)
    return names[int(rng.integers(len(names)))]


def _thing(rng, colour: str, shape: str, size: str, position: str, centre, radius: float) -> Thing:
    x, y = (float(c + rng.uniform(-0.03, 0.03)) for c in centre)
    r, g, b = (int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-8, 9, 3), 0, 255))
    return Thing(shape, colour, size, position, x, y, float(radius * rng.uniform(0.94, 1.06)), (r, g, b))


def _ground(rng) -> tuple[str, str]:
    texture = "plain" if rng.random() < 0.4 else _pick(rng, TEXTURES[1:])
    return _pick(rng, BACKGROUNDS), texture


def object_scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """One object on a textured background; `fixed` pins `background texture colour shape size position`."""
    background, texture = _ground(rng)
    background, texture = fixed.get("background", background), fixed.get("texture", texture)
    colour = fixed.get("colour") or _pick(rng, [c for c in COLOURS if c != background])
    if colour == background:
        raise ValueError(f"a {colour} object on a {background} background cannot be seen: choose another colour")
    shape, size = fixed.get("shape") or _pick(rng, SHAPES), fixed.get("size") or _pick(rng, SIZES)
    position = fixed.get("position") or _pick(rng, POSITIONS)
    thing = _thing(rng, colour, shape, size, position, POSITIONS[position], SIZES[size])
    return Scene(background, texture, (thing,))


def pair_scene(rng: np.random.Generator) -> Scene:
    """Two small objects of different colours, one `relation` the other."""
    background, texture = _ground(rng)
    free = [c for c in COLOURS if c != background]
    colours = [free[i] for i in rng.permutation(len(free))[:2]]
    relation = _pick(rng, RELATIONS)
    dx, dy = RELATIONS[relation]
    centres = [(0.5 + 0.22 * dx * s, 0.5 + 0.22 * dy * s) for s in (1, -1)]
    things = tuple(
        _thing(rng, c, _pick(rng, SHAPES), "small", "", centre, SIZES["small"])
        for c, centre in zip(colours, centres, strict=True)
    )
    return Scene(background, texture, things, relation=relation)


def landscape_scene(rng: np.random.Generator) -> Scene:
    """A house, tree or mountain under a sky."""
    landscape = Landscape(
        landmark=_pick(rng, LANDMARKS),
        colour=_pick(rng, LANDMARK_COLOURS),
        ground=_pick(rng, GROUNDS),
        time=_pick(rng, TIMES),
        side=_pick(rng, ("left", "right")),
        x=float(rng.uniform(0.42, 0.58)),
        horizon=float(rng.uniform(0.64, 0.7)),
    )
    return Scene(landscape=landscape)


def moving_scene(rng: np.random.Generator, direction: str | None = None, pace: str | None = None) -> Scene:
    """One object crossing the picture; it starts on the side it moves away from."""
    motion = Motion(direction or _pick(rng, DIRECTIONS), pace or _pick(rng, PACES))
    dx, dy = DIRECTIONS[motion.direction]
    scene = object_scene(rng, position="center")
    thing = replace(scene.things[0], x=scene.things[0].x - 0.18 * dx, y=scene.things[0].y - 0.18 * dy, position="")
    return replace(scene, things=(thing,), motion=motion)


def random_scene(rng: np.random.Generator, kinds: tuple[float, float, float] = (0.7, 0.15, 0.15)) -> Scene:
    """A still scene: one object, a pair, or a landscape with the probabilities `kinds`."""
    draw = (object_scene, pair_scene, landscape_scene)
    return draw[int(rng.choice(3, p=np.array(kinds) / sum(kinds)))](rng)


_PLACES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def caption(scene: Scene, rng: np.random.Generator | None = None, drop: float = 0.0) -> str:
    """The scene in words. With `rng`, each optional word (size, place, texture) is left out with probability `drop`."""
    keep = (lambda: True) if rng is None else (lambda: bool(rng.random() >= drop))
    if scene.landscape:
        land = scene.landscape
        light = "moon" if land.time == "night" else "sun"
        where = f" with the {light} on the {land.side}" if keep() else ""
        return f"a {land.colour} {land.landmark} on {land.ground} at {land.time}{where}"
    texture = f"{scene.texture} " if keep() else ""
    ground = f"on a {texture}{scene.background} background"
    if scene.relation:
        first, second = scene.things
        return f"a {first.colour} {first.shape} {scene.relation} a {second.colour} {second.shape} {ground}"
    thing = scene.things[0]
    words = ["a", *([thing.size] if keep() else []), thing.colour, thing.shape]
    if scene.motion:
        words += ["moving", scene.motion.direction, scene.motion.pace]
    elif keep():
        words.append(_PLACES[thing.position])
    return " ".join([*words, ground])


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, sorted."""
    words = {"a", "on", "the", "in", "at", "of", "with", "sun", "moon", "moving", "background", "above", "below"}
    for names in (
        SHAPES,
        COLOURS,
        BACKGROUNDS,
        TEXTURES,
        SIZES,
        POSITIONS,
        LANDMARKS,
        GROUNDS,
        TIMES,
        DIRECTIONS,
        PACES,
    ):
        words |= set(names)
    return tuple(sorted(words))
