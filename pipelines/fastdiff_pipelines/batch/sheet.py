"""The contact sheet of a job: one HTML file that needs no other, with every output's picture, words and fate."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

_TEMPLATE = Path(__file__).with_name("sheet.html")
_SIDE = 320
_SMALL = 128


@dataclass(frozen=True)
class Card:
    """One output on the sheet.

    Attributes:
        prompt: what was asked for.
        facts: short words under it, such as "seed 7".
        path: the output's file, or None for one that failed; then `error` says why.
    """

    prompt: str
    facts: tuple[str, ...]
    path: Path | None = None
    error: str = ""


def contact_sheet(
    folder: Path, title: str, numbers: dict[str, str], cards: Sequence[Card], note: str = "", most: int = 500
) -> str:
    """The sheet as HTML text.

    Args:
        folder: where the file will lie; links are relative to it.
        numbers: shown large at the top, such as {"pictures": "198"}.
        cards: in order; failed ones are shown first.
        note: a line at the bottom.
        most: pictures shown; beyond that the sheet says how many more there are.
    """
    failed = [card for card in cards if card.path is None]
    made = [card for card in cards if card.path is not None]
    if len(made) > most:
        note = f"{note} The first {most} of {len(made)} are shown.".strip()
    shown = [*(_failure(card) for card in failed[:most]), *(_figure(folder, card) for card in made[:most])]
    facts = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in numbers.items()
    )
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        title=html.escape(title), numbers=facts, cards="\n".join(shown), note=html.escape(note)
    )


def _figure(folder: Path, card: Card) -> str:
    assert card.path is not None
    link = html.escape(card.path.relative_to(folder).as_posix())
    try:
        picture = _thumbnail(card.path)
    except (OSError, ValueError) as error:
        # a file that vanished meanwhile must not cost the whole sheet
        return _failure(Card(card.prompt, card.facts, None, f"cannot be shown: {error}"))
    return (
        f'<figure><a href="{link}">{picture}</a>'
        f"<figcaption><p>{html.escape(card.prompt)}</p><small>{_facts(card)}</small></figcaption></figure>"
    )


def _failure(card: Card) -> str:
    return (
        f'<figure class="failed"><div class="why">{html.escape(card.error)}</div>'
        f"<figcaption><p>{html.escape(card.prompt)}</p><small>{_facts(card)}</small></figcaption></figure>"
    )


def _facts(card: Card) -> str:
    return " · ".join(html.escape(fact) for fact in card.facts)


def _thumbnail(path: Path) -> str:
    """An <img> with the picture inside; small pictures keep their pixels."""
    from PIL import Image

    image = _first_frame(path) if path.suffix == ".mp4" else Image.open(path).convert("RGB")
    small = max(image.size) <= _SMALL
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=small, quality=82)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    kind = ' class="small"' if small else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{kind} loading="lazy" alt="" {size} src="data:image/webp;base64,{data}">'


def _first_frame(path: Path):
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_image()
