"""`fastdiff warmup`: compiles a model for the sizes it will be used at, so that the first real call need not wait."""

from time import perf_counter

from fastdiff_app import images
from fastdiff_app.console import err, out
from fastdiff_app.engine import accelerated, load_pipeline, read_plan
from fastdiff_app.failures import ExitCode, Failure
from fastdiff_app.generate import Settings, picture


def warmup(shapes: str, model: str | None, plan_text: str | None, guidance: float) -> None:
    """Runs each shape twice with compilation on and prints what the first and second call took.

    torch keeps compiled code in its cache folder, so a later process with the same model, shapes and plan starts fast.
    """
    sizes = [images.parse_size(shape.strip()) for shape in shapes.split(",") if shape.strip()]
    if not sizes:
        raise Failure(ExitCode.USAGE, "--shapes names no shape: write for example 512,768x512")
    pipe = load_pipeline(model, "text-to-image")
    with accelerated(pipe, read_plan(plan_text, compile=True)) as handle:
        for size in sizes:
            assert size is not None
            taken = []
            for _ in range(2):
                start = perf_counter()
                picture(pipe, Settings("warm-up", steps=2, guidance=guidance, size=size))
                taken.append(perf_counter() - start)
            out.print(f"{size[1]}x{size[0]}: first call {taken[0]:.1f} s, then {taken[1]:.2f} s", markup=False)
        err.print(str(handle.report()), markup=False)
