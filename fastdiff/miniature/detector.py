"""Reads a scene's attributes back from its pixels, by analysis alone: no weights, nothing learned.

Background and texture come from the palette, the object's colour from the pixels that are not background, and shape,
size and place from the best overlap (intersection over union) of the object's coverage with every shape at every
radius and shift, all shifts at once by Fourier transform. On renders every answer is right; on a blurred or half-drawn
picture the answer is the nearest thing the world holds, so accuracy falls gracefully towards chance.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .render import coverage, texture_mask
from .world import BACKGROUNDS, COLOURS, GROUNDS, POSITIONS, SHAPES, TEXTURES, TIMES, Scene

SIZE = 64
_PADDED = 96  # room for the largest shape beside the frame, so that no shift wraps round
_RADII = (0.14, 0.152, 0.164, 0.178, 0.2, 0.225, 0.242, 0.258, 0.274, 0.29)
_SMALL_BELOW = 0.206
ATTRIBUTES = ("background", "colour", "position", "shape", "size")


def _prepared(image: np.ndarray) -> np.ndarray:
    """Float32 [64, 64, 3] of any square-ish uint8 [H, W, 3]."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the detector reads uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if image.shape[:2] != (SIZE, SIZE):
        image = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX))
    return image.astype(np.float32)


@functools.lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, float]], np.ndarray, np.ndarray]:
    """Names, conjugate spectra [T, 96, 49], and the template's area inside the frame at every shift [T, 64, 64]."""
    names = [(shape, radius) for shape in SHAPES for radius in _RADII]
    # Centred on pixel (32, 32)'s corner, then rolled so that shift (i, j) puts the centre at (j, i) pixels.
    masks = np.stack([coverage(shape, SIZE, 0.5, 0.5, radius) for shape, radius in names])
    padded = np.zeros((len(names), _PADDED, _PADDED), np.float32)
    padded[:, :SIZE, :SIZE] = masks
    spectra = np.conj(np.fft.rfft2(np.roll(padded, (-SIZE // 2, -SIZE // 2), axis=(1, 2)))).astype(np.complex64)
    return names, spectra, _overlap(np.ones((SIZE, SIZE), np.float32), spectra)


def _overlap(alpha: np.ndarray, spectra: np.ndarray) -> np.ndarray:
    padded = np.zeros((_PADDED, _PADDED), np.float32)
    padded[:SIZE, :SIZE] = alpha
    product = np.fft.rfft2(padded).astype(np.complex64)[None] * spectra
    return np.fft.irfft2(product, s=(_PADDED, _PADDED)).astype(np.float32)[:, :SIZE, :SIZE]


def _fit(alpha: np.ndarray) -> tuple[str, float, float, float]:
    """Best shape, radius and centre (fractions of the side) for a coverage [64, 64]."""
    names, spectra, area = _templates()
    inter = _overlap(alpha, spectra)
    iou = inter / np.maximum(area + alpha.sum() - inter, 1e-3)
    best, row, column = np.unravel_index(int(iou.argmax()), iou.shape)
    shape, radius = names[int(best)]
    return shape, radius, float(column) / SIZE, float(row) / SIZE


def _background(pixels: np.ndarray) -> str:
    edge = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )

    def misfit(name: str) -> float:
        tones = np.array(BACKGROUNDS[name], np.float32)
        nearest = np.abs(edge[:, None] - tones).sum(-1).min(1)
        return float(np.minimum(nearest, 150).mean())

    return min(BACKGROUNDS, key=misfit)


def _labels(pixels: np.ndarray, background: str) -> np.ndarray:
    """Per pixel: the index of the nearest object colour, or -1 where the background's tones explain it as well."""
    names = [name for name in COLOURS if name != background]
    palette = np.array([COLOURS[name] for name in names], np.float32)
    to_object = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    first, second = np.array(BACKGROUNDS[background], np.float32)
    line = second - first
    along = np.clip(((pixels - first) @ line) / (line @ line), 0, 1)
    to_ground = np.linalg.norm(pixels - (first + along[..., None] * line), axis=-1)
    labels = np.array([list(COLOURS).index(name) for name in names])[to_object.argmin(-1)]
    return np.where(to_object.min(-1) < to_ground, labels, -1)


def _texture(pixels: np.ndarray, background: str, outside: np.ndarray) -> str:
    first, second = np.array(BACKGROUNDS[background], np.float32)
    line = second - first
    level = np.clip(((pixels - first) @ line) / (line @ line), 0, 1)
    return min(TEXTURES, key=lambda name: float(((level - texture_mask(name, SIZE)) ** 2)[outside].mean()))


def _ground_pixels(background: str, texture: str) -> np.ndarray:
    first, second = np.array(BACKGROUNDS[background], np.float32)
    return first + texture_mask(texture, SIZE)[..., None] * (second - first)


def _alpha(pixels: np.ndarray, ground: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Coverage of an object of this colour over this ground: [64, 64] in 0..1, faint values removed."""
    span = rgb - ground
    alpha = ((pixels - ground) * span).sum(-1) / np.maximum((span * span).sum(-1), 1.0)
    return np.clip((alpha - 0.2) / 0.6, 0, 1)


def _common(pixels: np.ndarray) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    background = _background(pixels)
    labels = _labels(pixels, background)
    outside = labels < 0 if (labels < 0).any() else np.ones_like(labels, bool)
    texture = _texture(pixels, background, outside)
    return {"background": background, "texture": texture}, labels, _ground_pixels(background, texture)


def _object(pixels: np.ndarray) -> tuple[dict[str, str], tuple[float, float]]:
    found, labels, ground = _common(pixels)
    counts = np.bincount(labels[labels >= 0], minlength=len(COLOURS))
    if counts.sum() == 0:
        return found, (0.5, 0.5)
    colour = int(counts.argmax())
    rgb = np.median(pixels[labels == colour], axis=0)
    shape, radius, x, y = _fit(_alpha(pixels, ground, rgb))
    position = min(POSITIONS, key=lambda name: (POSITIONS[name][0] - x) ** 2 + (POSITIONS[name][1] - y) ** 2)
    size = "small" if radius < _SMALL_BELOW else "big"
    return found | {"colour": list(COLOURS)[colour], "shape": shape, "size": size, "position": position}, (x, y)


def _pair(pixels: np.ndarray) -> dict[str, str]:
    found, labels, _ = _common(pixels)
    counts = np.bincount(labels[labels >= 0], minlength=len(COLOURS))
    first, second = (int(i) for i in np.argsort(-counts, kind="stable")[:2])
    if counts[second] == 0:
        return found
    centres = [np.argwhere(labels == index).mean(0) for index in (first, second)]
    dy, dx = centres[1] - centres[0]
    names = [list(COLOURS)[first], list(COLOURS)[second]]
    horizontal = abs(dx) > abs(dy)
    if (dx if horizontal else dy) < 0:
        names.reverse()
    return found | {
        "colours": " ".join(sorted(names)),
        "relation": (" left of " if horizontal else " above ").join(names),
    }


def _landscape(pixels: np.ndarray) -> dict[str, str]:
    def distance(box: np.ndarray, rgb) -> float:
        return float(np.linalg.norm(box.reshape(-1, 3).mean(0) - np.asarray(rgb, np.float32)))

    sky, floor = pixels[2:8, 28:36], pixels[58:63]
    time = min(TIMES, key=lambda name: distance(sky, TIMES[name][0]))
    dim = 0.6 if time == "night" else 1.0
    ground = min(GROUNDS, key=lambda name: distance(floor, np.array(GROUNDS[name]) * dim))
    left, right = (distance(pixels[8:15, start : start + 7], TIMES[time][1]) for start in (8, 49))
    return {"ground": ground, "time": time, "side": "left" if left < right else "right"}


def detect(image: np.ndarray, kind: str = "object") -> dict[str, str]:
    """Attributes of a picture uint8 [H, W, 3] of this kind of scene ("object", "moving", "pair", "landscape").

    The keys are those of `Scene.attributes`; one that cannot be seen at all (an empty picture has no colour) is absent.
    """
    pixels = _prepared(image)
    if kind == "landscape":
        return _landscape(pixels)
    return _pair(pixels) if kind == "pair" else _object(pixels)[0]


def locate(image: np.ndarray) -> tuple[float, float]:
    """Centre (x, y) of the object in fractions of the side, for tracks of moving scenes."""
    return _object(_prepared(image))[1]


def measure(image: np.ndarray) -> np.ndarray:
    """Centre x and y, area (fractions of the picture), and red, green and blue (0..1) of the object; NaN where none is.

    Finer than `detect`: what a caption leaves open varies here, and how much it does is known from renders.
    """
    pixels = _prepared(image)
    _, labels, ground = _common(pixels)
    counts = np.bincount(labels[labels >= 0], minlength=len(COLOURS))
    if counts.sum() == 0:
        return np.full(6, np.nan)
    rgb = np.median(pixels[labels == int(counts.argmax())], axis=0)
    alpha = _alpha(pixels, ground, rgb)
    if alpha.sum() == 0:
        return np.full(6, np.nan)
    axis = (np.arange(SIZE) + 0.5) / SIZE
    centre = (alpha.sum(0) @ axis, alpha.sum(1) @ axis)
    return np.array([*(value / alpha.sum() for value in centre), alpha.mean(), *(rgb / 255)])


def score(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Whether each attribute is right: float64 [n] of 1 and 0 per attribute, NaN where a scene does not have it."""
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes")
    truths = [scene.attributes for scene in scenes]
    found = [detect(image, scene.kind) for image, scene in zip(images, scenes, strict=True)]
    keys = sorted({key for truth in truths for key in truth})
    return {
        key: np.array(
            [
                float(seen.get(key) == truth[key]) if key in truth else np.nan
                for seen, truth in zip(found, truths, strict=True)
            ]
        )
        for key in keys
    }
