"""The command line. Every command says in one line what went wrong, and its exit status says it to scripts."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import fastdiff
from fastdiff_app import learn
from fastdiff_app.failures import REMEDY, ExitCode, Failure, one_line
from fastdiff_app.options import (
    Compile,
    Guidance,
    JsonFile,
    Model,
    Negative,
    PlanOption,
    Seed,
    Size,
    Strict,
    Student,
)

app = typer.Typer(
    name="fastdiff",
    help="Faster diffusers pipelines, with the price in quality measured.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastdiff {fastdiff.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file.")],
    seed: Seed = 0,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; 25, or what a few-step model or student was made for.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale, 1 is none; 5, or what a few-step model or student takes."),
    ] = None,
    size: Size = None,
    negative: Negative = "",
    image: Annotated[Path | None, typer.Option(help="Start from this picture (image to image).")] = None,
    strength: Annotated[float, typer.Option(help="With --image: how much may change, above 0 up to 1.")] = 0.5,
    model: Model = None,
    lora: Annotated[str | None, typer.Option(help="A LoRA: a file, a folder, or a hub id (owner/model/file).")] = None,
    recipe: Annotated[
        str, typer.Option(help="auto, none, or how a published few-step model runs, such as LCM-LoRA.")
    ] = "auto",
    student: Student = None,
    plan: PlanOption = None,
    compile: Compile = None,
    strict: Strict = False,
) -> None:
    """Make one picture."""
    from fastdiff_app import images
    from fastdiff_app.generate import Settings
    from fastdiff_app.generate import generate as run

    settings = Settings(prompt, negative, seed, steps, guidance, images.parse_size(size), image, strength, recipe)
    run(settings, output, model, plan, compile, strict, lora, student)


@app.command()
def stream(
    ctx: typer.Context,
    input: Annotated[Path | None, typer.Option("--input", "-i", help="A video file; a video model needs none.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the video should become.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .mp4, .mkv or .mov file.")] = None,
    json: JsonFile = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet to this picture.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Denoising steps.")] = 4,
    strength: Annotated[float, typer.Option(help="How much may change, above 0 up to 1.")] = 0.5,
    guidance: Annotated[str, typer.Option(help="none, full, self or onetime.")] = "none",
    guidance_scale: Annotated[float, typer.Option(help="Its scale.")] = 1.0,
    sampler: Annotated[str, typer.Option(help="lcm, tcd, ddim, dpm or euler (flow matching).")] = "lcm",
    noise: Annotated[
        str | None, typer.Option(help="fixed, fresh or blended; fixed if not given, fresh from a prompt alone.")
    ] = None,
    frame_buffer: Annotated[int, typer.Option(min=1, max=64, help="Frames that enter together.")] = 1,
    seed: Seed = 0,
    negative: Negative = "",
    size: Size = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    baseline: Annotated[
        int, typer.Option(min=0, help="Also run plain diffusers on so many of the frames, and compare.")
    ] = 0,
    model: Model = None,
    plan: PlanOption = None,
    compile: Compile = None,
    strict: Strict = False,
    demo: Annotated[bool, typer.Option("--demo", help="Draw a clip into out/ and compare on it.")] = False,
    source: Annotated[
        str | None, typer.Option(help="Live: camera, camera:1, screen, a URL, a file, a folder, or - (raw frames).")
    ] = None,
    sink: Annotated[
        str, typer.Option(help="Live: a file, a folder, an RTMP, UDP or SRT URL, window, virtual, or -.")
    ] = "-",
    fps: Annotated[float, typer.Option(help="Live: pace of files and folders, and of the sink.")] = 30.0,
    seconds: Annotated[float | None, typer.Option(help="Live: end after so long.")] = None,
    target_ms: Annotated[float | None, typer.Option(help="Live: age of pictures to keep.")] = None,
    record: Annotated[Path | None, typer.Option(help="Live: write a .fdrec for fastdiff replay.")] = None,
) -> None:
    """Turn a video into another, frame by frame, as fast as this machine can."""
    from fastdiff_app import images, modes
    from fastdiff_app.stream import StreamJob, draw_demo
    from fastdiff_app.stream import stream as run
    from fastdiff_app.video_models import from_noise, is_video

    for wrong, what in (  # a range of typer's lets NaN pass, and has no open end
        (not 0 < strength <= 1, f"--strength must be above 0 and at most 1, not {strength}"),
        (not 0 <= guidance_scale <= 100, f"--guidance-scale must be from 0 to 100, not {guidance_scale}"),
    ):
        if wrong:
            raise Failure(ExitCode.USAGE, what)
    mode = modes.mode_of(demo, source is not None, input is not None, is_video(model))
    modes.check_options(mode, [name for name in ctx.params if _given(ctx, name)])
    common: dict[str, Any] = dict(
        steps=steps,
        strength=strength,
        guidance=guidance,
        guidance_scale=guidance_scale,
        sampler=sampler,
        noise=noise or ("fresh" if mode == "noise" else "fixed"),
        frame_buffer=frame_buffer,
        seed=seed,
        negative=negative,
        size=images.parse_size(size),
        model=model,
        plan=plan,
        compile=compile,
        strict=strict,
        most_frames=frames,
    )
    if source is not None:
        from fastdiff_app.live.headless import stream as run_live

        return run_live(source, sink, prompt, fps, seconds, target_ms, json, record, common)
    if demo:
        job, truth = draw_demo(baseline, common)
        run(job, truth)
        return
    if prompt is None or output is None or (input is None and mode == "file"):
        raise Failure(ExitCode.USAGE, "--input, --prompt and --output are needed (or --demo)")
    if not prompt.strip():
        raise Failure(ExitCode.USAGE, "the prompt is empty")
    if input is None:
        from_noise(StreamJob(Path(), prompt, output, json, **common))
        return
    run(StreamJob(input, prompt, output, json, sheet, baseline=baseline, **common))


def _given(ctx: typer.Context, name: str) -> bool:
    """Whether the user wrote an option, whatever it says."""
    source = ctx.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="A .fdrec file.")],
    sink: Annotated[str | None, typer.Option(help="Where pictures go, as of stream; nowhere if not given.")] = None,
    fps: Annotated[float, typer.Option(help="Of a video that is written.")] = 30.0,
    model: Annotated[str | None, typer.Option(help="Another model than the recording names.")] = None,
    plan: PlanOption = None,
) -> None:
    """Run a recorded live session again and compare every picture by hash."""
    from fastdiff_app.live.headless import replay as run

    run(recording, model, plan, sink, fps)


@app.command()
def batch(
    jobs: Annotated[
        Path, typer.Argument(help="A .csv or .jsonl file with prompt, seed, size, ..., or a prompt a line.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")],
    seed: Annotated[int, typer.Option(help="Items without a seed of their own get one from this and their words.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; 25, or what the student was made for.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 is none; 5, or the student's.")] = None,
    size: Size = None,
    negative: Negative = "",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip, for models that make clips.")] = None,
    format: Annotated[str, typer.Option(help="png, jpg, webp or mp4; each file carries its parameters.")] = "png",
    batch_size: Annotated[int, typer.Option(help="Items in one call; 1 gives the same bytes wherever it runs.")] = 8,
    workers: Annotated[int | None, typer.Option(help="Processes; one a GPU, or what cores and memory allow.")] = None,
    attempts: Annotated[int, typer.Option(help="Tries before an item is given up.")] = 3,
    lease: Annotated[
        float, typer.Option(help="Seconds after which a silent worker of another machine is dead.")
    ] = 60.0,
    verify: Annotated[str, typer.Option(help="What is there is checked by its size, or by its hash.")] = "size",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    progress: Annotated[str, typer.Option(help="bar, json or none.")] = "bar",
    ray: Annotated[
        bool, typer.Option("--ray", help="Let a Ray cluster hand the work out (RAY_ADDRESS, or one of this machine).")
    ] = False,
    model: Model = None,
    student: Student = None,
    plan: PlanOption = None,
    compile: Compile = None,
) -> None:
    """Make everything a file asks for; what is there already is not made again, and a killed job goes on."""
    from fastdiff_app.batch import Run, defaults
    from fastdiff_app.batch import batch as run

    given = defaults(steps, guidance, size, negative, frames, student, model)
    run(
        Run(
            jobs,
            output,
            model,
            plan,
            compile,
            format=format,
            dtype=dtype,
            seed=seed,
            batch=batch_size,
            workers=workers,
            attempts=attempts,
            lease_s=lease,
            verify=verify,
            progress=progress,
            ray=ray,
            student=student,
        ),
        given,
    )


@app.command()
def demo(
    host: Annotated[str, typer.Option(help="Where to listen; only this machine can reach the default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And at which port.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD for everything the server has.")] = None,
    https: Annotated[bool, typer.Option("--https", help="With a certificate of its own; cameras need it.")] = False,
    max_users: Annotated[int, typer.Option(help="People at a time.")] = 4,
    target_ms: Annotated[float | None, typer.Option(help="Age of pictures to keep, by cheaper settings.")] = None,
    record: Annotated[Path | None, typer.Option(help="Allow recordings, into this folder.")] = None,
    size: Size = None,
    model: Annotated[str | None, typer.Option(help="A hub id, a folder, or identity (no model at all).")] = None,
    plan: PlanOption = None,
) -> None:
    """Open a page: a live camera through the model, single pictures, comparisons, batches."""
    from fastdiff_app import images
    from fastdiff_app.live.demo import demo as run

    run(host, port, auth, https, max_users, model, plan, target_ms, record, images.parse_size(size))


@app.command()
def doctor(model: Model = None) -> None:
    """Say what is installed, what is missing, and what can be accelerated here."""
    from fastdiff_app.doctor import doctor as run

    run(model)


app.command()(learn.distill)
app.command()(learn.tune)
app.command()(learn.audit)


@app.command()
def warmup(
    shapes: Annotated[str, typer.Option(help="Comma-separated sizes, as in 512,768x512.")],
    guidance: Guidance = 5.0,
    model: Model = None,
    plan: PlanOption = None,
) -> None:
    """Compile for these sizes now, so that later runs start fast."""
    from fastdiff_app.warmup import warmup as run

    run(shapes, model, plan, guidance)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark: stream, miniature, gpu, ...")],
    json: JsonFile = None,
    full: Annotated[bool, typer.Option("--full", help="Take longer and measure more.")] = False,
    only: Annotated[str | None, typer.Option(help="With gpu: one suite only.")] = None,
) -> None:
    """Measure, and write down on what."""
    from fastdiff_app.bench import bench as run

    run(name, json, full, only)


def run(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status; nothing a user can cause shows a traceback."""
    try:
        status = app(arguments, prog_name="fastdiff", standalone_mode=False)
        return status if isinstance(status, int) else ExitCode.OK
    except Failure as failure:
        return _say(str(failure), failure.code)
    except ModuleNotFoundError as error:
        package = (error.name or "a package").split(".")[0]
        remedy = REMEDY if package == "torch" else f"python -m pip install {package}"
        return _say(f"this needs {package}, which is not installed; install it with: {remedy}", ExitCode.MISSING)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", ExitCode.INTERRUPTED)
    except Exception as error:
        # usage errors of typer, old and new, know their own exit code
        if callable(format_message := getattr(error, "format_message", None)):
            return _say(f"{format_message()} (see fastdiff --help)", ExitCode(getattr(error, "exit_code", 2)))
        if os.environ.get("FASTDIFF_TRACEBACK"):
            raise
        hint = "this should not happen; FASTDIFF_TRACEBACK=1 shows where"
        return _say(f"{type(error).__name__}: {one_line(error)} ({hint})", ExitCode.BUG)


def _say(message: str, code: ExitCode) -> int:
    print(f"fastdiff: {message}", file=sys.stderr)
    return int(code)


def main() -> None:
    """The installed program."""
    sys.exit(run())


if __name__ == "__main__":
    main()
