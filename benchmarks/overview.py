"""README's first table: one line for each kind of acceleration, taken from the records that measured it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import Record, Row
from fastdiff.quality import Interval
from fastdiff_app.console import number


@dataclass(frozen=True)
class Line:
    """One acceleration in the table.

    Attributes:
        what: name and where it was measured.
        record, method: the row that is shown.
        price: what a row's quality says it cost.
        control: the row that stands for having that speed without the acceleration.
        priced: the row whose quality is the price where that of ``method`` has none; times are then not compared.
        base: the row that is compared with, where that is not the record's first.
    """

    what: str
    record: str
    method: str
    price: Callable[[Row], str]
    control: str = ""
    priced: str = ""
    base: str = ""


def _said(name: str, words: str) -> Callable[[Row], str]:
    def say(row: Row) -> str:
        return f"{words} {_interval(row.quality[name])}"

    return say


def _attributes(row: Row) -> str:
    name = "attribute_difference" if "attribute_difference" in row.quality else "attribute"
    return f"{name.replace('_', ' ')} {_interval(row.quality[name])}"


def _interval(one: Interval) -> str:
    if one.low == one.high:
        return number(one.value)
    return f"{number(one.value)} [{number(one.low)}, {number(one.high)}]"


PSNR = _said("psnr", "PSNR")
EXACT = _said("max_abs_difference", "exact, within")
LINES = (
    Line("`Stream`: stream batch, against frame by frame", "stream", "fastdiff", EXACT, base="sequential"),
    Line("`Stream`, 4 steps for 12 with guidance", "stream", "fastdiff", _said("position", "position right")),
    Line("a plan of `fastdiff tune`, 50 steps", "cache", "fastdiff-planned-2x", PSNR, "fewer-steps-2x"),
    Line("a plan of `fastdiff tune`, 50 steps", "cache", "fastdiff-planned-3x", PSNR, "fewer-steps-3x"),
    Line("`FewStep`: a student in 4 calls for 50", "fewstep", "student-4", _attributes, "teacher-4"),
    Line("`FewStep`: a student in 1 call", "fewstep", "student-1", _attributes),
    Line("`GuidanceAdapter`: guidance in one row", "fewstep", "agd-25", _attributes),
    Line(
        "`FoldedText`: the embedded Stable Diffusion 3 without T5",
        "fewstep",
        "teacher-25-dit",
        EXACT,
        priced="unfolded-25-dit",
        base="unfolded-25-dit",
    ),
    Line(
        "`SparseAttention`, 75 % left out, 4,096 tokens, against SDPA",
        "attention",
        "sparse-75-4096-bf16",
        _said("psnr", "on the embedded model, 1,024 tokens, first and last steps dense: PSNR"),
        priced="pooled-quality-75",
    ),
    Line(
        "`W8A8`, a layer of 1,536 x 6,144, against bf16",
        "quantization",
        "fastdiff-w8a8",
        _said("output_error", "relative error"),
        "torchao-int8",
    ),
    Line(
        "`TiledInference`, 16 tiles, against half-overlapping",
        "tiles",
        "tiles-moving-large",
        _said("border", "4 tiles: gradients at borders over those beside them"),
        priced="tiles-moving",
    ),
    Line("warm starts in `Stream`", "training_free", "warm-stream", PSNR),
    Line(
        "`ChunkRollout`, video without end, against whole clips of 25 guided steps",
        "video",
        "fastdiff",
        _said("attribute_change", "attributes right from chunk 10 to 1,000:"),
        priced="fastdiff-chunk-1000",
    ),
    Line("`fastdiff batch`, one picture a call", "batch", "fastdiff", EXACT),
    Line("`fastdiff batch`, eight pictures a call", "batch", "fastdiff-8", EXACT),
)


def _times(row: Row, base: Row | None) -> float | None:
    """How many times faster than the record's first row, or than another one."""
    if base is None or row.ratio is None:
        return row.ratio
    return row.ratio / base.ratio if base.ratio else None


def table(results: Path) -> str:
    """The lines whose records are there, as Markdown."""
    lines = ["|  | times faster | what it cost | instead, at about that speed |", "|--|--:|--|--|"]
    records: dict[str, Record] = {}
    for line in LINES:
        path = results / f"{line.record}.json"
        if path.exists() and line.record not in records:
            records[line.record] = Record.read(path)
        rows = {row.method: row for row in records[line.record].rows} if line.record in records else {}
        row = rows.get(line.method)
        times = None if row is None else _times(row, rows.get(line.base))
        if row is None or times is None:
            why = row.note if row else ""
            lines.append(f"| {line.what} | | {why or f'not measured yet: `make bench NAME={line.record}`'} | |")
            continue
        instead = ""
        if line.control in rows:
            other = rows[line.control]
            if not other.quality:
                lines.append(
                    f"| {line.what} | {times:.2f} | {line.price(rows[line.priced or line.method])} | {other.note} |"
                )
                continue
            faster = "" if other.ratio is None or line.priced else f", {other.ratio:.2f} times"
            instead = f"{line.control}{faster}: {line.price(other)}"
        lines.append(f"| {line.what} | {times:.2f} | {line.price(rows[line.priced or line.method])} | {instead} |")
    return "\n".join(lines)
