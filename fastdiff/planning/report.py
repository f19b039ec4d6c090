"""What the planner found, to look at: a Pareto plot and a page of HTML."""

import base64
import html
import io
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
    axes.axvline(1000 * tuned.baseline, color=_INK, linewidth=0.8, linestyle=":")
    axes.text(1000 * tuned.baseline, 0.02, " unaccelerated", transform=axes.get_xaxis_transform(), fontsize=8)
    shown = [point for point in tuned.front if point[0] < tuned.front[-1][0]]
    times, expected = [1000 * seconds for _, seconds, _ in shown], [decibels for _, _, decibels in shown]
    axes.plot(times, expected, color=_INK, alpha=0.35, linewidth=1.2, label="expected by the search")
    for place, result in enumerate(tuned.results):
        one = result.quality["psnr"]
        colour = _OURS if place == 0 else _OTHER
        axes.errorbar(
            1000 * result.seconds,
            one.value,
            yerr=[[one.value - one.low], [one.high - one.value]],
            fmt="o" if place == 0 else "s",
            markersize=7 if place == 0 else 5,
            color=colour,
            capsize=3,
        )
        at, offset = (1000 * result.seconds, one.value), (7, -3 + 11 * (place % 2))
        axes.annotate(result.name, at, offset, textcoords="offset points", fontsize=8, color=colour)
    axes.set_xlabel("milliseconds for one picture")
    axes.set_ylabel("median PSNR to the unaccelerated picture, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(target)


def page(tuned: Tuned, title: str, image: bytes | None = None) -> str:
    """A self-contained HTML page; `image` is the plot as PNG."""
    metrics = list(tuned.best.quality)
    ahead: dict[str, Any] = beats(tuned.results)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "calls", "ms", "faster", *metrics, "winner ahead"))
    lines = []
    for place, result in enumerate(tuned.results):
        cells = [html.escape(result.name), str(result.computed), f"{1000 * result.seconds:.1f}"]
        cells.append(f"{tuned.baseline / result.seconds:.2f}")
        cells += [_figure(result.quality[name]) for name in metrics]
        cells.append("" if place == 0 else f"{_figure(ahead[result.name])} dB")
        mark = ' class="best"' if place == 0 else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    tried = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{count}</td><td>{value:.1f}</td></tr>"
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
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{met[tuned.met]}{picture}"
        f"<h2>On prompts the search had not seen</h2><table><tr>{head}</tr>{''.join(lines)}</table><p>{work}</p>"
        "<h2>On its own prompts</h2><table><tr><th>candidate</th><th>calls</th><th>median PSNR</th></tr>"
        f"{tried}</table></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.3rem .8rem .3rem 0;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.best td{font-weight:600;color:#0b7a75}"
)


def _figure(one: Any) -> str:
    return f"{one.value:.3g} <small>[{one.low:.3g}, {one.high:.3g}]</small>"
