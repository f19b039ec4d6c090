"""`fastdiff distill`: a few-step student of a model, as a LoRA file that diffusers loads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdiff_app.console import err, out
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import ExitCode, Failure, one_line

if TYPE_CHECKING:
    from fastdiff.distillation.objective import Objective

METHODS = ("phased", "lcm", "tcd", "splam", "scm", "dmd", "mmd", "ict", "agd", "koala")


@dataclass(frozen=True)
class Task:
    """What to make of a model.

    Attributes:
        method: one of `METHODS`.
        nfe: steps the student shall take ("phased", "dmd", "mmd").
        scale: the teacher's guidance, which goes into the student.
        start, teacher: folders of students to begin with and to learn from.
        layers, blocks: for "koala": transformer layers of a UNet to keep, numbers of a transformer's blocks to keep.
    """

    method: str = "phased"
    nfe: int = 4
    scale: float = 5.0
    start: Path | None = None
    teacher: Path | None = None
    layers: int = 0
    blocks: str = ""


def distill(
    output: Path, task: Task, prompts: Path | None, model: str | None, settings: dict[str, Any], pictures: int
) -> None:
    """Trains a student and writes it into a folder.

    Args:
        prompts: a file with a prompt a line; the embedded models need none.
        settings: of `fastdiff.distillation.trainer.Settings`.
        pictures: how many of the teacher's own pictures to learn from.
    """
    method = task.method
    if method not in METHODS:
        raise Failure(ExitCode.USAGE, f"--method must be one of {', '.join(METHODS)}, not {method}")
    from fastdiff.miniature import MODELS

    if model is not None and model not in MODELS and prompts is None:
        raise Failure(ExitCode.USAGE, "--prompts FILE (a prompt a line) is needed for a model other than the embedded")
    lines = _lines(prompts) if prompts else []
    pipe = load_pipeline(model, "text-to-image")
    from fastdiff.acceleration import Unsupported
    from fastdiff.distillation.trainer import Settings, distil

    try:
        chosen = Settings(**settings)
        objective = _objective(task, pipe.scheduler)
        source = _source(pipe, lines, output, pictures, task.scale)
        columns = (TextColumn("distill"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=err) as bar:
            row = bar.add_task("", total=chosen.steps, loss=float("nan"))
            distil(
                pipe,
                objective,
                source,
                chosen,
                output,
                lambda step, loss: bar.update(row, completed=step + 1, loss=loss),
                start=task.start,
                teacher=task.teacher,
                student=_pruned(pipe, task),
            )
    except (ValueError, Unsupported) as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error
    except OSError as error:
        raise Failure(ExitCode.OUTPUT, f"cannot write to {output}: {one_line(error)}") from error
    how = {"agd": "GuidanceAdapter", "koala": ""}.get(method, "FewStep")
    use = f'fastdiff.accelerate(pipe, {how}("{output}"))' if how else "a denoiser's folder, as diffusers loads it"
    out.print(f"{output}: {use}; samples.png shows what it draws", markup=False)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.INPUT, f"cannot read {path}: {one_line(error)}") from error
    if not any(lines):
        raise Failure(ExitCode.INPUT, f"{path} holds no prompt")
    return [line for line in lines if line]


def _objective(task: Task, scheduler: Any) -> "Objective":
    from fastdiff.distillation.adapters import AdaptedGuidance
    from fastdiff.distillation.compression import Compression
    from fastdiff.distillation.consistency import LatentConsistency, SubPathLinear, TrajectoryConsistency
    from fastdiff.distillation.continuous import ContinuousConsistency
    from fastdiff.distillation.matching import DistributionMatching, MomentMatching
    from fastdiff.distillation.phased import Phased, equal_edges
    from fastdiff.distillation.teacherless import ConsistencyTraining

    edges = equal_edges(scheduler, task.nfe)
    scales = (task.scale, task.scale)
    makers: dict[str, Callable[[], Objective]] = {
        "phased": lambda: Phased(edges=edges, scale=task.scale),
        "lcm": lambda: LatentConsistency(scales),
        "tcd": lambda: TrajectoryConsistency(scales),
        "splam": lambda: SubPathLinear(scales),
        "scm": lambda: ContinuousConsistency(scales),
        "dmd": lambda: DistributionMatching(edges[:0:-1], task.scale),
        "mmd": lambda: MomentMatching(edges[:0:-1]),
        "ict": lambda: ConsistencyTraining(),
        "agd": lambda: AdaptedGuidance((1.0, max(1.0, 1.6 * task.scale))),
        "koala": lambda: Compression(scale=1.0),
    }
    return makers[task.method]()


def _pruned(pipe: Any, task: Task) -> Any:
    if task.method != "koala":
        return None
    from fastdiff.anatomy import anatomy
    from fastdiff.distillation.compression import prune

    keep = [int(number) for number in task.blocks.split(",")] if task.blocks else []
    return prune(anatomy(pipe).denoiser, layers=task.layers, keep=keep)


def _source(pipe: Any, lines: list[str], folder: Path, pictures: int, scale: float) -> Any:
    from fastdiff.distillation.sources import PromptSource
    from fastdiff.miniature.source import WorldSource

    return PromptSource(pipe, lines, folder / "teacher", pictures, scale=scale) if lines else WorldSource()
