"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="A hub id or a folder; the embedded miniature where not given.")]
PlanOption = Annotated[str | None, typer.Option("--plan", help="exact, balanced, fast, none, or a plan file.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile even on a CPU, or never; else as the plan says.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail when an acceleration of the plan does not engage.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Size = Annotated[str | None, typer.Option(help="512 or WIDTHxHEIGHT; the model's own where not given.")]
Negative = Annotated[str, typer.Option(help="What should not be there.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; 1 is none.")]
Student = Annotated[
    str | None,
    typer.Option(help="A few-step student: four-step, one-step, scm, or a folder of fastdiff distill."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")]
