"""`fastdiff generate`: one picture from words, or from words and a picture."""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

from fastdiff import published
from fastdiff_app import images
from fastdiff_app.console import err
from fastdiff_app.engine import accelerated, load_pipeline, read_plan, student_course
from fastdiff_app.failures import ExitCode, Failure, one_line
from fastdiff_app.methods import check_finite, to_bytes
from fastdiff_app.outputs import check_writable
from fastdiff_app.video_models import makes_video

USUAL_STEPS, USUAL_GUIDANCE = 25, 5.0


@dataclass(frozen=True)
class Settings:
    """Everything one picture depends on.

    Attributes:
        steps, guidance: None takes what a published few-step model was made for, 25 and 5 for any other.
        size: (height, width) or None for the model's own.
        recipe: as of `fastdiff.load`.
        student: steps and guidance of the few-step student that draws, which stand for the usual ones.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    image: Path | None = None
    strength: float = 0.5
    recipe: str = "auto"
    student: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        steps, guidance = self.steps, self.guidance
        for wrong, what in (
            (not self.prompt.strip(), "the prompt is empty"),
            (steps is not None and not 1 <= steps <= 1000, f"steps must be from 1 to 1000, not {steps}"),
            (guidance is not None and not 0 <= guidance <= 100, f"guidance must be from 0 to 100, not {guidance}"),
            (not 0 < self.strength <= 1, f"strength must be above 0 and at most 1, not {self.strength}"),
            (
                self.image is not None and steps is not None and int(steps * self.strength) < 1,
                "steps times strength must reach 1",
            ),
            (not 0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}"),
        ):
            if wrong:
                raise Failure(ExitCode.USAGE, what)
        if self.recipe not in published.CHOICES:
            try:
                published.named(self.recipe)
            except ValueError as error:
                raise Failure(ExitCode.USAGE, one_line(error)) from error

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        import torch

        found: dict[str, Any] = {
            "prompt": self.prompt,
            **self.course(pipe),
            "generator": torch.Generator("cpu").manual_seed(self.seed),
            "output_type": "np",
        }
        if self.negative:
            found["negative_prompt"] = self.negative
        if self.image is not None:
            picture = images.read_image(self.image)
            height, width = self.size or native_size(pipe)
            found |= {"image": images.fitted(picture, height, width), "strength": self.strength}
        elif self.size:
            found["height"], found["width"] = self.size
        return found

    def course(self, pipe: Any) -> dict[str, Any]:
        """The part of `arguments` that is about steps and guidance: the user's, the recipe's, or the usual."""
        recipe = published.chosen(pipe, self.recipe) if self.student is None else None
        if recipe is None:
            steps, guidance = self.student or (USUAL_STEPS, USUAL_GUIDANCE)
            return {
                "num_inference_steps": steps if self.steps is None else self.steps,
                "guidance_scale": guidance if self.guidance is None else self.guidance,
            }
        steps = self.steps
        if steps is None and self.image is not None:
            # diffusers runs only the last of these, and the model was made for so many that run
            steps = ceil(recipe.steps / self.strength - 1e-9)
        return recipe.arguments(pipe, steps, self.guidance)


def native_size(pipe: Any) -> tuple[int, int]:
    """(height, width) a pipeline was made for."""
    if makes_video(pipe):
        from fastdiff_pipelines.rollout.rollout import native_size as video_size

        return video_size(pipe)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    sample = getattr(getattr(denoiser, "config", None), "sample_size", None) or 64
    side = (sample if isinstance(sample, int) else sample[0]) * getattr(pipe, "vae_scale_factor", 8)
    return side, side


def picture(pipe: Any, settings: Settings) -> Any:
    """Runs the pipeline once: uint8 [H, W, 3], or `Failure` when the model gives NaN or refuses the settings."""
    try:
        made = pipe(**settings.arguments(pipe)).images[0]
    except (ValueError, TypeError) as error:
        raise Failure(ExitCode.USAGE, f"the model refuses these settings: {one_line(error)}") from error
    except RuntimeError as error:
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
            raise Failure(ExitCode.MODEL, f"out of memory; take a smaller --size ({one_line(error)})") from error
        raise
    check_finite(made, "the picture")
    return to_bytes(made)


def generate(
    settings: Settings,
    output: Path,
    model: str | None,
    plan_text: str | None,
    compile: bool | None,
    strict: bool,
    lora: str | None = None,
    student: str | None = None,
) -> None:
    """Writes one picture and says on stderr what was engaged."""
    check_writable(output, images.SUFFIXES)
    if settings.image is not None:
        images.read_image(settings.image)
    plan = read_plan(plan_text, compile, student)
    if student is not None:
        settings = replace(settings, student=student_course(student, model))
    task = "text-to-image" if settings.image is None else "image-to-image"
    pipe = load_pipeline(model, task, lora, settings.recipe)
    course = settings.course(pipe)
    with accelerated(pipe, plan, strict) as handle:
        start = perf_counter()
        made = picture(pipe, settings)
        seconds = perf_counter() - start
        err.print(str(handle.report()), markup=False)
    steps, guidance = course["num_inference_steps"], course["guidance_scale"]
    about = {"prompt": settings.prompt, "seed": settings.seed, "steps": steps, "guidance": guidance}
    about |= {"model": model or "mini-sd", "plan": plan.to_json()} | ({} if lora is None else {"lora": lora})
    images.write_image(output, made, about)
    err.print(f"{output} in {seconds:.2f} s, {steps} steps, guidance {guidance:g}", markup=False)
