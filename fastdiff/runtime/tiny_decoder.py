"""A small distilled autoencoder in the place of the full one (TAESD, https://github.com/madebyollin/taesd)."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Unsupported, Verdict
from fastdiff.anatomy import PIPELINE_CONFIG, anatomy, latent_channels
from fastdiff.hooks import Hooks


@dataclass(frozen=True)
class TinyDecoder(Acceleration):
    """Decode (and encode) with an `AutoencoderTiny` trained for the same latents. Lossy, bounded by PSNR.

    Args:
        decoder: an `AutoencoderTiny`, a folder, or a hub id; None chooses one of madebyollin's by the latents' family.
    """

    stage: ClassVar[str] = "weights"
    decoder: Any = None

    def __post_init__(self):
        if self.decoder is not None and not isinstance(self.decoder, str) and not hasattr(self.decoder, "decode"):
            raise ValueError(
                f"TinyDecoder: decoder must be an AutoencoderTiny, a folder or a hub id, not {self.decoder!r}"
            )

    def supports(self, pipe: Any) -> Verdict:
        """Refused when the decoder is tiny already, when there is none, and when the latents differ."""
        parts = anatomy(pipe)
        if parts.vae is None:
            return Verdict(False, f"{type(pipe).__name__} has no autoencoder; it works in pixels")
        if _is_tiny(parts.vae):
            return Verdict(False, "the autoencoder is a tiny one already")
        if "num_frames" in inspect.signature(parts.vae.decode).parameters:
            return Verdict(False, "the autoencoder decodes frames together, and a tiny one would each alone")
        if self.decoder is None:
            name, reason = _published(parts)
            return Verdict(bool(name), reason)
        return Verdict(True) if isinstance(self.decoder, str) else _matches(parts, self.decoder)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Load the decoder if need be and swap it in."""
        parts = anatomy(pipe)
        tiny = self.decoder
        if tiny is None:
            tiny, _ = _published(parts)
        if isinstance(tiny, str):
            tiny = _loaded(tiny)
            verdict = _matches(parts, tiny)
            if not verdict:
                raise Unsupported(f"TinyDecoder: {verdict.reason}")
        weight = next(parts.vae.parameters())
        own = next(tiny.parameters())
        if (own.device, own.dtype) != (weight.device, weight.dtype) and tiny is self.decoder:
            raise Unsupported(
                f"TinyDecoder: the given decoder is on {own.device} in {own.dtype} and the pipeline's on "
                f"{weight.device} in {weight.dtype}; move it there first"
            )
        tiny = tiny.to(device=weight.device, dtype=weight.dtype).eval()
        hooks.swap(pipe, parts.vae_name, tiny, also=(PIPELINE_CONFIG,))
        hooks.counter.held = lambda: sum(parameter.nbytes for parameter in tiny.parameters())
        hooks.counter.expects = "nothing"  # a request may end in latents
        for method in ("encode", "decode"):
            hooks.wrap(tiny, method, lambda inner, *args, **kwargs: _counted(hooks, inner, args, kwargs))


def _counted(hooks: Hooks, inner: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    hooks.counter.count(True)
    return inner(*args, **kwargs)


def _is_tiny(vae: Any) -> bool:
    """A tiny autoencoder draws no latents: it has no distribution's moments and so no quantisation convolutions."""
    return hasattr(vae.config, "num_decoder_blocks") or "Tiny" in type(vae).__name__


def _published(parts: Any) -> tuple[str, str]:
    """The published tiny decoder for these latents, and why none if there is none."""
    channels, config = parts.latent_channels, parts.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    factor = getattr(config, "scaling_factor", None) or 0.0
    # the latents' scale tells families with the same channels apart: SD .18215, SDXL .13025, SD3 1.5305, Flux .3611
    known = {
        (4, 0.182): "madebyollin/taesd",
        (4, 0.130): "madebyollin/taesdxl",
        (16, 1.531): "madebyollin/taesd3",
        (16, 0.361): "madebyollin/taef1",
    }
    name = known.get((channels, round(factor, 3)), "")
    if name:
        return name, ""
    return "", (
        f"no tiny decoder is published for latents of {channels} channels, scale {factor:g} and shift {shift:g}; "
        "give one: TinyDecoder(decoder=...)"
    )


def _matches(parts: Any, tiny: Any) -> Verdict:
    if not _is_tiny(tiny):
        return Verdict(False, f"a {type(tiny).__name__} is not a tiny autoencoder; give an AutoencoderTiny")
    channels, own = parts.latent_channels, latent_channels(tiny)
    if channels != own:
        return Verdict(False, f"the tiny decoder has latents of {own} channels and the pipeline of {channels}")
    scale = 2 ** sum(1 for blocks in tiny.config.num_decoder_blocks[1:])
    if scale != parts.scale:
        return Verdict(
            False, f"the tiny decoder makes {scale} pixels of a latent cell and the pipeline's {parts.scale}"
        )
    return Verdict(True)


def _loaded(name: str) -> Any:
    from diffusers import AutoencoderTiny

    try:
        return AutoencoderTiny.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise Unsupported(
            f"TinyDecoder: {name} could not be loaded ({first}); give a folder or go online once"
        ) from error
