"""Reads a moving scene back from its frames, by analysis alone: what it shows, where it goes, and how steadily.

Works on the torus of `moving`: overlaps with every shape at every shift come from circular correlation, places are
circular means. On renders every word is right and tracks are true to a tenth of a pixel.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import moving, world
from .world import BACKGROUNDS, COLOURS, DIRECTIONS, PACES, SHAPES

ATTRIBUTES = ("background", "colour", "shape", "direction", "pace")
_RADII = (0.2, 0.22, 0.235, 0.248, 0.26, 0.272, 0.285, 0.3)
_FAINT, _FULL = 0.2, 0.8  # coverage below the first is background, above the second object
_SEEN = (0.5, 2.0)  # areas, as parts of the typical one, at which an object still counts as there
_OUTSIDE = 0.02  # coverage of a pixel that is background


@dataclass(frozen=True)
class Sighting:
    """What one clip shows.

    Attributes:
        background, colour, shape: the words, by vote over the frames; colour and shape "" where nothing is seen.
        places: centres (x, y) in fractions of the side, float64 [F, 2]; NaN where nothing is seen.
        areas: the object's share of the picture, float64 [F].
        flicker: mean change of the pixels outside the object from frame to frame, as a part of full scale.
    """

    background: str
    colour: str
    shape: str
    places: np.ndarray
    areas: np.ndarray
    flicker: float

    @property
    def steps(self) -> np.ndarray:
        """Displacement from frame to frame, float64 [F - 1, 2] in -0.5..0.5."""
        return (np.diff(self.places, axis=0) + 0.5) % 1 - 0.5

    @property
    def velocity(self) -> np.ndarray:
        """Mean displacement a frame (x, y) over the frames in which something is seen."""
        steps = self.steps[np.isfinite(self.steps).all(1)]
        return steps.mean(0) if len(steps) else np.full(2, np.nan)

    @property
    def words(self) -> dict[str, str]:
        """The words with the detector's keys; direction and pace are absent where nothing is seen twice."""
        found = {"background": self.background, "colour": self.colour, "shape": self.shape}
        velocity = self.velocity
        if np.isfinite(velocity).all():
            found["direction"] = max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], velocity)))
            speed = float(np.dot(DIRECTIONS[found["direction"]], velocity))
            found["pace"] = min(PACES, key=lambda name: abs(PACES[name] - speed))
        return found

    @property
    def permanence(self) -> float:
        """Share of the frames in which an object of about the usual area is seen."""
        typical = world.SIZES["big"] ** 2 * _SHARES.get(self.shape, 2.0)
        low, high = (part * typical for part in _SEEN)
        return float(((self.areas > low) & (self.areas < high)).mean())


_SHARES = {"circle": 3.14, "square": 2.82, "triangle": 1.52, "cross": 2.15, "ring": 2.29, "diamond": 2.78}
"""Area of each shape in squared radii."""


@functools.lru_cache(maxsize=4)
def _templates(size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, conjugate spectra [T, size, size / 2 + 1] of shapes centred on the origin, and their areas [T]."""
    names = [shape for shape in SHAPES for _ in _RADII]
    origin = np.full((1, 2), 0.5 / size)
    masks = np.stack([moving.cover(shape, size, origin, radius)[0] for shape in SHAPES for radius in _RADII])
    return names, np.conj(np.fft.rfft2(masks)), masks.sum(axis=(1, 2))


def _background(pixels: np.ndarray) -> str:
    """The ground that explains most pixels [F, H, W, 3]."""

    def misfit(name: str) -> float:
        away = np.abs(pixels - np.array(BACKGROUNDS[name][0], np.float32)).sum(-1)
        return float(np.minimum(away, 120).mean())

    return min(BACKGROUNDS, key=misfit)


def _colour(pixels: np.ndarray, background: str) -> tuple[str, np.ndarray]:
    """The object's colour by vote, and its mean value in 0..255; "" where no pixel is unlike the ground."""
    names = [name for name in COLOURS if name != background]
    palette = np.array([COLOURS[name] for name in names], np.float32)
    away = np.linalg.norm(pixels[..., None, :] - palette, axis=-1)
    ground = np.linalg.norm(pixels - np.array(BACKGROUNDS[background][0], np.float32), axis=-1)
    nearest = np.where(away.min(-1) < ground, away.argmin(-1), -1)
    counts = np.bincount(nearest[nearest >= 0], minlength=len(names))
    if not counts.any():
        return "", np.zeros(3)
    best = int(counts.argmax())
    return names[best], np.median(pixels[nearest == best], axis=0)


def _coverage(pixels: np.ndarray, background: str, rgb: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers, float64 [F, H, W] in 0..1."""
    ground = np.array(BACKGROUNDS[background][0], np.float64)
    span = rgb - ground
    return np.clip(((pixels - ground) @ span) / max(float(span @ span), 1.0), 0, 1)


def _shape(alpha: np.ndarray) -> str:
    """The best overlap's name by vote over the frames of a coverage [F, H, W]."""
    names, spectra, areas = _templates(alpha.shape[-1])
    votes: dict[str, int] = dict.fromkeys(SHAPES, 0)
    for picture in alpha:
        inter = np.fft.irfft2(np.fft.rfft2(picture)[None] * spectra, s=picture.shape)
        overlap = (inter / np.maximum(areas[:, None, None] + picture.sum() - inter, 1e-3)).max(axis=(1, 2))
        votes[names[int(overlap.argmax())]] += 1
    return max(votes, key=lambda name: votes[name])


def _places(alpha: np.ndarray) -> np.ndarray:
    """Circular centres (x, y) of a coverage [F, H, W]: float64 [F, 2], NaN where it is empty."""
    size = alpha.shape[-1]
    wave = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
    found = []
    for axis in (1, 2):  # summing over rows leaves x, over columns y
        moment = alpha.sum(axis=axis) @ wave
        found.append(np.where(np.abs(moment) > 1e-3, np.angle(moment) / (2 * np.pi) % 1.0, np.nan))
    return np.stack(found, axis=1)


def look(frames: np.ndarray) -> Sighting:
    """What a clip uint8 [F, H, H, 3] shows.

    Raises:
        ValueError: another dtype or shape, or fewer than two frames.
    """
    square = frames.ndim == 4 and frames.shape[3] == 3 and frames.shape[1] == frames.shape[2]
    if not square or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(
            f"the detector reads uint8 [F, H, H, 3] of two frames or more, not {frames.dtype} {frames.shape}"
        )
    pixels = frames.astype(np.float32)
    background = _background(pixels)
    colour, rgb = _colour(pixels, background)
    if not colour:
        nothing = np.full((len(frames), 2), np.nan)
        return Sighting(
            background, "", "", nothing, np.zeros(len(frames)), _flicker(pixels, np.zeros(pixels.shape[:3]))
        )
    alpha = _coverage(pixels, background, rgb)
    firm = np.clip((alpha - _FAINT) / (_FULL - _FAINT), 0, 1)
    return Sighting(background, colour, _shape(firm), _places(firm), firm.mean(axis=(1, 2)), _flicker(pixels, alpha))


def _flicker(pixels: np.ndarray, alpha: np.ndarray) -> float:
    outside = alpha < _OUTSIDE
    both = outside[1:] & outside[:-1]
    change = np.abs(np.diff(pixels, axis=0)).mean(-1) / 255
    return float(change[both].mean()) if both.any() else 0.0


def track_error(sighting: Sighting, velocity: tuple[float, float]) -> float:
    """Root mean square distance, in fractions of the side, from the best line of this velocity; NaN if never seen.

    Where the object starts is not in the caption, so the line may lie anywhere; how far it goes a frame is.
    """
    seen = np.isfinite(sighting.places).all(1)
    if not seen.any():
        return float("nan")
    frames = np.arange(len(sighting.places))[seen, None]
    left = sighting.places[seen] - frames * np.asarray(velocity)
    centre = np.angle(np.exp(2j * np.pi * left).mean(0)) / (2 * np.pi)
    away = (left - centre + 0.5) % 1 - 0.5
    return float(np.sqrt((away**2).sum(1).mean()))


def read(frames: np.ndarray, scene: world.Scene) -> dict[str, float]:
    """A clip against the scene its caption describes.

    Returns:
        1.0 or 0.0 for each of `ATTRIBUTES`; "track_error_px" (the whole side where nothing is seen), "permanence" and
        "flicker".
    """
    assert scene.motion is not None
    seen = look(frames)
    words, truth = seen.words, moving.truth(scene)
    found = {name: float(words.get(name) == truth[name]) for name in ATTRIBUTES}
    error = track_error(seen, scene.motion.velocity)
    found["track_error_px"] = frames.shape[1] * (error if np.isfinite(error) else 1.0)
    return found | {"permanence": seen.permanence, "flicker": seen.flicker}


def score(clips: Sequence[np.ndarray], scenes: Sequence[world.Scene]) -> dict[str, np.ndarray]:
    """`read` for every clip: float64 [n] for each figure."""
    if len(clips) != len(scenes):
        raise ValueError(f"{len(clips)} clips for {len(scenes)} scenes")
    rows = [read(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]} if rows else {}
