"""What a stream is asked to do, checked on construction. A frame carries its settings with it through the stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from fastdiff.sampling.guidance import GUIDANCE
from fastdiff.sampling.rows import SAMPLERS
from fastdiff_pipelines.conditions import Picture

NOISE = ("fixed", "fresh", "blended")
MOST_STEPS = 1000
MOST_BLENDED = 16


@dataclass(frozen=True)
class Settings:
    """Settings of one frame; every one may change live, with `Stream.update`.

    Attributes:
        prompt: what to draw.
        negative_prompt: what not to draw, used by guidance "full" and "onetime"; "" is the pipeline's own default.
        steps: denoiser steps a frame takes, 1 or more.
        strength: how much of the input to replace, in (0, 1]; 1 starts from noise and is what text-to-image needs.
        timesteps: falling timesteps that replace `steps` and `strength`: 0-999, or 1000 sigma for flow models.
        guidance: "none", "full" (a second row per row), "self" (virtual negative from the frame's own latent) or
            "onetime" (one negative row, at a frame's first step).
        guidance_scale: weight of the prompt over the negative; 1 is no guidance.
        delta: weight of the negative, in [0, 2]; lower is softer.
        sampler: "lcm", "tcd", "ddim", "dpm", or for flow-matching models "lcm", "euler".
        noise: "fixed" (the same for every frame: calm), "fresh" (new for every frame), or "blended".
        blend: share of fresh noise under "blended", in [0, 1].
        seed: of all noise.
        embedded_guidance: scale told to models that take guidance as an input (FLUX.1-dev, full LCM UNets).
        prompts: ``(text, weight)`` pairs that replace `prompt`: their embeddings on the arc between them.
        seeds: ``(seed, weight)`` pairs that replace `seed`: the noises on the arc between them.
        control: the picture of the pipeline's ControlNet, None for none.
        image_prompt: the picture of the pipeline's IP-Adapter, None for none.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 4
    strength: float = 0.5
    timesteps: tuple[float, ...] | None = None
    guidance: str = "none"
    guidance_scale: float = 1.0
    delta: float = 1.0
    sampler: str = "lcm"
    noise: str = "fixed"
    blend: float = 0.5
    seed: int = 0
    embedded_guidance: float = 3.5
    prompts: tuple[tuple[str, float], ...] = ()
    seeds: tuple[tuple[int, float], ...] = ()
    control: Picture | None = None
    image_prompt: Picture | None = None

    def __post_init__(self):
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {type(getattr(self, name)).__name__}")
        for name in ("strength", "guidance_scale", "delta", "blend", "embedded_guidance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in tuple(self.timesteps)))
            object.__setattr__(self, "steps", len(self.timesteps))
        self._check("steps", type(self.steps) is int and 1 <= self.steps <= MOST_STEPS, f"1 to {MOST_STEPS}")
        self._check("strength", 0 < self.strength <= 1, "above 0 and at most 1")
        self._check("guidance", self.guidance in GUIDANCE, f"one of {', '.join(GUIDANCE)}")
        self._check("guidance_scale", 0 <= self.guidance_scale <= 100, "0 to 100")
        self._check("delta", 0 <= self.delta <= 2, "0 to 2")
        self._check("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}")
        self._check("noise", self.noise in NOISE, f"one of {', '.join(NOISE)}")
        self._check("blend", 0 <= self.blend <= 1, "0 to 1")
        self._check("seed", type(self.seed) is int and 0 <= self.seed < 2**63, "a whole number of 0 to 2**63 - 1")
        for name in ("control", "image_prompt"):
            self._check(name, isinstance(getattr(self, name), Picture | None), "a Picture or None")
        object.__setattr__(self, "prompts", _weighted("prompts", self.prompts, lambda text: isinstance(text, str)))
        possible = lambda seed: type(seed) is int and 0 <= seed < 2**63  # noqa: E731
        object.__setattr__(self, "seeds", _weighted("seeds", self.seeds, possible))

    def _check(self, name: str, passed: bool, wanted: str) -> None:
        if not passed:
            raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def changed(self, **changes: Any) -> Settings:
        """The settings with some of them changed.

        New `steps` or `strength` replace explicit `timesteps`, a new `prompt` or `seed` replaces blended ones.

        Raises:
            TypeError: for a name that is not a setting.
            ValueError: for an impossible value.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"{', '.join(unknown)} cannot be changed live; these can: {', '.join(known)}")
        if ("steps" in changes or "strength" in changes) and "timesteps" not in changes:
            changes["timesteps"] = None
        for one, several in (("prompt", "prompts"), ("seed", "seeds")):
            if one in changes and several not in changes:
                changes[several] = ()
        return replace(self, **changes)


def _weighted(name: str, pairs: Any, possible: Callable[[Any], bool]) -> tuple[tuple[Any, float], ...]:
    """Pairs of a thing and a positive weight, those of weight 0 left out."""
    try:
        found = tuple((thing, float(weight)) for thing, weight in pairs)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be pairs of a value and a weight, got {pairs!r}") from None
    if not all(possible(thing) and math.isfinite(weight) and weight >= 0 for thing, weight in found):
        raise ValueError(f"{name} must be pairs of a possible value and a weight of 0 or more, got {pairs!r}")
    if len(found) > MOST_BLENDED or (found and not any(weight for _, weight in found)):
        raise ValueError(f"{name} must be at most {MOST_BLENDED}, with one weight above 0 at least, got {pairs!r}")
    return tuple(pair for pair in found if pair[1])
