"""What the planner found, to look at: a Pareto plot and a page of HTML."""

import base64
import html
import io
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.planning.tune import Tuned, beats

_INK, _OURS, _OTHER = "#1f2430", "#0b7a75", "#b0563f"


def plot(tuned: Tuned, target: str | Path | io.BytesIO) -> None:
    """Quality against latency: what the search expects everywhere, and what was measured on held-out prompts.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(1000 * tuned.baseline, color=_INK, linewidth=0.8, linestyle=":", label="unaccelerated")
    shown = [point for point in tuned.front if point[0] < tuned.front[-1][0] and point[1] > 0]
    times, expected = [1000 * seconds for _, seconds, _ in shown], [decibels for _, _, decibels in shown]
    axes.plot(times, expected, color=_INK, alpha=0.35, linewidth=1.2, label="expected by the search")
    for place, result in enumerate(tuned.results):
        one = result.quality["psnr"]
        axes.errorbar(
            1000 * result.seconds,
            one.value,
            yerr=[[one.value - one.low], [one.high - one.value]],
            fmt="o" if place == 0 else "s",
            markersize=7 if place == 0 else 5,
            color=_OURS if place == 0 else _OTHER,
            capsize=3,
        )
    axes.set_xlim(0, 1.06 * 1000 * max(tuned.baseline, *(result.seconds for result in tuned.results)))
    axes.set_xlabel("milliseconds for one picture")
    axes.set_ylabel("median PSNR to the unaccelerated picture, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(0.93, 0.0))
    _name(axes, tuned)
    figure.savefig(target)


def _name(axes: Any, tuned: Tuned) -> None:
    """Names beside the points, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    apart = 0.05 * (high - low)
    right = max(1000 * result.seconds for result in tuned.results)
    at = math.inf
    for result in sorted(tuned.results, key=lambda one: -one.quality["psnr"].value):
        value = result.quality["psnr"].value
        at = min(value, at - apart)
        axes.annotate(
            result.name,
            (1000 * result.seconds, value),
            (right + 0.03 * axes.get_xlim()[1], at),
            fontsize=8,
            va="center",
            color=_OURS if result is tuned.best else _OTHER,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 4},
        )


def page(tuned: Tuned, title: str, image: bytes | None = None) -> str:
    """A self-contained HTML page; `image` is the plot as PNG."""
    metrics = list(tuned.best.quality)
    ahead: dict[str, Any] = beats(tuned.results)
    names = ("", "calls", "ms", "times faster", *(name.replace("_", " ") for name in metrics), "winner ahead, dB")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = []
    for place, result in enumerate(tuned.results):
        cells = [html.escape(result.name), str(result.computed), f"{1000 * result.seconds:.1f}"]
        cells.append(f"{tuned.baseline / result.seconds:.2f}")
        cells += [_figure(result.quality[name]) for name in metrics]
        cells.append("" if place == 0 else _figure(ahead[result.name]))
        lines.append(f"<tr{_mark(place == 0)}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    best = max((value for _, _, value in tuned.tried), default=0.0)
    tried = "".join(
        f"<tr{_mark(value == best)}><td>{html.escape(name)}</td><td>{count}</td><td>{value:.1f}</td></tr>"
        for name, count, value in tuned.tried
    )
    picture = ""
    if image is not None:
        data = base64.b64encode(image).decode()
        picture = f'<img alt="quality against latency" src="data:image/png;base64,{data}">'
    met = {None: "", True: "<p>The budget is kept on held-out prompts.</p>", False: "<p>The budget is not kept.</p>"}
    work = (
        f"The search took {tuned.spent:.1f} full generations for each of its prompts, "
        f"the proof {tuned.heldout:.1f} for each of the others."
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{_lead(tuned)}{met[tuned.met]}{picture}"
        "<h2>On prompts the search had not seen</h2>"
        f"<div><table><tr>{head}</tr>{''.join(lines)}</table></div><p>{work} Brackets are 95 % intervals.</p>"
        "<h2>On its own prompts</h2><div><table><tr><th>candidate</th><th>calls</th><th>median PSNR, dB</th></tr>"
        f"{tried}</table></div><p class='note'>{_NAMES}</p></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;background:#fff;max-width:62rem;margin:2rem auto;"
    "padding:0 1rem}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%}div{overflow-x:auto}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.3rem 1rem .3rem 0;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}.best td{font-weight:600;color:#0b7a75}"
    "code{background:#f3f4f6;border-radius:4px;padding:.1rem .3rem}small,.note{color:#5b6270}.best small{color:inherit}"
)
_NAMES = (
    "outcome: computed steps by dynamic programming over what leaving others out does to the picture, which is raised "
    "to the power named; front: that share of them at the start; fit: steps left out are fitted from so many outputs, "
    "repeat: they repeat the last; static: a schedule that needs no measurement; any other name: what makes each call "
    "cheaper, with the steps that pays for."
)


def _lead(tuned: Tuned) -> str:
    """What was tuned, and what the plan is."""
    origin = tuned.plan.tuned
    about = (
        f"{origin.pipeline} with {origin.scheduler}, {origin.steps} steps, guidance {origin.guidance:g}, "
        f"{origin.dtype} on {origin.device}; {', '.join(f'{name} {version}' for name, version in origin.versions)}"
    )
    plan = " then ".join(f"<code>{html.escape(_short(one))}</code>" for one in tuned.plan)
    best, times = tuned.best, tuned.baseline / tuned.best.seconds
    said = f"{times:.2f} times faster at a median PSNR of {best.quality['psnr'].value:.1f} dB"
    return f"<p>{html.escape(about)}.</p><p>The plan, {said}: {plan}</p>"


def _short(one: Any) -> str:
    """An acceleration with those of its settings that are not long lists and not its defaults."""
    plain = {field.name: field.default for field in fields(one)}
    told = [
        f"{len(value)} {name}" if isinstance(value, tuple) and len(value) > 3 else f"{name}={value!r}"
        for name, value in one.settings().items()
        if value != plain[name]
    ]
    return f"{type(one).__name__}({', '.join(told)})"


def _mark(best: bool) -> str:
    return ' class="best"' if best else ""


def _figure(one: Any) -> str:
    return f"{one.value:.3g} <small>[{one.low:.3g}, {one.high:.3g}]</small>"
