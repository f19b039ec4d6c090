"""How `mini-wan` learns: its autoencoder, then the transformer with its text encoder.

The transformer learns single frames first (sixteen tokens each, where colours and shapes are cheap to learn), then
windows of five latent frames. Most windows are block-causal with a noise level of their own for every frame (diffusion
forcing, https://arxiv.org/abs/2407.01392), and in some of them the words have just changed: what came before is context
and shows another scene that moves alike. The others have full attention: with one level for all, as a pipeline calls
it, or with levels that rise from share to share, as a moving buffer holds them (https://arxiv.org/abs/2507.03745).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastdiff.anatomy_video import FeatureList

from . import moving, tokenizer, wan, wan_forward, wan_rollout, wan_weights, world
from .replica import Replica

DEFAULTS = {
    "wan-autoencoder": {"batch": 4, "learning_rate": 1.5e-3},
    "mini-wan": {"batch": 64, "learning_rate": 2e-3},
}
PADDED = 512  # tokens to which `WanPipeline` pads every prompt
_WINDOW = 5  # latent frames of a training window: a clip of 17 frames
_LONG = 33  # frames of the clips that windows are cut from
_POOL = 1536  # clips drawn and encoded at a time
_PASSES = 6  # times a pool is used, each with new captions, windows, levels and noise
_STILLS = 0.35  # of the run: single frames only; after it every fourth step is one
_STILL_BATCH = 3  # single frames for each clip of a batch
_WHOLE = 0.2  # of the steps with clips: full attention and one noise level, as `WanPipeline` calls it
_BUFFERED = 0.15  # of the steps with clips: full attention and the levels of a moving buffer
_GROWING = 0.3  # of those: a buffer that still fills
SHARES = 4  # chunks of one frame in a moving buffer, each in its own share of the noise levels
_PADDING = 0.6  # of the run before prompts are padded as the pipeline pads them: before, few tokens are seen sooner
_CLEAN = 0.4  # of the frames of a causal window: context, hardly noisy
_RISING = 0.35  # of the causal windows: levels that rise from frame to frame
_SWITCHED = 0.25  # of the causal windows: the words change inside them
_CONTEXT = 0.1  # the noisiest level of a context frame


def pixels(clips: list[np.ndarray]) -> Tensor:
    """Clips uint8 [F, H, W, 3] as float32 [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1


def encode(vae: Any, frames: Tensor) -> Tensor:
    """Moments ``[B, 2 C, 1 + k, h, w]`` of clips ``[B, 3, 1 + 4 k, H, W]``, with gradients."""
    chunks = FeatureList(vae)
    cache, made = chunks.empty("encoder"), []
    for part in [frames[:, :, :1], *frames[:, :, 1:].split(wan.PER_LATENT, dim=2)]:
        if part.shape[2]:
            moments, cache = chunks.encode(part, cache)
            made.append(moments)
    return torch.cat(made, dim=2)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Clips ``[B, 3, 1 + 4 k, H, W]`` of latents ``[B, C, 1 + k, h, w]``, with gradients and not clamped."""
    chunks = FeatureList(vae)
    cache, made = chunks.empty("decoder"), []
    for part in latents.split(1, dim=2):
        frames, cache = chunks.decode(part, cache)
        made.append(frames)
    return torch.cat(made, dim=2)


def autoencoder(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """`picture_error`, latents near unit scale and robust to noise of 0.05.

    Many small steps: clips are of 5 frames mostly, now and then of 9 or 17, so that the caches between chunks are
    learned too.
    """
    module = wan.autoencoder().to(run.device)

    def loss(step: int, rank: int, batch: int) -> Tensor:
        rng = np.random.default_rng([run.seed, step, rank])
        frames = {6: 9, 7: 17}.get(step % 8, 5)
        count = max(1, batch * 5 // frames)
        first = [int(rng.integers(1000)) for _ in range(count)]
        clip = pixels([moving.render(moving.scene(rng), frames, wan.SIZE, start) for start in first]).to(run.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.autocast(torch.device(run.device).type, torch.bfloat16):
            latent = encode(module, clip)[:, : wan.CHANNELS]
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            decoded = decode(module, latent + 0.05 * noise)
        latent = latent.float()
        return picture_error(decoded.float() - clip) + 0.01 * (latent.mean() ** 2 + (latent.std() - 1) ** 2)

    return module, loss


def picture_error(error: Tensor) -> Tensor:
    """L1 + L2 + gradient L1 of what pictures ``[..., H, W]`` are off by."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


class WanReplica(Replica):
    """The bfloat16 replica of a Wan transformer, run by `wan_forward`."""

    def __init__(self, master: Any) -> None:
        super().__init__(master, next(iter(master.attn_processors.values())))

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
        """As `wan_forward.forward`, float32 ``[B, C, F, h, w]``, with the master's present weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.masters)  # type: ignore[call-overload]
        text = conditions.pop("text").to(torch.bfloat16)
        return wan_forward.forward(self.net, x.to(torch.bfloat16), timestep, text, **conditions).float()


class TextToVideo(nn.Module):
    """Text encoder and transformer, trained together; with ``replica`` the transformer runs as its bfloat16 replica."""

    def __init__(self, replica: bool = False) -> None:
        super().__init__()
        self.text_encoder = wan.text_encoder()
        self.transformer = wan.transformer()
        self.tokenizer = tokenizer.build()
        self.replica = WanReplica(self.transformer) if replica else None

    def embed(self, captions: list[str], device: Any) -> Tensor:
        """Embeddings ``[B, L, E]``, zero after each caption's end as the pipeline makes them."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        mask = tokens.attention_mask
        hidden = self.text_encoder(tokens.input_ids, mask).last_hidden_state
        return hidden * mask[..., None]

    def forward(self, noisy: Tensor, sigma: Tensor, captions: list[str], padding: int, causal: bool) -> Tensor:
        """Velocity of ``[B, C, F, h, w]`` at one sigma a frame ``[B, F]``, float32."""
        text = self.embed(captions, noisy.device)
        frames, cells = noisy.shape[2], noisy.shape[3] * noisy.shape[4]
        conditions = {
            "text": text,
            "bias": wan_forward.text_bias(text.shape[1], padding).to(noisy.device),
            "mask": wan_forward.block_causal(frames, cells).to(noisy.device) if causal and frames > 1 else None,
        }
        if self.replica is not None:
            return self.replica(noisy, 1000 * sigma, **conditions)
        with torch.autocast(noisy.device.type, torch.bfloat16):
            return wan_forward.forward(self.transformer, noisy, 1000 * sigma, **conditions).float()


class Latents:
    """Encoded scenes, the same for the same number. Of clips every one has a twin: another scene that moves alike."""

    def __init__(self, run: Any, rank: int) -> None:
        self.run, self.rank = run, rank
        self.vae: Any = wan_weights.load_autoencoder().to(run.device)
        config = self.vae.config
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        self.held: dict[int, tuple[int, list[world.Scene], Tensor]] = {}

    def pool(self, number: int, frames: int, size: int) -> tuple[list[world.Scene], Tensor]:
        """Scenes and their normalised latents float32 ``[size, C, 1 + (frames - 1) / 4, h, w]``."""
        if frames not in self.held or self.held[frames][0] != number:
            rng = np.random.default_rng([self.run.seed, 4, number, self.rank, frames])
            scenes = [moving.scene(rng) for _ in range(size // 2 if frames > 1 else size)]
            scenes += [moving.otherwise(scene, rng) for scene in scenes[: size - len(scenes)]]
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.run.device == "cpu"):
                parts = [self._encode(scenes[i : i + 64], frames) for i in range(0, size, 64)]
            self.held[frames] = (number, scenes, torch.cat(parts).clone())
        return self.held[frames][1:]

    def _encode(self, scenes: list[world.Scene], frames: int) -> Tensor:
        clip = pixels([moving.render(scene, frames, wan.SIZE) for scene in scenes]).to(self.run.device)
        return (encode(self.vae, clip)[:, : wan.CHANNELS].float().cpu() - self.mean) / self.std

    def take(
        self, step: int, batch: int, frames: int, size: int, passes: int
    ) -> tuple[Tensor, Tensor, list[world.Scene], Any]:
        """A batch of latents, those of clips' twins, the scenes of the first, and the step's own `numpy` generator."""
        per_pass = size // batch
        number, place = divmod(step, per_pass * passes)
        scenes, latents = self.pool(number, frames, size)
        passage, place = divmod(place, per_pass)
        order = np.random.default_rng([self.run.seed, 5, number, passage, self.rank]).permutation(size)
        chosen = order[place * batch : (place + 1) * batch]
        rng = np.random.default_rng([self.run.seed, 6, step, self.rank])
        made, twins = (latents[torch.from_numpy(places)] for places in (chosen, (chosen + size // 2) % size))
        return made, twins, [scenes[i] for i in chosen], rng


def captions(scenes: list[world.Scene], rng: np.random.Generator) -> list[str]:
    """What the scenes are called; one in ten is nameless, some words are left out."""
    return ["" if rng.random() < 0.1 else world.caption(scene, rng, drop=0.3) for scene in scenes]


def levels(count: int, rng: np.random.Generator) -> np.ndarray:
    """Sigmas float64 [count] in 0..1, stratified, half of them in the noisiest third, in random order."""
    noisy = count // 2

    def spread(number: int, low: float) -> np.ndarray:
        return low + (1 - low) * (np.arange(number) + rng.random(number)) / max(1, number)

    return rng.permutation(np.concatenate([spread(noisy, 2 / 3), spread(count - noisy, 0.0)]))


def causal_levels(starts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas of a batch of causal windows, float64 [B, F], and which frames are learned, float64 [B, F] of 1 and 0.

    Half of the windows have a level of its own for every frame, and some frames are context, hardly noisy and not
    learned. Some rise from frame to frame, as frames of a moving buffer do, and some are level, as what a stream batch
    sees. The first frame of a window that does not begin a clip always is context: nothing tells where it stands.
    """
    shape = (len(starts), _WINDOW)
    kind = rng.permutation(np.arange(len(starts)) / len(starts))[:, None]
    free, rising = kind < 0.5, (kind >= 0.5) & (kind < 0.5 + _RISING)
    sigma = levels(shape[0] * shape[1], rng).reshape(shape)
    sigma = np.where(rising, np.sort(sigma, axis=1), np.where(free, sigma, sigma[:, :1]))
    context = free & (rng.random(shape) < _CLEAN)
    context[starts > 0, 0] = True
    context[context.all(1), -1] = False
    return np.where(context, _CONTEXT * rng.random(shape), sigma), 1.0 - context


def buffer_levels(batch: int, under_way: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas float64 [B, F] of windows as a moving buffer holds them, and which frames are learned, 1 and 0.

    Every frame has a level of its own inside its share, the last frame in the noisiest. A full buffer is led by a clean
    frame that is not learned; one that still fills holds the first frames of a clip and nothing else.
    """
    first = SHARES - under_way + np.arange(under_way)
    sigma = wan_rollout.shifted((first + rng.random((batch, under_way))) / SHARES)
    weight = np.ones_like(sigma)
    if under_way == SHARES:
        led = _CONTEXT * rng.random((batch, 1))
        sigma, weight = np.hstack([led, sigma]), np.hstack([np.zeros_like(led), weight])
    return sigma, weight


def windows(latents: Tensor, starts: np.ndarray, frames: int = _WINDOW) -> Tensor:
    """As many frames from ``start`` of each clip: ``[B, C, 9, h, w]`` to ``[B, C, frames, h, w]``."""
    return torch.stack([clip[:, start : start + frames] for clip, start in zip(latents, starts.tolist(), strict=True)])


def switched(
    latents: Tensor, twins: Tensor, sigma: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Windows, their sigmas and what of them is learned, after the words have changed inside some of the windows.

    The frames before the change are the twin's, hardly noisy, and not learned.
    """
    count, frames = sigma.shape
    change = np.where(rng.random(count) < _SWITCHED, rng.integers(1, frames, count), 0)
    before = np.arange(frames) < change[:, None]
    sigma, weight = np.where(before, _CONTEXT * rng.random(sigma.shape), sigma), np.where(before, 0.0, weight)
    weight[~weight.any(1), -1] = 1.0
    return torch.where(torch.from_numpy(before)[:, None, :, None, None], twins, latents), sigma, weight


def _window(latents: Tensor, twins: Tensor, rng: np.random.Generator) -> tuple[Tensor, np.ndarray, np.ndarray, bool]:
    """A step's windows of clips, their sigmas, which frames are learned, and whether attention is block-causal."""
    batch, kind = len(latents), rng.random()
    starts = np.where(rng.random(batch) < 0.5, 0, rng.integers(1, latents.shape[2] - _WINDOW + 1, batch))
    if kind < _WHOLE:
        sigma = np.repeat(levels(batch, rng)[:, None], _WINDOW, axis=1)
        return windows(latents, np.zeros_like(starts)), sigma, np.ones_like(sigma), False
    if kind < _WHOLE + _BUFFERED:
        under_way = int(rng.integers(1, SHARES)) if rng.random() < _GROWING else SHARES
        sigma, weight = buffer_levels(batch, under_way, rng)
        starts = starts if under_way == SHARES else np.zeros_like(starts)
        return windows(latents, starts, sigma.shape[1]), sigma, weight, False
    told = causal_levels(starts, rng)
    return *switched(windows(latents, starts), windows(twins, starts), *told, rng), True


def mini_wan(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """Mean squared error of the velocity, over the frames that are not context."""
    module = TextToVideo(replica=run.device == "cpu").to(run.device)
    stills_until = int(_STILLS * run.steps)
    pools: dict[int, Latents] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Latents(run, rank))
        causal = False
        if step < stills_until or step % 4 == 3:
            count = _STILL_BATCH * batch
            latents, _, scenes, rng = pool.take(step, count, 1, _STILL_BATCH * _POOL, _PASSES)
            sigma, weight = levels(count, rng)[:, None], np.ones((count, 1))
        else:
            latents, twins, scenes, rng = pool.take(step, batch, _LONG, _POOL, _PASSES)
            latents, sigma, weight, causal = _window(latents, twins, rng)
        padded = step >= _PADDING * run.steps and rng.random() < 0.5
        padding = PADDED - tokenizer.LENGTH if padded else 0
        return _error(module, latents, scenes, (sigma, weight), rng, padding, causal)

    return module, loss


def _error(
    module: TextToVideo,
    latents: Tensor,
    scenes: list[world.Scene],
    levels: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    padding: int,
    causal: bool,
) -> Tensor:
    device = next(module.parameters()).device
    sigma, weight = (torch.from_numpy(value).float() for value in levels)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(latents.shape, generator=generator)
    wide = sigma[:, None, :, None, None]
    noisy, target = (1 - wide) * latents + wide * noise, noise - latents
    made = module(noisy.to(device), sigma.to(device), captions(scenes, rng), padding, causal)
    error = functional.mse_loss(made, target.to(device), reduction="none").mean(dim=(1, 3, 4))
    return (error * weight.to(device)).sum() / weight.sum()
