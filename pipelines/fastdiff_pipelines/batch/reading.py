"""Job files: CSV with a header, JSON lines, or plain text with one prompt a line. A bad line costs only itself."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.errors import INPUT, JobError, one_line
from fastdiff_pipelines.batch.identity import adapter_digest
from fastdiff_pipelines.batch.items import Adapter, Item

MOST_COPIES = 100_000


@dataclass(frozen=True)
class Jobs:
    """What a file asks for.

    Attributes:
        items: in the order of the file; one line with `count` gives several.
        lines: for each item the line that asked for it, counted from 1.
        problems: one message for every line that asks for nothing possible.
    """

    items: tuple[Item, ...]
    lines: tuple[int, ...]
    problems: tuple[str, ...]


def read_jobs(path: Path, defaults: Item | None = None) -> Jobs:
    """Reads a job file; the kind is told by its name (.csv, .jsonl, .ndjson, anything else is text).

    A text file may hold JSON objects too. Keys and columns: prompt, negative, seed, steps, guidance, size ("512" or
    "768x512", width first), height, width, frames, fps, adapters, count. Empty cells mean the default.

    Args:
        defaults: the values of what a line does not say.

    Raises:
        JobError: the file cannot be read at all, or asks for nothing.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(INPUT, f"cannot read jobs from {path}: {one_line(error)}") from error
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _line_rows(text, path.suffix.lower())
    adapters = _Adapters(path.parent)
    items, lines, problems = [], [], []
    for number, row in rows:
        try:
            if isinstance(row, Exception):
                raise row
            made = _items(row, defaults or Item("-"), adapters)
            items += made
            lines += [number] * len(made)
        except ValueError as error:
            problems.append(f"{path}:{number}: {one_line(error)}")
    if not items and not problems:
        raise JobError(INPUT, f"{path} holds no jobs")
    return Jobs(tuple(items), tuple(lines), tuple(problems))


def _line_rows(text: str, suffix: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    only_json = suffix in (".jsonl", ".ndjson", ".json")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not only_json and not line.startswith("{"):
            yield number, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, ValueError(f"not JSON, is the file cut off? ({one_line(error)})")
            continue
        yield number, row if isinstance(row, dict) else ValueError('not an object; write {"prompt": "..."}')


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    header: list[str] = []
    before = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield before + 1, ValueError(f"not CSV, is the file cut off? ({one_line(error)})")
            return
        # a quoted cell may hold line ends; the line to name is where the row began
        number, before = before + 1, reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if "prompt" not in header:
                yield (
                    number,
                    ValueError(f"the first line must name the columns, prompt among them, not {header}"),
                )
                return
        elif len(cells) != len(header):
            yield number, ValueError(f"{len(cells)} cells for {len(header)} columns; is the file cut off?")
        else:
            yield number, {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}


class _Adapters:
    """Reads the adapters a line names; each file is looked at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, str] = {}

    def read(self, value: Any) -> tuple[Adapter, ...]:
        """From "a.safetensors:0.8;b.safetensors", or a list of names or {"path", "scale"} objects."""
        if isinstance(value, str):
            value = [part for part in value.split(";") if part.strip()]
        if not isinstance(value, list):
            raise ValueError(f"adapters cannot be {value!r}; give a list of paths")
        return tuple(self._one(part) for part in value)

    def _one(self, value: Any) -> Adapter:
        scale = 1.0
        if isinstance(value, dict):
            unknown = set(value) - {"path", "scale"}
            if unknown or "path" not in value:
                raise ValueError('an adapter is {"path": "...", "scale": 1.0}')
            value, scale = value["path"], _number(value.get("scale", 1.0))
        elif isinstance(value, str) and ":" in value:
            head, _, tail = value.rpartition(":")
            # what is no number belongs to the path, as in C:\lora
            with suppress(ValueError):
                value, scale = head, float(tail)
        if not isinstance(value, str):
            raise ValueError(f"an adapter cannot be {value!r}; give a path")
        source = str((self.folder / Path(value.strip()).expanduser()).resolve())
        if source not in self.known:
            self.known[source] = adapter_digest(source)
        return Adapter(source, scale, self.known[source])


def read_item(row: dict[str, Any], defaults: Item | None = None, folder: Path = Path()) -> Item:
    """One object with the keys of a line, as an online service gets it.

    Raises:
        ValueError: it asks for nothing possible.
    """
    return _items(row, defaults or Item("-"), _Adapters(folder))[0]


def parse_size(value: Any) -> tuple[int, int]:
    """Reads 512, "512" or "768x512" (width first) into (height, width).

    Raises:
        ValueError: it is no size.
    """
    parts = str(value).strip().lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise ValueError(f"size {value!r} is not a size: write 512 or WIDTHxHEIGHT, as in 768x512")
    return int(parts[-1]), int(parts[0])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ValueError("the text holds half a character (a lone surrogate)")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, str):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "negative": _text,
    "seed": _whole,
    "steps": _whole,
    "guidance": _number,
    "height": _whole,
    "width": _whole,
    "frames": _whole,
    "fps": _whole,
}
KEYS = (*_READERS, "size", "adapters", "count")


def _items(row: dict[str, Any], defaults: Item, adapters: _Adapters) -> list[Item]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(KEYS)}")
        if key not in _READERS or value is None:
            continue
        try:
            found[key] = _READERS[key](value)
        except ValueError as error:
            raise ValueError(f"{key} cannot be {value!r} ({one_line(error)})") from error
    if "prompt" not in found:
        raise ValueError("no prompt")
    if row.get("size") is not None:
        found["height"], found["width"] = parse_size(row["size"])
    if row.get("adapters") is not None:
        found["adapters"] = adapters.read(row["adapters"])
    count = _whole(row.get("count") or 1)
    if not 1 <= count <= MOST_COPIES:
        raise ValueError(f"count must be from 1 to {MOST_COPIES}, not {count}")
    if count > 1 and "seed" in found:
        # each copy has its own noise, and the first is the one that was named
        return [replace(defaults, **(found | {"seed": found["seed"] + copy})) for copy in range(count)]
    return [replace(defaults, **found)] * count
