"""Makes a diffusers `WanTransformer3DModel` chunk-causal: frames see earlier frames and their own chunk, never later.

Two ways to run it. With a block-causal mask over a whole clip, for training and for computing a context again; and
chunk by chunk on a `KeyValueCache`, for streams without end. Both give the same output. The model's own forward runs,
block by block, so whatever else was done to its layers holds; only its attention processors and the way it is told time
and text are stood in for, on this object alone and until `remove`. Outside a pass the model does what it always did,
bit for bit.

The setting is that of CausVid (https://arxiv.org/abs/2412.07772), Self-Forcing (https://arxiv.org/abs/2506.08009) and
diffusion forcing (https://arxiv.org/abs/2407.01392); a model trained without such a mask gives no good video here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from fastdiff.acceleration import Unsupported, check_number
from fastdiff.anatomy_wan import wan_output, wan_problem, wan_projected, wan_query, wan_shape
from fastdiff.hooks import Hooks, Requests
from fastdiff.video import rotary
from fastdiff.video.cache import KeyValueCache, Layout
from fastdiff.video.text import Text


@dataclass
class _Pass:
    """One forward under way; the second half is known once the model has seen its input."""

    cache: KeyValueCache | None
    rows: Sequence[int] | None
    chunk: int | None
    text: Text | None
    window: int | None = None
    kept: int = 0
    offset: int = 0
    frames: int = 0
    tokens: int = 0
    layout: Layout | None = None
    mask: Tensor | None = None
    space: Tensor | None = None
    time: Tensor | None = None
    turns: Tensor | None = None
    aged: Tensor | None = None


class _Now(threading.local):
    """The pass that this thread is in, if any."""

    value: _Pass | None = None


class CausalWan:
    """A chunk-causal way to run one transformer; shared by any number of sessions, each with a cache of its own.

    Example:
        ```python
        causal = CausalWan(pipe.transformer)
        with causal.block_causal(chunk=1):  # training: any number of frames, one timestep a frame
            velocity = pipe.transformer(x, timestep, prompt_embeds, return_dict=False)[0]
        cache = causal.cache(rows=1, frames=4, height=60, width=104)
        velocity = causal(x[:, :, :1], timestep[:, :1], Text(prompt_embeds), cache=cache, commit=True)
        ```

    Raises:
        Unsupported: another model, an image-to-video one, or one that already has a causal plug.
    """

    def __init__(self, transformer: Any):
        problem = wan_problem(transformer)
        if problem:
            raise Unsupported(f"this cannot run chunk by chunk: {problem}; load a text-to-video Wan model")
        if any(isinstance(block.attn1.processor, _SelfAttention) for block in transformer.blocks):
            raise Unsupported("this transformer is chunk-causal already; share that CausalWan, or remove() it first")
        self.transformer = transformer
        self.shape = wan_shape(transformer)
        self._removed = False
        self._now = _Now()
        self._hooks = Hooks("CausalWan", Requests())
        for layer, block in enumerate(transformer.blocks):
            processors = (_SelfAttention(layer, self._now, block.attn1), _CrossAttention(layer, self._now, block.attn2))
            for attention, processor in zip((block.attn1, block.attn2), processors, strict=True):
                self._hooks.set(attention, "processor", processor)
        self._hooks.wrap(transformer.rope, "forward", self._placed)
        self._hooks.wrap(transformer.condition_embedder, "forward", self._conditioned)
        self._embed = self._hooks.wrap(transformer.condition_embedder.text_embedder, "forward", self._embedded)

    def remove(self) -> None:
        """Give the transformer back as it was. A second call does nothing."""
        self._hooks.undo()
        self._removed = True

    def __enter__(self) -> CausalWan:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.remove()

    @property
    def dtype(self) -> torch.dtype:
        """What latents and embeddings are given in."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.transformer.patch_embedding.weight.device

    def cache(self, rows: int, frames: int, height: int, width: int, **options: Any) -> KeyValueCache:
        """A cache for latents of this many rows and columns of cells; ``options`` as `KeyValueCache` takes them."""
        shape = self.shape
        given = {"dtype": self.dtype, "device": self.device, **options}
        tokens = shape.tokens(height, width)
        return KeyValueCache(shape.layers, rows, frames, tokens, shape.heads, shape.head, **given)

    @contextmanager
    def block_causal(self, chunk: int = 1, offset: int = 0) -> Iterator[None]:
        """Inside the block (of this thread) the transformer's own forward is block-causal.

        It takes latents ``[B, C, F, h, w]`` and, beside diffusers' ``[B]`` and ``[B, F S]``, one timestep a frame
        ``[B, F]``, in 0..1000 (any float dtype). A frame sees the frames of its own chunk and of all chunks before.
        Gradients flow as always; with gradient checkpointing call `backward` inside the block.

        Args:
            chunk: latent frames that see each other; the last chunk may be shorter.
            offset: position in time of the first frame.
        """
        check_number("CausalWan", "chunk", chunk, 1, whole=True)
        self._check_on()
        with self._during(_Pass(None, None, chunk, None, offset=offset)):
            yield

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Text,
        *,
        cache: KeyValueCache | None = None,
        rows: Sequence[int] | None = None,
        chunk: int | None = None,
        window: int | None = None,
        commit: bool | int = False,
    ) -> Tensor:
        """The velocity ``[B, C, F, h, w]`` of noisy latents, in the dtype of ``x``.

        Args:
            x: latents ``[B, C, F, h, w]``: the next frames of every row.
            timestep: 0..1000, one a row ``[B]`` or one a frame ``[B, F]``.
            text: prompts of the rows, or one for all.
            cache: what earlier frames left; None for a model without past.
            rows: of the cache, one for each of the batch; all of them if None.
            chunk: frames that see each other; None for all that are given.
            window: frames before its own chunk that a frame sees; None for all that there are.
            commit: write these frames, or so many of the first, into the cache once the forward has succeeded.

        Raises:
            ValueError: shapes that do not fit each other or the cache, or an impossible number of frames.
            RuntimeError: after `remove`.
        """
        self._check_on()
        self._check(x, timestep, text, cache, rows, commit)
        self._check_frames(x.shape[2], chunk, window, commit)
        text.refresh(self._embed.inner)
        kept = x.shape[2] if commit is True else int(commit)
        now = _Pass(cache, rows, chunk, text, window, kept)
        placeholder = x.new_zeros(len(x), 1, 1, dtype=self.dtype)
        try:
            with self._during(now):
                out = self.transformer(x.to(self.dtype), timestep, placeholder, return_dict=False)[0]
            if kept and cache is not None and now.layout is not None:
                told = timestep if timestep.dim() == 2 else timestep[:, None].expand(-1, now.frames)
                cache.commit(now.layout, x[:, :, :kept], told[:, :kept])
        except BaseException:
            if cache is not None:
                cache.discard()
            raise
        return out.to(x.dtype)

    def recache(self, cache: KeyValueCache, text: Text, rows: Sequence[int] | None = None, chunk: int = 1) -> bool:
        """Compute the kept frames of ``rows`` again from what the model was given then, under ``text``.

        After a change of prompt the context forgets the old one (LongLive, https://arxiv.org/abs/2509.22622); done now
        and then it stops what the cache gathers in errors. False when there was nothing to compute.
        """
        remembered = cache.remembered(rows)
        if remembered is None:
            return False
        inputs, told = (part.clone() for part in remembered)
        room = cache.frames - cache.sinks
        with cache.again(cache.moments(rows), rows):
            for start in range(0, inputs.shape[2], room):
                part = slice(start, start + room)
                self(inputs[:, :, part], told[:, part], text, cache=cache, rows=rows, chunk=chunk, commit=True)
        return True

    @contextmanager
    def _during(self, now: _Pass) -> Iterator[None]:
        before, self._now.value = self._now.value, now
        try:
            yield
        finally:
            self._now.value = before

    def _check_on(self) -> None:
        if self._removed:
            raise RuntimeError("this CausalWan was removed from its transformer; make another one")

    @staticmethod
    def _check_frames(frames: int, chunk: int | None, window: int | None, commit: bool | int) -> None:
        if chunk is not None:
            check_number("CausalWan", "chunk", chunk, 1, whole=True)
        if window is not None:
            check_number("CausalWan", "window", window, 0, whole=True)
        if not isinstance(commit, bool):
            check_number("CausalWan", "commit", commit, 0, frames, whole=True)

    def _check(self, x: Tensor, timestep: Tensor, text: Text, cache: Any, rows: Any, commit: int) -> None:
        if x.dim() != 5 or x.shape[1] != self.shape.channels:
            raise ValueError(f"latents are [B, {self.shape.channels}, F, h, w], got {list(x.shape)}")
        batch, frames = x.shape[0], x.shape[2]
        if tuple(timestep.shape) not in ((batch,), (batch, frames)):
            raise ValueError(f"timesteps are [{batch}] or [{batch}, {frames}], got {list(timestep.shape)}")
        if len(text) not in (1, batch):
            raise ValueError(f"{len(text)} prompts for {batch} rows; give one, or one a row")
        if cache is None:
            if commit or rows is not None:
                raise ValueError("rows and commit belong to a cache, and none is given")
            return
        if batch != (cache.rows if rows is None else len(rows)):
            raise ValueError(f"{batch} rows of latents for {cache.rows if rows is None else len(rows)} of the cache")
        tokens = self.shape.tokens(*x.shape[3:])
        if tokens != cache.tokens:
            raise ValueError(f"latents of {tokens} tokens a frame, in a cache made for {cache.tokens}; make another")

    def _placed(self, inner: Any, x: Tensor) -> Any:
        """Stands around the model's rotary table, which is the first to see the input's shape."""
        now = self._now.value
        if now is None:
            return inner(x)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        height, width = x.shape[3:]
        now.frames, now.tokens = x.shape[2], self.shape.tokens(height, width)
        now.space = rotary.in_space(self.shape, height, width, x.device, dtype)  # [S, D / 2]
        if now.cache is None:
            new = torch.arange(now.offset, now.offset + now.frames, device=x.device)[None]
        else:
            now.layout = now.cache.layout(now.frames, now.rows, now.kept)
            new = now.layout.new
            if not now.layout.empty:
                now.aged = rotary.in_time(self.shape, now.layout.held, dtype)
        now.time = rotary.in_time(self.shape, new, dtype)  # [B, F, 1, D / 2]
        now.turns = (now.time * now.space).flatten(1, 2)  # [B, F S, D / 2]
        now.mask = self._mask(now, x.device)
        return None

    @staticmethod
    def _mask(now: _Pass, device: torch.device) -> Tensor | None:
        """What may be seen, boolean ``[B or 1, 1, Q or 1, K]``; None when everything may."""
        place = torch.arange(now.frames, device=device)
        chunk = place // (now.chunk or now.frames)
        begins = chunk * (now.chunk or now.frames)
        own = past = None  # [1, c, c] and [B, c or 1, F], by frame
        if now.window is not None or (now.chunk is not None and now.chunk < now.frames):
            own = (chunk[:, None] >= chunk)[None]
            if now.window is not None:
                own = own & (place >= begins[:, None] - now.window)[None]
        layout = now.layout
        if layout is not None and not layout.empty:
            if now.window is not None:
                near = layout.held[:, None] >= (layout.new[:, :1] + begins - now.window)[..., None]
                past = near & (layout.held >= 0)[:, None]
            elif layout.seen is not None:
                past = layout.seen[:, None]
            elif own is not None:
                past = torch.ones_like(layout.held, dtype=torch.bool)[:, None]
        if own is None and past is None:
            return None
        if past is None:
            sees = own
        else:
            own = past.new_ones(1, 1, now.frames) if own is None else own
            asked = max(own.shape[1], past.shape[1])
            parts = past.expand(-1, asked, -1), own.expand(len(past), asked, -1)
            sees = torch.cat(parts, dim=-1)
        assert sees is not None
        if sees.shape[1] > 1:
            sees = sees.repeat_interleave(now.tokens, dim=1)
        return sees.repeat_interleave(now.tokens, dim=2)[:, None]

    def _conditioned(self, inner: Any, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands around the embedding of time: one timestep a frame is spread over the frame's tokens."""
        time, modulation, text, image = inner(timestep, *args, **kwargs)
        now = self._now.value
        if now is not None and time.dim() == 3 and time.shape[1] == now.frames:
            time, modulation = (part.repeat_interleave(now.tokens, dim=1) for part in (time, modulation))
        return time, modulation, text, image

    def _embedded(self, inner: Any, text: Tensor) -> Tensor:
        """Stands around the text projection, which a pass with a `Text` does not need."""
        now = self._now.value
        return inner(text) if now is None or now.text is None else text


class _Processor:
    """An attention processor that steps aside outside a pass; `_attention_backend` is diffusers' way to choose one."""

    def __init__(self, layer: int, now: _Now, attention: Any):
        self.layer, self.now, self.before = layer, now, attention.processor
        self._attention_backend = getattr(self.before, "_attention_backend", None)
        self._parallel_config = getattr(self.before, "_parallel_config", None)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        now = self.now.value
        if now is None or not self._replaces(now):
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return self._in_pass(now, attn, hidden_states)

    def _replaces(self, now: _Pass) -> bool:
        return True

    def _in_pass(self, now: _Pass, attn: Any, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)


class _SelfAttention(_Processor):
    def _in_pass(self, now: _Pass, attn: Any, hidden_states: Tensor) -> Tensor:
        assert now.turns is not None and now.space is not None and now.time is not None
        query, key, value = wan_projected(attn, hidden_states)  # [B, F S, N, D]
        query = rotary.turn(query, now.turns)
        if now.kept and now.cache is not None:
            place = (now.frames, now.tokens)
            first, kept = (part.unflatten(1, place)[:, : now.kept] for part in (key, value))  # [B, k, S, N, D]
            now.cache.stage(self.layer, rotary.turn(first, now.space), kept)
        key = rotary.turn(key, now.turns)
        if now.aged is not None and now.cache is not None and now.layout is not None:
            past, past_values = now.cache.read(self.layer, now.layout)
            key = torch.cat([rotary.turn(past, now.aged).flatten(1, 2), key], dim=1)
            value = torch.cat([past_values.flatten(1, 2), value], dim=1)
        return wan_output(attn, self._attend(query, key, value, now.mask))


class _CrossAttention(_Processor):
    def _replaces(self, now: _Pass) -> bool:
        return now.text is not None

    def _in_pass(self, now: _Pass, attn: Any, hidden_states: Tensor) -> Tensor:
        assert now.text is not None
        key, value, bias = now.text.keys(self.layer, attn)
        batch = len(hidden_states)
        key, value = (part.expand(batch, -1, -1, -1) for part in (key, value))
        return wan_output(attn, self._attend(wan_query(attn, hidden_states), key, value, bias))
