"""`fastdiff batch`: many pictures from a file of jobs; what is there already is not made again."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastdiff_app import images
from fastdiff_app.console import err, progress
from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.failures import ExitCode, Failure, one_line
from fastdiff_app.generate import Settings, picture
from fastdiff_app.outputs import check_writable, write_json

KEYS = tuple(field.name for field in fields(Settings) if field.name not in ("image", "strength"))
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative": (str,),
    "seed": (int,),
    "steps": (int,),
    "guidance": (int, float),
    "size": (int, str),
}


@dataclass(frozen=True)
class Job:
    """One picture to make, and the line of the file that asked for it."""

    line: int
    settings: Settings

    def name(self, model: str, plan: str) -> str:
        """A file name that says what is inside and changes with anything the picture depends on."""
        content = json.dumps([asdict(self.settings), model, plan], sort_keys=True, default=str)
        words = re.sub(r"[^a-z0-9]+", "-", self.settings.prompt.lower()).strip("-")[:48]
        return f"{words or 'picture'}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _settings(text: str, defaults: Settings) -> Settings:
    if not text.startswith("{"):
        return Settings(**{**vars(defaults), "prompt": text})
    try:
        wanted = json.loads(text)
    except json.JSONDecodeError as error:
        raise Failure(ExitCode.INPUT, f"not JSON: {one_line(error)}") from error
    for key, value in wanted.items():
        if key not in KEYS:
            raise Failure(ExitCode.INPUT, f"unknown key {key!r}; known are {', '.join(KEYS)}")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise Failure(ExitCode.INPUT, f"{key} cannot be {value!r}")
    if "prompt" not in wanted:
        raise Failure(ExitCode.INPUT, "no prompt")
    if "size" in wanted:
        wanted["size"] = images.parse_size(str(wanted["size"]))
    return Settings(**{**vars(defaults), **wanted})


def read_jobs(path: Path, defaults: Settings) -> tuple[list[Job], list[str]]:
    """Reads a jobs file: on each line a prompt, or a JSON object with `prompt` and other settings.

    Returns:
        The jobs, and one message for every line that is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.INPUT, f"cannot read jobs from {path}: {one_line(error)}") from error
    jobs, wrong = [], []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            jobs.append(Job(number, _settings(text, defaults)))
        except Failure as failure:
            wrong.append(f"{path}:{number}: {failure}")
    if not jobs and not wrong:
        raise Failure(ExitCode.INPUT, f"{path} holds no jobs")
    return jobs, wrong


def batch(
    path: Path, folder: Path, defaults: Settings, model: str | None, plan_text: str | None, compile: bool | None
) -> None:
    """Makes every picture of a jobs file that is not in `folder` yet, each with its settings as JSON beside it."""
    jobs, wrong = read_jobs(path, defaults)
    for message in wrong:
        err.print(message, markup=False, style="red")
    check_writable(folder / "probe.png")
    plan = read_plan(plan_text, compile)
    pipe = load_pipeline(model, "text-to-image")
    title, plan_json = model or "mini-sd", plan.to_json()
    made = skipped = 0
    with accelerated(pipe, plan) as handle, progress("pictures/s") as bars:
        bar = bars.add_task("batch", total=len(jobs))
        for job in jobs:
            target = folder / f"{job.name(title, plan_json)}.png"
            if target.exists():
                skipped += 1
            else:
                try:
                    _make(pipe, job, target, title, plan_json)
                    made += 1
                except Failure as failure:
                    if failure.code == ExitCode.OUTPUT:
                        raise
                    wrong.append(f"{path}:{job.line}: {failure}")
                    err.print(wrong[-1], markup=False, style="red")
            bars.advance(bar)
        err.print(str(handle.report()), markup=False)
    err.print(f"{folder}: {made} made, {skipped} there already, {len(wrong)} failed", markup=False)
    if wrong:
        raise Failure(ExitCode.PARTLY, f"{len(wrong)} of the lines of {path} gave no picture")


def _make(pipe: Any, job: Job, target: Path, model: str, plan: str) -> None:
    made = picture(pipe, job.settings)
    about = {key: getattr(job.settings, key) for key in KEYS}
    # the picture comes last: where it exists, everything about it does
    write_json(target.with_suffix(".json"), about | {"model": model, "plan": json.loads(plan)})
    images.write_image(target, made, {"prompt": job.settings.prompt, "seed": job.settings.seed})
