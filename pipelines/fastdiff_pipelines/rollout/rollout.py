"""A causal video model that makes chunk after chunk, for as many sessions as wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.anatomy import default_size
from fastdiff.video.causal import CausalWan
from fastdiff.video.streaming_vae import StreamingVAE
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.session import RolloutSession
from fastdiff_pipelines.rollout.settings import Context, RolloutSettings

_CONTEXT = tuple(field.name for field in fields(Context))
_SETTINGS = tuple(field.name for field in fields(RolloutSettings) if field.name != "prompts")
_LONGEST_PROMPT = 512


class ChunkRollout:
    """Video chunk by chunk, frames as soon as they are there, in memory that does not grow.

    Example:
        ```python
        rollout = ChunkRollout(fastdiff.load("mini-wan"), steps=4)
        for frames in rollout("a red circle moving left on a blue background"):  # uint8 [F, H, W, 3], without end
            show(frames)
        ```

    Args:
        pipe: a diffusers `WanPipeline` whose transformer was trained to be chunk-causal. Its modules are called as
            they are, so what `fastdiff.accelerate` did to them holds; until `close` its transformer carries a
            `CausalWan`, which changes nothing outside a rollout.
        height, width: in pixels; the pipeline's own if None.
        context: what chunks see of the past.
        causal: the transformer's plug, where another rollout of the same model has it already.
        defaults: any of `RolloutSettings` but the prompts, for every session.

    Raises:
        Unsupported: a transformer or an autoencoder that cannot run chunk by chunk.
        TypeError, ValueError: impossible settings or sizes.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        context: Context | None = None,
        causal: CausalWan | None = None,
        **defaults: Any,
    ):
        unknown = [name for name in defaults if name not in _SETTINGS]
        if unknown:
            raise TypeError(f"{', '.join(unknown)} is no setting of a rollout; these are: {', '.join(_SETTINGS)}")
        RolloutSettings(("",), **defaults)
        for name in ("transformer", "vae", "scheduler"):
            if getattr(pipe, name, None) is None:
                raise ValueError(f"a rollout needs a video pipeline with a {name}; {type(pipe).__name__} has none")
        self.pipe, self.context, self.defaults = pipe, context or Context(), defaults
        preset = native_size(pipe) if height is None or width is None else (height, width)
        self.height, self.width = preset[0] if height is None else height, preset[1] if width is None else width
        self._closed = False
        self._owns = causal is None
        self.causal = causal or CausalWan(pipe.transformer)
        try:
            self.cell = self._measure()
        except BaseException:
            self.close()
            raise

    @property
    def vae(self) -> Any:
        """The pipeline's autoencoder."""
        return self.pipe.vae

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.causal.device

    @property
    def state(self) -> torch.dtype:
        """What latents are kept in between steps."""
        return torch.float64 if self.causal.dtype == torch.float64 else torch.float32

    def open(
        self,
        prompt: str | Sequence[str],
        *,
        fps: float | None = None,
        target_ms: float | None = None,
        clock: Callable[[], float] | None = None,
        **options: Any,
    ) -> RolloutSession:
        """Begin a session of its own.

        Args:
            prompt: one text, or several for as many videos side by side, each independent of the others.
            fps, target_ms: what the ledger judges frames by.
            clock: seconds; `time.perf_counter` if None.
            options: any of `RolloutSettings` and of `Context`, in place of the rollout's own.

        Raises:
            TypeError, ValueError: unknown names or impossible values.
        """
        unknown = [name for name in options if name not in (*_SETTINGS, *_CONTEXT)]
        if unknown:
            known = ", ".join((*_SETTINGS, *_CONTEXT))
            raise TypeError(f"{', '.join(unknown)} is no setting of a rollout; these are: {known}")
        context = replace(self.context, **{name: options.pop(name) for name in _CONTEXT if name in options})
        settings = RolloutSettings(
            (prompt,) if isinstance(prompt, str) else tuple(prompt), **{**self.defaults, **options}
        )
        clocked = {} if clock is None else {"clock": clock}
        return RolloutSession(self, settings, context, fps, target_ms, **clocked)

    def __call__(
        self,
        prompt: str | Sequence[str],
        controls: Iterable[Any] | None = None,
        *,
        chunks: int | None = None,
        on_bad: str = "raise",
        **options: Any,
    ) -> Generator[np.ndarray, None, None]:
        """Frames of a new session, chunk by chunk, until the source ends or nobody asks for more.

        Args:
            prompt: as `open`; with a sequence every item has an axis of videos in front.
            controls: an iterable of frames (uint8 ``[H, W, 3]``, float ``[3, H, W]`` in [-1, 1], or
                `fastdiff_pipelines.latest.Captured` with the time they were taken) for video to video, which gives as
                many frames as it takes; of mappings, which change settings from the next chunk on; of None, for a chunk
                from noise. Without controls the video comes from noise and has no end.
            chunks: how many to make at most.
            on_bad: what becomes of a frame of another size, with values that are not finite, or taken before the one
                that came before it: "raise" ends the video with an error, "drop" leaves it out and counts it.
            options: as `open`.

        Yields:
            uint8 ``[F, H, W, 3]``: one frame first and four later ones for a chunk of one latent frame of Wan.

        Raises:
            TypeError, ValueError: impossible options, before the first frame is asked for.
        """
        session = self.open(prompt, **options)
        return _frames(session, session.run(controls, chunks, on_bad), isinstance(prompt, str))

    def encode(self, prompts: Sequence[str]) -> Text:
        """Embeddings of prompts as the pipeline makes them, its padding counted and not computed."""
        length = self._length(prompts)
        # outside of inference mode tensors count their versions, by which a `Text` knows them
        with torch.inference_mode(False), torch.no_grad():
            embeds, _ = self.pipe.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
            )
            return Text(embeds.to(self.causal.dtype), _LONGEST_PROMPT - embeds.shape[1])

    def _length(self, prompts: Sequence[str]) -> int:
        """Tokens to encode: those of the longest prompt with some room, as pipelines tidy prompts before they count."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None:
            return _LONGEST_PROMPT
        longest = max(len(ids) for ids in tokenizer(list(prompts)).input_ids)
        return min(_LONGEST_PROMPT, 16 * (longest // 16 + 2))

    @contextmanager
    def running(self, session: RolloutSession) -> Iterator[None]:
        """Inference mode, inside the session's own request of the pipeline's accelerations if it has any."""
        if self._closed:
            raise RuntimeError("the rollout of this session is closed; open a session of another one")
        with torch.inference_mode(), session.accelerated():
            yield

    def close(self) -> None:
        """Take the plug off the transformer, if this rollout put it there. Open sessions cannot go on."""
        if self._owns:
            self._closed = True
            self.causal.remove()

    def __enter__(self) -> ChunkRollout:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    @torch.inference_mode()
    def _measure(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent frame: what the autoencoder makes of a black one of this size."""
        vae = self.vae
        for name, value in (("height", self.height), ("width", self.width)):
            if not isinstance(value, int) or not 8 <= value <= 8192:
                raise ValueError(f"{name} must be a whole number of 8 to 8192 pixels, got {value!r}")
        codec = StreamingVAE(vae)
        blank = torch.zeros(1, 3, codec.frames[0], self.height, self.width, device=vae.device, dtype=vae.dtype)
        latents = codec.encode(blank)
        assert latents is not None
        decoded = codec.decode(latents[:, :, : codec.latents[0]])
        if decoded is None or tuple(decoded.shape[-2:]) != (self.height, self.width):
            raise ValueError(
                f"the autoencoder does not give {self.height} x {self.width} pixels back; choose a height and width "
                "divisible by its scale"
            )
        channels, rows, columns = latents.shape[1], *latents.shape[-2:]
        patch = self.causal.shape.patch
        if rows % patch[1] or columns % patch[2]:
            raise ValueError(f"{rows} x {columns} latent cells do not divide into patches of {patch[1]} x {patch[2]}")
        return channels, rows, columns


def native_size(pipe: Any) -> tuple[int, int]:
    """Height and width that a video pipeline makes where none are given."""
    if Path(str(getattr(pipe, "name_or_path", ""))).name == "mini-wan":
        from fastdiff.miniature import wan

        return wan.SIZE, wan.SIZE
    asked = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    sizes = [getattr(asked.get(name), "default", None) for name in ("height", "width")]
    if all(isinstance(size, int) for size in sizes):
        return sizes[0], sizes[1]  # type: ignore[return-value]
    return default_size(pipe)


def _frames(session: RolloutSession, chunks: Iterator[Any], alone: bool) -> Generator[np.ndarray, None, None]:
    with session:
        for chunk in chunks:
            yield chunk.frames[0] if alone else chunk.frames
