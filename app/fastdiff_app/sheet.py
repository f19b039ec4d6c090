"""Contact sheets: rows of labelled pictures on one page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MARGIN, TEXT = 8, 15


def contact_sheet(
    rows: "Sequence[tuple[str, Sequence[np.ndarray | None]]]", title: str = "", tile: int = 128
) -> "Image.Image":
    """Puts rows of pictures under one another.

    Args:
        rows: a label and its uint8 [H, W, 3] pictures; None leaves a place empty.
        tile: height of one picture on the sheet in pixels; small pictures are enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    shown = [picture for _, pictures in rows for picture in pictures if picture is not None]
    aspect = max((picture.shape[1] / picture.shape[0] for picture in shown), default=1.0)
    wide = round(tile * aspect)
    columns = max((len(pictures) for _, pictures in rows), default=0)
    line = TEXT + MARGIN
    width = max(MARGIN + columns * (wide + MARGIN), MARGIN * 2 + round(font.getlength(title)))
    head = line + MARGIN if title else MARGIN
    sheet = Image.new("RGB", (width, head + len(rows) * (line + tile + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, "black", font)
    for number, (label, pictures) in enumerate(rows):
        top = head + number * (line + tile + MARGIN)
        draw.text((MARGIN, top), label, "black", font)
        for column, picture in enumerate(pictures):
            if picture is not None:
                image = Image.fromarray(picture)
                enlarged = image.height < tile
                image = image.resize((wide, tile), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
                sheet.paste(image, (MARGIN + column * (wide + MARGIN), top + line))
    return sheet
