"""Settings made ready: embeddings, noises and step weights as tensors, so that a step is only arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.sampling import guidance, rows
from fastdiff_pipelines.blending import blend, blend_conditioning
from fastdiff_pipelines.denoiser import Conditioning, Denoiser
from fastdiff_pipelines.settings import Settings

WEIGHTS = tuple(guidance.GuidedTable.__dataclass_fields__)
"""Names of the rows of `Prepared.weights`."""


@dataclass(frozen=True)
class Shape:
    """What a stream is built for and cannot change: image and latent size, and the dtype states are kept in."""

    height: int
    width: int
    latent: tuple[int, int, int]
    device: torch.device
    state: torch.dtype


@dataclass(frozen=True)
class Prepared:
    """One `Settings`, ready to run.

    Attributes:
        version: grows with every update; frames of one version may share batched tensors.
        table: the sampler, of the state dtype, on the stream's device.
        exact: the guided step weights in float64 on the CPU.
        weights: the same as one tensor ``[12, n]`` on the device, rows named by `WEIGHTS`.
        told: timesteps told to the denoiser, float32 ``[n]``.
        positive, negative: conditioning of one row; `negative` is None where guidance needs none.
        texts: conditioning of every text that was blended into `positive`.
        noises: fixed noise ``[n, C, h, w]``: row 0 enters a frame, row i is injected on the way to step i.
        entering: ``(signal, noise)`` of step 0.
        negative_steps: how many first steps of a frame need a negative row.
        uses_reference, injects, has_history: which terms of a step are not all zero.
    """

    version: int
    settings: Settings
    table: rows.RowTable
    exact: guidance.GuidedTable
    weights: torch.Tensor
    told: torch.Tensor
    positive: Conditioning
    negative: Conditioning | None
    texts: dict[str, Conditioning]
    noises: torch.Tensor
    entering: tuple[float, float]
    negative_steps: int
    uses_reference: bool
    injects: bool
    has_history: bool

    def __len__(self) -> int:
        return len(self.told)

    def noises_for(self, frame_number: int) -> torch.Tensor:
        """The noises of a frame, ``[n, C, h, w]``; fresh ones depend on the seed and the frame's number alone."""
        settings = self.settings
        share = {"fixed": 0.0, "fresh": 1.0, "blended": settings.blend}[settings.noise]
        if share == 0.0:
            return self.noises
        fresh = _drawn(settings, frame_number + 1, self.noises)
        if share == 1.0:
            return fresh
        return (1 - share) ** 0.5 * self.noises + share**0.5 * fresh


def draw(seed: int, number: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noises shaped as ``like`` ``[n, ...]``, equal on every device and stable when n grows."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    noises = [torch.randn(like.shape[1:], generator=generator) for _ in range(len(like))]
    return torch.stack(noises).to(like.device, like.dtype)


def prepare(
    settings: Settings, scheduler: Any, denoiser: Denoiser, shape: Shape, version: int, before: Prepared | None = None
) -> Prepared:
    """Make settings ready, reusing from ``before`` the embeddings and noises that did not change."""
    options = dict(denoiser.table_options(*shape.latent[1:]))
    if settings.timesteps is not None:
        options.pop("mu", None)
        options.pop("uniform", None)
        options["timesteps"] = settings.timesteps
    table = rows.build(settings.sampler, scheduler, steps=settings.steps, strength=settings.strength, **options)
    exact = guidance.guide(table, settings.guidance, settings.guidance_scale, settings.delta)
    negatives = guidance.negative_steps(len(table), settings.guidance, settings.guidance_scale)
    blank = torch.empty(len(table), *shape.latent, device=shape.device, dtype=shape.state)
    texts = _texts(settings, denoiser, before)
    return Prepared(
        version=version,
        settings=settings,
        table=table.to(shape.device, shape.state),
        exact=exact,
        weights=torch.stack([getattr(exact, name) for name in WEIGHTS]).to(shape.device, shape.state),
        told=table.timesteps.to(shape.device, torch.float32),
        positive=_positive(settings, denoiser, texts, before),
        negative=_negative(settings, denoiser, before) if negatives else None,
        texts=texts,
        noises=_noises(settings, blank, before),
        entering=(float(table.signal[0]), float(table.noise[0])),
        negative_steps=negatives,
        uses_reference=bool((exact.reference != 0).any()),
        injects=table.injects_noise,
        has_history=table.has_history,
    )


def _words(settings: Settings) -> tuple[tuple[str, float], ...]:
    return settings.prompts or ((settings.prompt, 1.0),)


def _texts(settings: Settings, denoiser: Denoiser, before: Prepared | None) -> dict[str, Conditioning]:
    """Every text encoded, those that were in use before taken from there: a ramp encodes its two ends once."""
    same = before is not None and settings.embedded_guidance == before.settings.embedded_guidance
    known = before.texts if before is not None and same else {}
    return {
        text: known[text] if text in known else denoiser.encode(text, settings.embedded_guidance)
        for text, _ in _words(settings)
    }


def _positive(
    settings: Settings, denoiser: Denoiser, texts: dict[str, Conditioning], before: Prepared | None
) -> Conditioning:
    if before is not None and _same_look(settings, before.settings):
        return before.positive
    pairs = _words(settings)
    words = blend_conditioning([texts[text] for text, _ in pairs], [weight for _, weight in pairs])
    return {**words, **denoiser.pictures(settings)}


def _same_look(one: Settings, other: Settings) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("prompt", "prompts", "embedded_guidance", "control", "image_prompt")
    )


def _negative(settings: Settings, denoiser: Denoiser, before: Prepared | None) -> Conditioning:
    if before is not None and before.negative is not None:
        pictures = all(
            getattr(settings, name) is getattr(before.settings, name) for name in ("control", "image_prompt")
        )
        same = all(
            getattr(settings, name) == getattr(before.settings, name)
            for name in ("negative_prompt", "embedded_guidance")
        )
        if same and pictures:
            return before.negative
    words = denoiser.encode_negative(settings.negative_prompt, settings.embedded_guidance)
    pictures = denoiser.pictures(settings)
    if "image_embeds" in pictures:
        # what diffusers guides an IP-Adapter against is no picture
        pictures = {**pictures, "image_embeds": torch.zeros_like(pictures["image_embeds"])}
    return {**words, **pictures}


def _noises(settings: Settings, blank: torch.Tensor, before: Prepared | None) -> torch.Tensor:
    if before is not None and blank.shape == before.noises.shape:
        same = (settings.seed, settings.seeds) == (before.settings.seed, before.settings.seeds)
        if same:
            return before.noises
    return _drawn(settings, 0, blank)


def _drawn(settings: Settings, number: int, like: torch.Tensor) -> torch.Tensor:
    """Noise of the seed, or of several blended; each of the ``n`` is one vector."""
    seeds = settings.seeds or ((settings.seed, 1.0),)
    parts = [draw(seed, number, like) for seed, _ in seeds]
    return blend(parts, [weight for _, weight in seeds], dims=like.dim() - 1)
