"""What a rollout makes and what it remembers, checked where it is said."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

from fastdiff.acceleration import check_choice, check_number
from fastdiff.video.cache import POSITIONS
from fastdiff.video.storage import KINDS as STORAGE
from fastdiff_pipelines.rollout.motion import Motion

SAMPLERS = ("renoise", "euler")
"""Clean estimate and noise again (few-step students), or straight on along the velocity (undistilled models)."""
NOISES = ("fresh", "fixed", "warped")
"""Drawn for every chunk; the same for every chunk; or moved along with what moves in the control frames."""
CONTEXTS = ("rolling", "steps", "last", "clean")
"""What a chunk sees of the ones before: finished latents, and of those still in flight what they look like now; at each
step what they looked like at that step; what they looked like at their last step; or finished latents only, which
costs one more pass for every chunk."""
BATCHED = ("rolling", "steps")
"""Contexts that several chunks in flight can share one denoiser call with."""


@dataclass(frozen=True)
class Context:
    """What is kept of the past. Fixed for the life of a session.

    Attributes:
        frames: latent frames that are kept; with those of a chunk, what the model was trained on.
        sinks: how many of the first frames stay for good.
        evict_below: a sink whose likeness to the newest frame falls below this cosine gives way; None keeps them.
        kind: one of `CONTEXTS`. Those of `BATCHED` let several chunks fly; one chunk at a time "rolling" and "clean"
            are the same, and what Self-Forcing trains for.
        level: sigma the finished latents are noised to before they become context ("rolling" and "clean"), 0..1.
        recache_every: chunks after which the whole context is computed again from the kept latents; 0 does it only when
            the prompt changes.
        redecode: how often the first chunk under a new prompt is decoded for nothing before it is decoded. A causal
            decoder remembers what it last drew; one that knows no cuts goes on showing it for some chunks.
        positions: "relative" to the cache, or "absolute" from the first frame on.
        storage: "native", "int8" or "float8".
    """

    frames: int = 4
    sinks: int = 0
    evict_below: float | None = None
    kind: str = "rolling"
    level: float = 0.0
    recache_every: int = 0
    redecode: int = 1
    positions: str = "relative"
    storage: str = "native"

    def __post_init__(self):
        check_number("Context", "frames", self.frames, 1, whole=True)
        check_number("Context", "sinks", self.sinks, 0, self.frames - 1, whole=True)
        check_choice("Context", "kind", self.kind, CONTEXTS)
        check_number("Context", "level", self.level, 0, 1)
        check_number("Context", "recache_every", self.recache_every, 0, whole=True)
        check_number("Context", "redecode", self.redecode, 0, 8, whole=True)
        check_choice("Context", "positions", self.positions, POSITIONS)
        check_choice("Context", "storage", self.storage, STORAGE)
        if self.evict_below is not None:
            check_number("Context", "evict_below", self.evict_below, -1, 1)


@dataclass(frozen=True)
class RolloutSettings:
    """What the next chunks get. All may change live.

    Attributes:
        prompts: one for each video of the batch.
        negative_prompt: used where `guidance_scale` is above 1.
        steps: denoiser calls of a chunk.
        sigmas: noise levels of the steps, falling, in (0, 1]; None spaces `steps` of them as the scheduler does.
        sampler: one of `SAMPLERS`.
        strength: how far control frames are noised, in (0, 1]; without controls it is 1.
        guidance_scale: 1 asks the model once, more guides against the negative prompt with a second row.
        noise: one of `NOISES`.
        seed: of everything drawn.
        chunk: latent frames made at a time.
        batched: several chunks in flight, each at its own step, in one denoiser call.
        motion: lowers `strength` where control frames move; None leaves it alone.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    steps: int = 4
    sigmas: tuple[float, ...] | None = None
    sampler: str = "renoise"
    strength: float = 0.8
    guidance_scale: float = 1.0
    noise: str = "fresh"
    seed: int = 0
    chunk: int = 1
    batched: bool = True
    motion: Motion | None = None

    def __post_init__(self):
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be one text or more, got {self.prompts!r}")
        object.__setattr__(self, "prompts", prompts)
        check_number("RolloutSettings", "steps", self.steps, 1, 1000, whole=True)
        if self.sigmas is not None:
            try:
                levels = tuple(float(level) for level in self.sigmas)
            except (TypeError, ValueError):
                levels = ()
            falling = all(after < before for before, after in itertools.pairwise(levels))
            if len(levels) != self.steps or not falling or not all(0 < level <= 1 for level in levels):
                raise ValueError(f"sigmas must be {self.steps} falling levels in (0, 1], got {self.sigmas!r}")
            object.__setattr__(self, "sigmas", levels)
        check_choice("RolloutSettings", "sampler", self.sampler, SAMPLERS)
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise ValueError(f"RolloutSettings: strength={self.strength!r} must be above 0 and at most 1")
        check_number("RolloutSettings", "guidance_scale", self.guidance_scale, 1, 1000)
        check_choice("RolloutSettings", "noise", self.noise, NOISES)
        check_number("RolloutSettings", "seed", self.seed, 0, 2**63 - 1, whole=True)
        check_number("RolloutSettings", "chunk", self.chunk, 1, whole=True)
        for name, kind, words in (("negative_prompt", str, "a text"), ("batched", bool, "True or False")):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"RolloutSettings: {name}={getattr(self, name)!r} must be {words}")
        if self.motion is not None and not isinstance(self.motion, Motion):
            raise ValueError(f"motion must be a Motion or None, got {self.motion!r}")

    def changed(self, **changes: Any) -> RolloutSettings:
        """The settings with some of them changed; `prompt` stands for all prompts, new `steps` replace `sigmas`.

        Raises:
            TypeError: for a name that is not a setting.
            ValueError: for an impossible value, or another number of prompts.
        """
        if "prompt" in changes:
            changes["prompts"] = (changes.pop("prompt"),) * len(self.prompts)
        known = [field.name for field in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"{', '.join(unknown)} cannot be changed live; these can: prompt, {', '.join(known)}")
        if changes.get("sigmas") is not None and "steps" not in changes:
            changes["steps"] = len(changes["sigmas"])
        elif "steps" in changes and "sigmas" not in changes:
            changes["sigmas"] = None
        new = replace(self, **changes)
        if len(new.prompts) != len(self.prompts):
            raise ValueError(f"a rollout of {len(self.prompts)} videos keeps their number, got {len(new.prompts)}")
        return new


def check_together(settings: RolloutSettings, context: Context) -> None:
    """Raise a `ValueError` that says what to change where settings and context do not fit each other."""
    if settings.batched and context.kind not in BATCHED:
        kinds = " or ".join(BATCHED)
        raise ValueError(
            f"several chunks in flight need a context of kind {kinds}, not {context.kind}; or set batched=False"
        )
    room = context.frames - context.sinks
    if settings.chunk > room:
        raise ValueError(f"chunks of {settings.chunk} latent frames need a context with as many beside the sinks")
