"""`fastdiff tune`: from a budget to a plan file, proved on prompts the search has not seen; `fastdiff audit`."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff_app.console import err, out
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import ExitCode, Failure, is_installed, one_line
from fastdiff_app.outputs import check_writable, whole_file, write_text

LEAST = 8
OWN = 16
# of the scenes that captions are drawn from; far from those of any training run
SEEDS = (5_000_011, 6_000_011)


@dataclass(frozen=True)
class Wish:
    """What a user asks for: texts as typed, and the run to be made faster."""

    budget: str | None
    latency: str | None
    prompts: Path | None
    steps: int
    guidance: float
    size: tuple[int, int] | None
    batch: int


def tune(wish: Wish, output: Path, model: str | None, picture: Path | None, report: Path | None) -> None:
    """Searches, prints who met whom, and writes the plan, and the plot and the page where asked."""
    budget, latency = _read(wish)
    targets = ((output, (".json",)), (picture, (".png", ".svg", ".pdf")), (report, (".html",)))
    for target, suffixes in targets:
        if target is not None:
            check_writable(target, suffixes)
    if (picture or report) and not is_installed("matplotlib"):
        raise Failure(ExitCode.MISSING, "a plot needs matplotlib; install it with: python -m pip install matplotlib")
    from fastdiff.acceleration import Unsupported
    from fastdiff.planning import report as reporting
    from fastdiff.planning.tune import beats
    from fastdiff.planning.tune import tune as search

    calibration, heldout, score = _workloads(wish, model)
    pipe = load_pipeline(model, "text-to-image")
    try:
        tuned = search(pipe, calibration, heldout, budget, latency, score, _say)
    except (Unsupported, ValueError) as error:
        raise Failure(ExitCode.PLAN, one_line(error)) from error
    tuned.plan.save(output)
    if picture is not None:
        with whole_file(picture) as part:
            reporting.plot(tuned, part)
    if report is not None:
        image = io.BytesIO()
        reporting.plot(tuned, image)
        write_text(report, reporting.page(tuned, f"fastdiff tune: {model or 'the embedded model'}", image.getvalue()))
    _print(tuned, beats(tuned.results), budget)
    out.print(str(output), markup=False)


def _say(text: str) -> None:
    err.print(text, markup=False)


def _read(wish: Wish) -> tuple[Any, float | None]:
    from fastdiff.planning.budget import read_budget, read_latency

    try:
        budget = read_budget(wish.budget) if wish.budget else None
        latency = read_latency(wish.latency) if wish.latency else None
    except ValueError as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error
    if budget is None and latency is None:
        raise Failure(ExitCode.USAGE, "give --budget (psnr>=30, attribute_drop<=1%), --latency (40ms, 2x), or both")
    return budget, latency


def _workloads(wish: Wish, model: str | None) -> tuple[Any, Any, Any]:
    """Prompts to search with, others to prove on, and a score where the truth is known."""
    from fastdiff.planning.measure import Workload

    height, width = wish.size or (None, None)
    score = None
    if wish.prompts is None and model is None:
        words, scenes = _scenes()
        score = _score(scenes[1])
    elif wish.prompts is None:
        raise Failure(ExitCode.USAGE, f"--prompts is needed for a model of your own: a file, {2 * LEAST} lines or more")
    else:
        lines = _lines(wish.prompts)
        words = (lines[0::2], lines[1::2])
    made = [
        Workload(tuple(some), seed, wish.steps, wish.guidance, height, width, wish.batch)
        for some, seed in zip(words, SEEDS, strict=True)
    ]
    return made[0], made[1], score


def _scenes() -> tuple[tuple[list[str], ...], tuple[list[Any], ...]]:
    import numpy as np

    from fastdiff.miniature import world

    chances = [np.random.default_rng(seed) for seed in SEEDS]
    scenes = tuple([world.object_scene(chance) for _ in range(OWN)] for chance in chances)
    return tuple([world.caption(scene) for scene in some] for some in scenes), scenes


def _score(scenes: list[Any]) -> Any:
    import numpy as np
    import torch

    from fastdiff.miniature import detector
    from fastdiff_app.methods import to_bytes

    def score(pictures: Any) -> Any:
        found = detector.score([to_bytes(one) for one in pictures.permute(0, 2, 3, 1).numpy()], scenes)
        return torch.from_numpy(np.stack(list(found.values()), axis=1))

    return score


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.INPUT, f"cannot read {path}: {one_line(error)}") from error
    if len(set(lines)) < 2 * LEAST:
        raise Failure(ExitCode.INPUT, f"{path} has {len(set(lines))} different prompts; {2 * LEAST} or more are needed")
    return list(dict.fromkeys(lines))


def _print(tuned: Any, ahead: dict[str, Any], budget: Any) -> None:
    best = tuned.best
    for result in tuned.results:
        figures = "  ".join(f"{name} {figure}" for name, figure in result.quality.items())
        times = f"{tuned.baseline / result.seconds:.2f} times faster"
        out.print(f"{result.name:<22} {1000 * result.seconds:8.1f} ms  {times}  {figures}", markup=False)
    for name, difference in ahead.items():
        out.print(f"{best.name} is ahead of {name} by {difference} dB, pair by pair", markup=False)
    if best.name.startswith("fewer-steps"):
        out.print(f"fewer steps are best here: the plan takes {best.computed} of any more", markup=False)
    spent = f"the search took {tuned.spent:.1f} full generations for each of its prompts"
    out.print(f"{spent}, the proof {tuned.heldout:.1f} for each of the others", markup=False)
    if tuned.met is False:
        figure = best.quality[budget.metric]
        out.print(f"the budget {budget} is not kept: {budget.metric} {figure} is the best within reach", markup=False)


def audit(model: str | None) -> None:
    """Prints what can act on a model here, what cannot and why, and what diffusers would do without saying so."""
    import fastdiff

    pipe = load_pipeline(model, "text-to-image")
    out.print(str(fastdiff.audit(pipe)), markup=False)
