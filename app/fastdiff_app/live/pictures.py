"""Pictures as browsers send and want them: JPEG (or WebP) in, JPEG out, with bounds checked before a pixel is made."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MOST_BYTES = 2 * 2**20
MOST_PIXELS = 2048 * 2048
FORMATS = ("JPEG", "WEBP")
QUALITY = 85


def decode(data: bytes, height: int, width: int) -> np.ndarray:
    """A picture as uint8 ``[height, width, 3]``, cut around its centre where its shape differs.

    Raises:
        ValueError: not a whole JPEG or WebP, or larger than a live frame may be; only its header was read then.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"a frame has at most {MOST_BYTES} bytes, not {len(data)}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"a frame has at most {MOST_PIXELS} pixels, not {image.width} x {image.height}")
            if getattr(image, "n_frames", 1) != 1:
                raise ValueError("an animation is not a frame")
            if (image.height, image.width) != (height, width):
                # a JPEG can be made smaller while it is decoded, for less than it costs to decode it whole
                image.draft("RGB", (2 * width, 2 * height))
            plain = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole JPEG or WebP picture ({type(error).__name__})") from error
    if plain.size != (width, height):
        side = min(plain.width / width, plain.height / height)
        cut = side * width, side * height
        left, top = (plain.width - cut[0]) / 2, (plain.height - cut[1]) / 2
        box = (left, top, left + cut[0], top + cut[1])
        plain = plain.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(plain)


def encode(image: Any) -> bytes:
    """uint8 ``[H, W, 3]`` as JPEG without colour subsampling, which would halve what small pictures show."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
