"""Published few-step models, and how each is meant to run: scheduler, steps and guidance, from the model's own card.

A few-step model run as its teacher is run gives mush: its guidance is distilled into it, and its timesteps are the
few it was trained on. The table below is small on purpose. A row is found by the name of a model or LoRA, or, for
models under another name, by what only they have in their configs. What is chosen is said aloud and any of it may be
overridden.
"""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastdiff.anatomy import public_class

_log = logging.getLogger(__name__)

CHOICES = ("auto", "none")


@dataclass(frozen=True)
class Recipe:
    """How one published model runs.

    Attributes:
        name: what to call it; `recipe=` takes this too.
        pattern: a regular expression on its id or file in lower case, all punctuation a hyphen. A group is the steps.
        steps, guidance: what `num_inference_steps` and `guidance_scale` should be. Guidance of 0 or 1 is none.
        scheduler: a class of diffusers; empty keeps the pipeline's own.
        settings: entries of the scheduler's config to change.
        options: further arguments of the pipeline's call.
        timesteps: what `steps` steps stand for, where the scheduler would choose others.
        lora_scale: for a LoRA, the weight it was published with.
    """

    name: str
    pattern: str
    steps: int
    guidance: float
    scheduler: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    timesteps: tuple[int, ...] = ()
    lora_scale: float = 1.0

    def arguments(self, pipe: Any, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        """Keyword arguments for a call of the pipeline, what the user gave before what the recipe says."""
        chosen = {
            "num_inference_steps": self.steps if steps is None else steps,
            "guidance_scale": self.guidance if guidance is None else guidance,
            **dict(self.options),
        }
        known = inspect.signature(public_class(pipe).__call__).parameters
        if "strength" not in known and self.timesteps and chosen["num_inference_steps"] == len(self.timesteps):
            chosen["timesteps"] = list(self.timesteps)
        if "intermediate_timesteps" in known and chosen["num_inference_steps"] != 2:
            # its default is for two steps, and the scheduler raises for any other number
            chosen["intermediate_timesteps"] = None
        return {name: value for name, value in chosen.items() if name in known}

    def __str__(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        guidance = f"guidance {self.guidance:g}" if self.guidance > 1 else "no guidance (it is distilled in)"
        return f"{self.name}: {self.scheduler or 'its own scheduler'}, {steps}, {guidance}"


_TRAILING = (("timestep_spacing", "trailing"),)
_HYPER = r"hyper-sd(?:xl|15)-"

RECIPES = (
    # LoRAs and checkpoints of several step counts; their file names say which
    Recipe("Hyper-FLUX", r"hyper-flux.*?-(\d+)steps?", 8, 3.5, lora_scale=0.125),
    Recipe("Hyper-SD3", r"hyper-sd3.*?-(\d+)steps?", 8, 5.0, lora_scale=0.125),
    Recipe("Hyper-SD CFG", _HYPER + r"(\d+)steps?-cfg", 8, 5.0, "DDIMScheduler", _TRAILING),
    Recipe("Hyper-SDXL 1-step UNet", _HYPER + "1steps?-unet", 1, 0.0, "LCMScheduler", timesteps=(800,)),
    Recipe("Hyper-SD 1-step", _HYPER + "1steps?", 1, 0.0, "TCDScheduler", options=(("eta", 1.0),)),
    Recipe("Hyper-SD", _HYPER + r"(\d+)steps?", 4, 0.0, "DDIMScheduler", _TRAILING),
    Recipe(
        "SDXL-Lightning 1-step", "sdxl-lightning.*?-1step", 1, 0.0, "EulerDiscreteScheduler",
        (*_TRAILING, ("prediction_type", "sample")),
    ),
    Recipe("SDXL-Lightning", r"sdxl-lightning(?:.*?-(\d+)step)?", 4, 0.0, "EulerDiscreteScheduler", _TRAILING),
    Recipe("DMD2 1-step", "dmd2.*?-1step", 1, 0.0, "LCMScheduler", timesteps=(399,)),
    Recipe("DMD2", "dmd2", 4, 0.0, "LCMScheduler", timesteps=(999, 749, 499, 249)),
    Recipe("TCD", "tcd-(?:sdxl|sd15|sd21|lora)", 4, 0.0, "TCDScheduler", options=(("eta", 0.3),)),
    Recipe("LCM-LoRA", "lcm-lora", 4, 1.0, "LCMScheduler"),
    # whole models
    Recipe("PixArt-delta", "pixart-(?:lcm|delta)", 4, 0.0, "LCMScheduler"),
    Recipe("LCM", "lcm-(?:dreamshaper|sdxl|ssd)", 4, 8.0, "LCMScheduler"),
    Recipe("SDXL-Turbo", "sdxl-turbo", 1, 0.0, "EulerAncestralDiscreteScheduler", _TRAILING),
    Recipe("SD-Turbo", "sd-turbo", 1, 0.0, "EulerDiscreteScheduler", _TRAILING),
    Recipe("SANA-Sprint", "sana-sprint", 2, 4.5, "SCMScheduler"),
    Recipe(
        "FLUX.1-schnell", "flux-1-schnell", 4, 0.0, "FlowMatchEulerDiscreteScheduler",
        (("shift", 1.0), ("use_dynamic_shifting", False)), (("max_sequence_length", 256),),
    ),
    Recipe("SD3.5-Turbo", "stable-diffusion-3-5-large-turbo", 4, 0.0, "FlowMatchEulerDiscreteScheduler"),
    Recipe("Z-Image-Turbo", "z-image-turbo", 8, 0.0, "FlowMatchEulerDiscreteScheduler", (("shift", 3.0),)),
)  # fmt: skip
"""Settings as the models' cards had them; a card read again outranks them. The first row that fits is taken."""


def named(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for recipe in RECIPES:
        if recipe.name.lower() == name.lower():
            return recipe
    raise ValueError(f"no recipe is called {name!r}; use {', '.join([*CHOICES, *(one.name for one in RECIPES)])}")


def by_name(identity: str) -> Recipe | None:
    """The recipe of a model or LoRA by its id, folder or file, such as "stabilityai/sd-turbo"; None if unknown."""
    last = "/".join(re.split(r"[/\\]", identity.rstrip("/\\"))[-3:])
    plain = re.sub(r"[^a-z0-9]+", "-", last.lower())
    for recipe in RECIPES:
        # a whole word, so that "my-lcm-lorax" is not LCM-LoRA
        found = re.search(rf"(?:^|-)(?:{recipe.pattern})(?:-|$)", plain)
        if found:
            steps = found.group(1) if found.re.groups else None
            return replace(recipe, steps=int(steps)) if steps else recipe
    return None


def by_config(pipe: Any) -> Recipe | None:
    """The recipe of a pipeline whose name says nothing, by what only such a model has in its configs; None if none."""
    kind = public_class(pipe).__name__
    for name, fits in _SIGNS.items():
        if fits(kind, pipe.scheduler, _config(pipe)):
            return named(name)
    return None


def recipe_of(pipe: Any) -> Recipe | None:
    """The recipe of a loaded pipeline: of its active LoRA, else of its name, else by its configs; None if plain."""
    for adapter in _adapters(pipe):
        found = by_name(adapter)
        if found:
            return found
    return by_name(getattr(pipe, "name_or_path", None) or "") or by_config(pipe)


def chosen(pipe: Any, recipe: str) -> Recipe | None:
    """What `recipe=` means for a pipeline: "auto" its own, "none" none, else the one of that name."""
    if recipe == "none":
        return None
    return recipe_of(pipe) if recipe == "auto" else named(recipe)


def settle(pipe: Any, recipe: Recipe) -> None:
    """Give a pipeline the recipe's scheduler, and say what was chosen. Steps and guidance are for the call.

    A scheduler that is what the recipe asks for already is left as it is.
    """
    import diffusers

    if recipe.scheduler:
        wanted = getattr(diffusers, recipe.scheduler)
        config = pipe.scheduler.config
        right = type(pipe.scheduler) is wanted and all(config.get(key) == value for key, value in recipe.settings)
        if not right:
            pipe.scheduler = wanted.from_config(config, **dict(recipe.settings))
    _log.warning("%s", recipe)


def adapter_name(lora: str) -> str:
    """A name for a LoRA's adapter by which `recipe_of` knows it again; peft allows no dots."""
    last = re.split(r"[/\\]", lora.rstrip("/\\"))[-3:]
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(last)).strip("-")


def _adapters(pipe: Any) -> list[str]:
    if not callable(getattr(pipe, "get_active_adapters", None)):
        return []
    try:
        return pipe.get_active_adapters()
    except ValueError:  # diffusers' answer where peft is not installed
        return []


def _config(pipe: Any) -> Any:
    part = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    return getattr(part, "config", {})


def _is_trailing(scheduler: Any, kind: str) -> bool:
    return type(scheduler).__name__ == kind and scheduler.config.get("timestep_spacing") == "trailing"


_SIGNS: dict[str, Callable[[str, Any, Any], bool]] = {
    "SANA-Sprint": lambda kind, scheduler, config: kind.startswith("SanaSprint"),
    "PixArt-delta": lambda kind, scheduler, config: (
        kind.startswith("PixArt") and type(scheduler).__name__ == "LCMScheduler"
    ),
    "LCM": lambda kind, scheduler, config: (
        config.get("time_cond_proj_dim") is not None and type(scheduler).__name__ == "LCMScheduler"
    ),
    "LCM-LoRA": lambda kind, scheduler, config: type(scheduler).__name__ == "LCMScheduler",
    "TCD": lambda kind, scheduler, config: type(scheduler).__name__ == "TCDScheduler",
    # of FLUX.1, only schnell is not told its guidance
    "FLUX.1-schnell": lambda kind, scheduler, config: (
        kind in ("FluxPipeline", "FluxImg2ImgPipeline") and not config.get("guidance_embeds")
    ),
    "SDXL-Turbo": lambda kind, scheduler, config: (
        kind.startswith("StableDiffusionXL") and _is_trailing(scheduler, "EulerAncestralDiscreteScheduler")
    ),
    "SD-Turbo": lambda kind, scheduler, config: (
        kind in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
        and config.get("cross_attention_dim") == 1024
        and scheduler.config.get("prediction_type") == "epsilon"
        and _is_trailing(scheduler, "EulerDiscreteScheduler")
    ),
}
