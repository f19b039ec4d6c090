"""Commands that learn from a model before it is used: students, plans, and what can act on it."""

from pathlib import Path
from typing import Annotated

import typer

from fastdiff_app.options import Guidance, Model, Size, Steps


def distill(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; a killed run in it goes on.")],
    method: Annotated[
        str, typer.Option(help="phased, lcm, tcd, splam, scm, dmd, mmd, ict, agd (guidance in one forward) or koala.")
    ] = "phased",
    nfe: Annotated[int, typer.Option(min=1, max=50, help="Steps the student shall take (phased, dmd, mmd).")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    rank: Annotated[int, typer.Option(min=0, help="Of the LoRA; 0 trains the whole denoiser.")] = 16,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    guidance: Annotated[float, typer.Option(help="The teacher's, which goes into the student.")] = 5.0,
    start: Annotated[Path | None, typer.Option(help="A student's folder, to begin with its LoRA.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A student's folder, to learn from in the model's place.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="With koala: transformer layers of a UNet to keep.")] = 0,
    blocks: Annotated[
        str, typer.Option(help="With koala: numbers of a transformer's blocks to keep, as in 0,2,3.")
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="A file, a prompt a line; the embedded models need none.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many of the teacher's pictures to learn from.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: Model = None,
) -> None:
    """Train a faster student of a model: few steps, guidance in one forward, or fewer layers."""
    from fastdiff_app.distill import Task
    from fastdiff_app.distill import distill as run

    adapter = {"rank": 0, "adapter": 48} if method == "agd" else {"rank": 0 if method == "koala" else rank}
    training = dict(steps=steps, batch=batch_size, learning_rate=learning_rate, seed=seed, precision=precision)
    task = Task(method, nfe, guidance, start, teacher, layers, blocks)
    run(output, task, prompts, model, training | adapter, pictures)


def tune(
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .json file.")],
    budget: Annotated[str | None, typer.Option(help="psnr>=30, ssim>=0.95 or attribute_drop<=1%.")] = None,
    latency: Annotated[str | None, typer.Option(help="40ms or 1.5s for a picture, or 2.5x.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line; half to search with, half to prove on.")
    ] = None,
    steps: Steps = 28,
    guidance: Guidance = 5.0,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one call.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against latency into this .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page about it, .html.")] = None,
    model: Model = None,
) -> None:
    """Find the fastest plan within a budget, and prove it on other prompts."""
    from fastdiff_app import images
    from fastdiff_app.tune import Wish
    from fastdiff_app.tune import tune as run

    wish = Wish(budget, latency, prompts, steps, guidance, images.parse_size(size), batch_size)
    run(wish, output, model, plot, report)


def audit(model: Model = None) -> None:
    """Say what can act on a model here, and what diffusers' own caches would do to it without a word."""
    from fastdiff_app.tune import audit as run

    run(model)
