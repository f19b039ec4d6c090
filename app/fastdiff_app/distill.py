"""`fastdiff distill`: a few-step student of a model, as a LoRA file that diffusers loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdiff_app.console import err, out
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import ExitCode, Failure, one_line

if TYPE_CHECKING:
    from fastdiff.distillation.objective import Objective

METHODS = ("phased", "lcm", "tcd")


def distill(
    output: Path,
    method: str,
    prompts: Path | None,
    model: str | None,
    nfe: int,
    settings: dict[str, Any],
    scale: float,
    pictures: int,
) -> None:
    """Trains a student and writes it into a folder.

    Args:
        prompts: a file with a prompt a line; the embedded model needs none.
        nfe: steps the student shall take, for "phased".
        settings: of `fastdiff.distillation.trainer.Settings`.
        pictures: how many of the teacher's own pictures to learn from.
    """
    if method not in METHODS:
        raise Failure(ExitCode.USAGE, f"--method must be one of {', '.join(METHODS)}, not {method}")
    if model is not None and prompts is None:
        raise Failure(ExitCode.USAGE, "--prompts FILE (a prompt a line) is needed for a model other than the embedded")
    lines = _lines(prompts) if prompts else []
    pipe = load_pipeline(model, "text-to-image")
    from fastdiff.acceleration import Unsupported
    from fastdiff.distillation.trainer import Settings, distil

    try:
        chosen = Settings(**settings)
        objective = _objective(method, nfe, scale)
        source = _source(pipe, lines, output, pictures, scale)
        columns = (TextColumn("distill"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=err) as bar:
            task = bar.add_task("", total=chosen.steps, loss=float("nan"))
            distil(
                pipe,
                objective,
                source,
                chosen,
                output,
                lambda step, loss: bar.update(task, completed=step + 1, loss=loss),
            )
    except (ValueError, Unsupported) as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error
    except OSError as error:
        raise Failure(ExitCode.OUTPUT, f"cannot write to {output}: {one_line(error)}") from error
    out.print(f"{output}: load it with pipe.load_lora_weights, sample as its student.json says", markup=False)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.INPUT, f"cannot read {path}: {one_line(error)}") from error
    if not any(lines):
        raise Failure(ExitCode.INPUT, f"{path} holds no prompt")
    return [line for line in lines if line]


def _objective(method: str, nfe: int, scale: float) -> "Objective":
    from fastdiff.distillation.consistency import LatentConsistency, TrajectoryConsistency
    from fastdiff.distillation.objective import grid_levels
    from fastdiff.distillation.phased import Phased

    if method == "phased":
        return Phased(edges=tuple(grid_levels(1000, nfe).tolist()), scale=scale)
    return {"lcm": LatentConsistency, "tcd": TrajectoryConsistency}[method]((scale, scale))


def _source(pipe: Any, lines: list[str], folder: Path, pictures: int, scale: float) -> Any:
    from fastdiff.distillation.sources import PromptSource
    from fastdiff.miniature.source import WorldSource

    return PromptSource(pipe, lines, folder / "teacher", pictures, scale=scale) if lines else WorldSource()
