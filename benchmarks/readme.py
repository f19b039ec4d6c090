"""`make readme`: README's tables and pictures, from the records in benchmarks/results/ and from nothing else."""

import re
import shutil
from importlib import import_module
from pathlib import Path

from benchmarks import overview
from benchmarks.record import RESULTS, Record, Row
from fastdiff.miniature import moving_detector
from fastdiff_app.console import SHORT, number

ROOT = RESULTS.parents[1]
README = ROOT / "README.md"
PICTURE = RESULTS / "stream.png"
PLOTS = {
    "parallel": "quality against bytes received",
    "attention": "quality and speed against the share of key blocks left out",
    "drift": "attributes right against the number of chunks made, a line a setting",
}
SAID = "not reachable"  # notes that stand in for the figures a row does not have
FOLDED = 14  # rows above which a table is folded away
ATTRIBUTES = ("background", "colour", "position", "shape", "size")


def _cell(row: Row, name: str) -> str:
    """A figure, with half the width of its interval where it has one."""
    if name == "nfe":
        return "" if row.nfe is None else str(row.nfe)
    if name not in row.quality:
        return ""
    figure = row.quality[name]
    half = (figure.high - figure.low) / 2
    return number(figure.value) if half == 0 or name in SHORT else f"{number(figure.value)} ± {number(half)}"


def markdown(record: Record, columns: tuple[str, ...], ratio: str = "times faster") -> str:
    """A record as a table, with a line beneath that says on what, when and from which commit."""
    headings = ["", "ms", ratio, *(SHORT.get(name, name.replace("_", " ")) for name in columns)]
    lines = ["| " + " | ".join(headings) + " |", "|--" + "|--:" * (len(headings) - 1) + "|"]
    for row in record.rows:
        timing = "" if row.ms_median is None else number(row.ms_median)
        faster = "" if row.ratio is None else f"{row.ratio:.2f}"
        if not row.quality and row.note.startswith(SAID):
            faster = f"{faster} ({row.note})" if faster else row.note
        elif row.ms_median is None and not row.quality:
            faster = row.note
        lines.append("| " + " | ".join([row.method, timing, faster, *(_cell(row, name) for name in columns)]) + " |")
    machine = record.machine
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']}"
    made = f"{record.created[:10]}, commit {record.commit}"
    lines += ["", f"<sub>{device}; torch {machine['torch']}, diffusers {machine['diffusers']}; {made}.</sub>"]
    return "\n".join(lines)


def figures(record: Record) -> str:
    """A record whose rows measure unlike things, as a table with every row's own figures in words."""
    lines = ["| | measured | on |", "|--|--|--|"]
    for row in record.rows:
        said = "<br>".join(f"{name.replace('_', ' ')} **{number(one.value)}**" for name, one in row.quality.items())
        lines.append(f"| {row.method} | {said} | {row.note} |")
    return "\n".join([*lines, *markdown(record, ()).splitlines()[-2:]])


def _section(name: str) -> str:
    if name == "overview":
        return overview.table(RESULTS)
    if name == "live" and (RESULTS / "live.json").exists():
        return figures(Record.read(RESULTS / "live.json"))
    columns = {
        "stream": ("first_frame_ms", "max_abs_difference", *ATTRIBUTES),
        "miniature": (*ATTRIBUTES, *(f"{name}_absolute" for name in ATTRIBUTES)),
        "gpu": ("fps", "tflop_per_frame", "bf16_roofline"),
        "attention": ("psnr", "over_plain", "relative_l1", "layer_l1", "attribute", "density"),
        "fewstep": (
            "nfe",
            "attribute",
            "attribute_difference",
            "attribute_to_control",
            "mmd2",
            "diversity",
            "max_abs_difference",
        ),
        "cache": ("nfe", "psnr", "psnr_p10", "planned_ahead", "ssim", "attribute_drop"),
        "tune": (
            "nfe",
            "psnr",
            "psnr_off",
            "ms_times",
            "speed_times",
            "of_step",
            "search_generations",
            "proof_generations",
        ),
        "parallel": ("psnr", "max_abs_difference", "bytes", "position", "bytes_ratio", "released_ratio"),
        "cachequant": ("nfe", "output_error", "psnr", "over_uniform"),
        "quantization": ("output_error", "weight_error", "psnr", "bytes"),
        "live": (),
        "video": (
            "first_frame_ms",
            "fps",
            "jitter_ms_p95",
            "late",
            "bytes_per_chunk",
            "attribute",
            "attribute_change",
            "attribute_difference",
            "track_error_px",
        ),
        "moving": ("nfe", *moving_detector.ATTRIBUTES, "track_error_px", "permanence", "flicker"),
        "drift": ("attribute", "attribute_change", "track_error_px", "permanence", "flicker"),
        "switch": ("new_colour", "old_colour", "attribute"),
        "tiles": ("nfe", "border", "attribute", "attribute_difference"),
        "training_free": ("nfe", "attribute", "rows_per_frame", "place_error", "gain", "psnr"),
        "batch": ("max_abs_difference", "times_undisturbed", "lost", "duplicated", "different", "redone"),
    }
    found = sorted(RESULTS.glob(f"{name}.json")) or sorted(RESULTS.glob(f"{name}-*.json"))
    if not found:
        return f"Not measured yet: `make bench NAME={name}`."
    tables = "\n\n".join(_folded(name, Record.read(path), columns[name]) for path in found)
    return f"{tables}\n\n{_plot(name, found[0])}" if name in PLOTS else tables


def _folded(name: str, record: Record, columns: tuple[str, ...]) -> str:
    made = markdown(record, columns)
    if len(record.rows) <= FOLDED:
        return made
    return f"<details><summary>{len(record.rows)} rows of `bench {name}`</summary>\n\n{made}\n\n</details>"


def _plot(name: str, record: Path) -> str:
    picture = RESULTS / f"{name}.png"
    import_module(f"benchmarks.{name}").plot(Record.read(record), picture)
    return f"![{PLOTS[name]}](benchmarks/results/{picture.name})"


def _sheet() -> str:
    made = ROOT / "out" / "stream.png"
    if made.exists():
        shutil.copyfile(made, PICTURE)
    if not PICTURE.exists():
        return "No picture yet: `make stream`, then `make readme`."
    return f"![input, plain diffusers and fastdiff, row by row]({PICTURE.relative_to(ROOT)})"


def rewritten(text: str) -> str:
    """README's text with every generated section made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{_sheet() if name == 'sheet' else _section(name)}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrites README.md in place."""
    README.write_text(rewritten(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
