"""From what the user typed to a pipeline that is loaded and accelerated, each failure turned into one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_app.failures import ExitCode, Failure, is_installed, one_line, require_torch

if TYPE_CHECKING:
    from fastdiff import Plan

PRESETS = ("exact", "balanced", "fast")


def load_pipeline(model: str | None, task: str, lora: str | None = None, recipe: str = "auto") -> Any:
    """A diffusers pipeline for the embedded model (None), a folder or a hub id, or `Failure`.

    Args:
        task: "text-to-image" or "image-to-image"; a video model serves both.
        lora, recipe: as of `fastdiff.load`.
    """
    require_torch()
    if not is_installed("diffusers"):
        raise Failure(ExitCode.MISSING, "this needs diffusers, which is not installed: python -m pip install diffusers")
    # what these libraries say while they are imported is not for users of a program
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import fastdiff
    from fastdiff_app import video_models

    _quieten()
    if video_models.is_video(model):
        task = "text-to-image"
    try:
        pipe = fastdiff.load(model, task=task, lora=lora, recipe=recipe)
    except (OSError, ValueError, KeyError, TypeError, ImportError, NotImplementedError, RuntimeError) as error:
        raise Failure(ExitCode.MODEL, f"cannot load {model or 'the embedded model'}: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    video_models.take_student(pipe, model)
    return pipe


def _quieten() -> None:
    """Leaves only the bars of downloads, which may take long."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # the variable is read on import, which may have been long ago
    if os.environ["DIFFUSERS_VERBOSITY"] == "error":
        diffusers_logging.set_verbosity_error()


def read_plan(text: str | None, compile: bool | None = None, student: str | None = None) -> "Plan":
    """The plan of a preset ("exact", "balanced", "fast"), of a plan file, or "none".

    Args:
        compile: True compiles on a CPU too, False never compiles, None leaves it to the plan.
        student: a few-step student to draw with, as `FewStep` names them.
    """
    require_torch()
    import fastdiff
    from fastdiff.runtime.compile import Compile

    try:
        if text is None or text in PRESETS:
            plan = fastdiff.Plan.of(text or "exact")
        elif text == "none":
            plan = fastdiff.Plan()
        elif Path(text).is_file():
            plan = fastdiff.Plan.load(text)
        else:
            raise Failure(ExitCode.PLAN, f"--plan {text}: no preset ({', '.join(PRESETS)}, none) and no plan file")
        if compile is not None:
            members = [member for member in plan if not isinstance(member, Compile)]
            plan = replace(plan, accelerations=(*members, *([Compile(on_cpu=True)] if compile else [])))
        if student is not None:
            from fastdiff.distillation.few_step import FewStep

            plan = replace(plan, accelerations=(FewStep(student), *plan))
    except ValueError as error:
        raise Failure(ExitCode.PLAN, f"--plan {text}: {one_line(error)}") from error
    return plan


def student_course(student: str, model: str | None) -> tuple[int, float]:
    """Steps and guidance a student takes where none are given, or `Failure` when there is no such student."""
    from fastdiff.distillation import students
    from fastdiff.distillation.few_step import STUDENTS, FewStep

    try:
        return students.course_of(FewStep(student).folder(model or "mini-sd"))
    except (OSError, ValueError, KeyError) as error:
        named = ", ".join(STUDENTS)
        raise Failure(
            ExitCode.INPUT, f"--student {student}: {one_line(error)}; take {named} or a folder of fastdiff distill"
        ) from error


@contextmanager
def accelerated(pipe: Any, plan: "Plan", strict: bool = False) -> Iterator[Any]:
    """Applies a plan for the length of a block and gives its handle; what cannot act raises `Failure`."""
    import fastdiff

    try:
        handle = fastdiff.accelerate(pipe, plan, strict=strict)
    except (fastdiff.Unsupported, ValueError, TypeError) as error:
        raise Failure(ExitCode.PLAN, f"the plan does not fit this model: {one_line(error)}") from error
    with handle:
        yield handle
