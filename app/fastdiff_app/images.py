"""Pictures in and out: files to uint8 arrays [H, W, 3] and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_app.failures import ExitCode, Failure, one_line
from fastdiff_app.outputs import whole_file

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST, LARGEST, MULTIPLE = 16, 4096, 8


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Reads "512" or "768x512" (width x height) into (height, width); None stays None, the model's own size."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdecimal() for part in parts):
        raise Failure(ExitCode.USAGE, f"--size {text!r} is not a size: write 512 or WIDTHxHEIGHT, as in 768x512")
    width, height = int(parts[0]), int(parts[-1])
    for side in (width, height):
        if not SMALLEST <= side <= LARGEST or side % MULTIPLE:
            raise Failure(
                ExitCode.USAGE,
                f"--size {text}: each side must be a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST} pixels",
            )
    return height, width


def fitted(image: "Image.Image", height: int, width: int) -> "Image.Image":
    """The picture cut to the wanted shape around its centre, then scaled; nothing is stretched."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def read_image(path: Path) -> "Image.Image":
    """Opens a picture as RGB, or raises `Failure`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise Failure(ExitCode.INPUT, f"no such picture: {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Failure(ExitCode.INPUT, f"{path} is not a picture that can be read: {one_line(error)}") from error


def write_image(path: Path, image: "Image.Image | np.ndarray", about: dict[str, Any] | None = None) -> None:
    """Writes a picture whole or not at all; a PNG carries `about` as text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    extra: dict[str, Any] = {}
    if path.suffix.lower() == ".png" and about:
        extra["pnginfo"] = PngInfo()
        for key, value in about.items():
            extra["pnginfo"].add_text(key, str(value))
    with whole_file(path) as part:
        picture.save(part, **extra)
