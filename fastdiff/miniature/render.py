"""Pixels of a scene, exactly and at any size: signed distances with one pixel of analytic anti-aliasing."""

import functools
from dataclasses import replace

import numpy as np

from .world import BACKGROUNDS, COLOURS, GROUNDS, TIMES, Landscape, Scene, Thing


@functools.lru_cache(maxsize=16)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in fractions of the side: x and y, each float32 [size, size]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    return x, y


def _box(x, y, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (negative inside) of the named shape of this `radius` centred on the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return _box(x, y, 0.84 * radius, 0.84 * radius)
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.18 * radius) * 0.7071
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.5 * radius, y - 0.62 * radius)
    if shape == "cross":
        return np.minimum(_box(x, y, radius, 0.32 * radius), _box(x, y, 0.32 * radius, radius))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, size: int, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers: float32 [size, size] in 0..1."""
    gx, gy = _grid(size)
    return np.clip(0.5 - distance(shape, gx - x, gy - y, radius) * size, 0, 1)


@functools.lru_cache(maxsize=64)
def texture_mask(texture: str, size: int) -> np.ndarray:
    """Where the background's second tone shows: float32 [size, size] in 0..1."""
    x, y = _grid(size)
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        return _soft(np.sin(2 * np.pi * 4 * y), size / 25)
    if texture == "dotted":
        dx, dy = (x * 4) % 1 - 0.5, (y * 4) % 1 - 0.5
        return np.clip(0.5 - (np.hypot(dx, dy) - 0.27) * size / 4, 0, 1)
    if texture == "checkered":
        return _soft(np.sin(2 * np.pi * 2 * x) * np.sin(2 * np.pi * 2 * y), size / 12)
    raise ValueError(f"unknown texture {texture!r}")


def _soft(wave: np.ndarray, slope: float) -> np.ndarray:
    return np.clip(0.5 + wave * slope, 0, 1).astype(np.float32)


def _paint(canvas: np.ndarray, alpha: np.ndarray, rgb) -> None:
    canvas += alpha[..., None] * (np.asarray(rgb, np.float32) - canvas)


def _landscape(land: Landscape, size: int) -> np.ndarray:
    x, y = _grid(size)
    sky, light = TIMES[land.time]
    dim = 0.6 if land.time == "night" else 1.0
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = sky
    sun_x = 0.18 if land.side == "left" else 0.82
    _paint(canvas, coverage("circle", size, sun_x, 0.18, 0.1), light)
    rgb = np.array(COLOURS[land.colour], np.float32) * dim
    base = land.horizon + 0.04
    dx = x - land.x
    if land.landmark == "house":
        _paint(canvas, np.clip(0.5 - _box(dx, y - base + 0.14, 0.17, 0.14) * size, 0, 1), rgb)
        roof = np.maximum(np.abs(dx) * 0.65 - (y - base + 0.44) * 0.76, y - base + 0.28)
        _paint(canvas, np.clip(0.5 - roof * size, 0, 1), rgb * 0.6)
    elif land.landmark == "tree":
        _paint(canvas, np.clip(0.5 - _box(dx, y - base + 0.1, 0.035, 0.1) * size, 0, 1), np.array((110, 70, 35)) * dim)
        _paint(canvas, coverage("circle", size, land.x, base - 0.32, 0.17), rgb)
    else:
        peak = np.maximum(np.abs(dx) * 0.8 - (y - base + 0.5) * 0.6, y - base)
        _paint(canvas, np.clip(0.5 - peak * size, 0, 1), rgb)
        cap = np.maximum(peak, y - base + 0.36)
        _paint(canvas, np.clip(0.5 - cap * size, 0, 1), (250 * dim,) * 3)
    _paint(canvas, np.clip(0.5 + (y - land.horizon - 0.02) * size, 0, 1), np.array(GROUNDS[land.ground]) * dim)
    return canvas


def _draw(canvas: np.ndarray, thing: Thing) -> None:
    _paint(canvas, coverage(thing.shape, canvas.shape[0], thing.x, thing.y, thing.radius), thing.rgb)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The scene as uint8 [size, size, 3]; `size` in 8..4096 pixels."""
    if not 8 <= size <= 4096:
        raise ValueError(f"size {size} is outside 8..4096 pixels")
    if scene.landscape:
        canvas = _landscape(scene.landscape, size)
    else:
        ground, second = BACKGROUNDS[scene.background]
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = ground
        _paint(canvas, texture_mask(scene.texture, size), second)
        for thing in scene.things:
            _draw(canvas, thing)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _reflect(start: float, velocity: float, frame: int, margin: float) -> float:
    """Position after `frame` steps on a line that is reflected at `margin` and 1 - margin."""
    span = 1 - 2 * margin
    phase = (start - margin + velocity * frame) % (2 * span)
    return margin + (phase if phase <= span else 2 * span - phase)


def centre_at(scene: Scene, frame: int) -> tuple[float, float]:
    """The moving object's true centre (x, y) in fractions of the side at this frame."""
    thing, motion = scene.things[0], scene.motion
    if motion is None:
        return thing.x, thing.y
    vx, vy = motion.velocity
    margin = min(thing.radius + 0.02, thing.x, 1 - thing.x, thing.y, 1 - thing.y)
    return _reflect(thing.x, vx, frame, margin), _reflect(thing.y, vy, frame, margin)


def render_clip(scene: Scene, frames: int, size: int = 64) -> np.ndarray:
    """A moving scene as uint8 [frames, size, size, 3]; a scene without motion stands still."""
    if frames < 1:
        raise ValueError(f"a clip has at least one frame, not {frames}")
    if scene.landscape or not scene.motion:
        return np.repeat(render(scene, size)[None], frames, axis=0)
    clip = []
    for frame in range(frames):
        x, y = centre_at(scene, frame)
        clip.append(render(replace(scene, things=(replace(scene.things[0], x=x, y=y),)), size))
    return np.stack(clip)
