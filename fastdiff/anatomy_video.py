"""What is particular to diffusers' video models: caches of causal autoencoders, and where denoisers hold frames.

As `anatomy` for whole pipelines: the one place that knows these private names. Two kinds of autoencoder carry a cache
from chunk to chunk. Wan's (and Qwen-Image's) fill a list with one entry a causal convolution; CogVideoX's and Mochi's
take a dictionary and give back the next.
"""

import copy
import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import forward_names

_PROMPT_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


class FeatureList:
    """Chunks of an autoencoder like Wan's: one frame, then four at a time; a latent at a time back."""

    frames, latents = (1, 4), (1, 1)
    encodes = True

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.patch = getattr(vae.config, "patch_size", None)
        self.told_first = "first_chunk" in forward_names(vae.decoder)

    def of_clip(self, count: int) -> list[int]:
        """Latent frames of each chunk in which a clip of ``count`` of them is decoded."""
        return [1] * count

    def empty(self, part: str) -> list[Any]:
        """The cache of the "encoder" or "decoder" before its first chunk."""
        modules = getattr(self.vae, part).modules()
        return [None] * sum(type(module).__name__.endswith("CausalConv3d") for module in modules)

    def encode(self, frames: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """Moments of one chunk, and the next cache; the one given stays as it was."""
        cache = list(cache)
        if self.patch is not None:
            frames = _patched(frames, self.patch)
        moments = self.vae.encoder(frames, feat_cache=cache, feat_idx=[0])
        return self.vae.quant_conv(moments), cache

    def decode(self, latents: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """Frames of one chunk, not clamped, and the next cache; the one given stays as it was."""
        first, cache = all(entry is None for entry in cache), list(cache)
        told = {"first_chunk": first} if self.told_first else {}
        frames = self.vae.decoder(self.vae.post_quant_conv(latents), feat_cache=cache, feat_idx=[0], **told)
        return (frames if self.patch is None else _unpatched(frames, self.patch)), cache

    def finish(self, frames: Tensor) -> Tensor:
        """What the autoencoder does to decoded frames last."""
        return frames.clamp(-1.0, 1.0)


class ConvolutionCache:
    """Chunks of an autoencoder like CogVideoX's: the first one frame (one latent) longer than the others."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.encodes = hasattr(vae, "num_sample_frames_batch_size") and "Mochi" not in type(vae).__name__
        step = vae.num_latent_frames_batch_size
        self.latents = (step + 1, step) if self.encodes else (step, step)
        sample = getattr(vae, "num_sample_frames_batch_size", step)
        self.frames = (sample + 1, sample)
        self.cut = 0 if self.encodes else vae.temporal_compression_ratio - 1

    def of_clip(self, count: int) -> list[int]:
        """Latent frames of each chunk in which a clip of ``count`` of them is decoded: what is over comes first.

        Mochi's comes last.
        """
        later = self.latents[1]
        over = count % later
        if not self.encodes:
            return [later] * (count // later) + [over] * bool(over)
        first = min(count, later + over)
        return [first] + [later] * ((count - first) // later)

    def empty(self, part: str) -> None:
        """The cache before the first chunk."""

    def encode(self, frames: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Moments of one chunk, and the next cache."""
        moments, cache = self.vae.encoder(frames, conv_cache=cache)
        return (moments if self.vae.quant_conv is None else self.vae.quant_conv(moments)), cache

    def decode(self, latents: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Frames of one chunk, and the next cache."""
        first, after = cache is None, getattr(self.vae, "post_quant_conv", None)
        frames, cache = self.vae.decoder(latents if after is None else after(latents), conv_cache=cache)
        return (frames[:, :, self.cut :] if first and self.vae_drops() else frames), cache

    def vae_drops(self) -> bool:
        """Whether the autoencoder leaves out the first frames it decodes."""
        return bool(self.cut) and self.vae.drop_last_temporal_frames

    def finish(self, frames: Tensor) -> Tensor:
        """What the autoencoder does to decoded frames last: nothing."""
        return frames


def causal_chunks(vae: Any) -> FeatureList | ConvolutionCache:
    """How to call a video autoencoder chunk by chunk.

    Raises:
        Unsupported: it keeps no cache between chunks, or keeps it inside its modules where sessions would mix.
    """
    encoder, decoder = (getattr(vae, part, None) for part in ("encoder", "decoder"))
    if "feat_cache" in forward_names(encoder) and hasattr(vae, "clear_cache"):
        return FeatureList(vae)
    if "conv_cache" in forward_names(decoder) and hasattr(vae, "num_latent_frames_batch_size"):
        return ConvolutionCache(vae)
    raise Unsupported(
        f"{type(vae).__name__} has no cache that a session could keep from chunk to chunk; streaming works with "
        "AutoencoderKLWan, AutoencoderKLQwenImage, AutoencoderKLCogVideoX and AutoencoderKLMochi (decoding)"
    )


def latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of an autoencoder's latents, float32 ``[1, C or 1, 1, 1, 1]``: a denoiser sees unit ones."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    else:
        mean = torch.tensor([getattr(config, "shift_factor", None) or 0.0])
        std = torch.tensor([1 / (getattr(config, "scaling_factor", None) or 1.0)])
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def _patched(frames: Tensor, patch: int) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    return patchify(frames, patch_size=patch)


def _unpatched(frames: Tensor, patch: int) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    return unpatchify(frames, patch_size=patch)


@dataclass(frozen=True)
class FrameLayout:
    """Where a denoiser's call holds the frames of a clip.

    Attributes:
        name: the argument with the latents.
        axis: of the latents: frames, or tokens in the order of their frames.
        count: latent frames.
        each: entries of the axis to a frame: 1, or the tokens of a frame.
    """

    name: str
    axis: int
    count: int
    each: int


def frame_axis(denoiser: Any) -> int | None:
    """The axis of a denoiser's latents that its forward names the frames; None for a denoiser of pictures.

    Latents that travel as tokens, with the number of frames beside them, give 1.
    """
    names = forward_names(denoiser)
    if "num_frames" in names:
        return 1
    for axes in re.findall(r"([\w, ]+) = (?:hidden_states|sample)\.shape", _forward_source(type(denoiser))):
        parts = [part.strip() for part in axes.split(",")]
        if len(parts) > 1 and "num_frames" in parts:
            return parts.index("num_frames")
    found = re.search(r"num_frames = (?:hidden_states|sample)\.shape\[(\d)\]", _forward_source(type(denoiser)))
    return int(found[1]) if found else None


def frame_layout(denoiser: Any, given: dict[str, Any]) -> FrameLayout:
    """Where the frames are in one call with these arguments by name.

    Raises:
        Unsupported: a denoiser that takes pictures, or a clip with a history beside it.
    """
    axis = frame_axis(denoiser)
    if axis is None:
        raise Unsupported(f"{type(denoiser).__name__} takes pictures and no frames")
    name = forward_names(denoiser)[0]
    latents = given[name]
    if "num_frames" in forward_names(denoiser):
        count = int(given["num_frames"])
        return FrameLayout(name, axis, count, latents.shape[axis] // count)
    return FrameLayout(name, axis, latents.shape[axis], 1)


@cache
def _forward_source(kind: type) -> str:
    try:
        return inspect.getsource(inspect.unwrap(kind.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return ""


def helios_loop(pipe: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Everything of a Helios pipeline's call up to its loop over chunks: ``(components, loop, state of the loop)``.

    The pipeline's scheduler is copied; with `prompt_embeds` among the inputs the text encoder is not asked.

    Raises:
        TypeError: a name that the pipeline's loop does not know.
        Unsupported: another pipeline.
    """
    from diffusers import HeliosModularPipeline, HeliosPipeline

    if not isinstance(pipe, (HeliosPipeline, HeliosModularPipeline)):
        raise Unsupported(f"{type(pipe).__name__} is no Helios pipeline")
    from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, PipelineState
    from diffusers.modular_pipelines.helios import HeliosAutoBlocks

    components: Any = HeliosAutoBlocks().init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    components.update_components(**parts | {"scheduler": copy.deepcopy(pipe.scheduler)})
    scale = inputs.pop("guidance_scale", None)
    if scale is not None:
        components.update_components(guider=components.guider.new(guidance_scale=scale))
    blocks = components.blocks
    known = {expected.name for expected in blocks.inputs if expected.name} | set(_PROMPT_EMBEDS)
    unknown = sorted(inputs.keys() - known)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)} is no input of Helios' chunks; these are: {', '.join(sorted(known))}, guidance_scale"
        )
    state = PipelineState()
    for expected in blocks.inputs:
        if expected.name is not None:
            state.set(expected.name, inputs.get(expected.name, expected.default), expected.kwargs_type)
    for name in _PROMPT_EMBEDS:
        state.set(name, inputs.get(name), "denoiser_input_fields")
    for name, block in blocks.get_execution_blocks(**inputs).sub_blocks.items():
        if isinstance(block, LoopSequentialPipelineBlocks):
            loop_state: Any = block.get_block_state(state)
            loop_state.latent_chunks = []
            if not hasattr(loop_state, "image_latents"):
                loop_state.image_latents = None
            return components, block, loop_state
        if "text_encoder" not in name or inputs.get("prompt_embeds") is None:
            _, state = block(components, state)
    raise Unsupported("this version of diffusers builds Helios without a loop over chunks")
