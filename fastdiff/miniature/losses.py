"""What the miniature models learn from: scenes drawn from (seed, step), and one loss each."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from . import flow, models, render, wan_buffer, wan_long, wan_student, wan_training, weights, world
from .replica import Replica

DEFAULTS = {
    "autoencoder": {"batch": 16, "learning_rate": 3e-3},
    "decoder": {"batch": 32, "learning_rate": 1.5e-3},
    "mini-sd": {"batch": 64, "learning_rate": 1.2e-3},
    "mini-dit": {"batch": 128, "learning_rate": 2e-3},
    **wan_training.DEFAULTS,
    "wan-long": wan_long.DEFAULTS,
    "mini-wan-student": wan_student.DEFAULTS,
    "mini-wan-buffer": wan_buffer.DEFAULTS,
}
_POOL = 4096  # scenes drawn and encoded at a time, per process
_SINGLES = 120_000  # images of one object each before pairs and landscapes join
_NOISY_SHARE = 0.6  # of each batch: timesteps from the noisiest quarter, the others spread over all
_PASSES = 3  # times a pool is used, each with new captions, timesteps and noise


def pixels(scenes: list[world.Scene], size: int = models.SIZE) -> Tensor:
    """Renders as float32 [B, 3, H, W] in [-1, 1]."""
    images = np.stack([render.render(scene, size) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def _gradient_difference(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def autoencoder(run) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """L1 + L2 + gradient L1, latents kept near unit scale and robust to noise of 0.05."""
    module = models.autoencoder().to(run.device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int, rank: int, batch: int) -> Tensor:
        rng = np.random.default_rng([run.seed, step, rank])
        image = pixels([world.random_scene(rng) for _ in range(batch)]).to(run.device)
        image = image.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.autocast(torch.device(run.device).type, torch.bfloat16):
            latent = module.encoder(image)
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            decoded = module.decoder(latent + 0.05 * noise)
        error, latent = decoded.float() - image, latent.float()
        rate = error.abs().mean() + 4 * error.square().mean() + 0.5 * _gradient_difference(error)
        return rate + 0.01 * (latent.mean() ** 2 + (latent.std() - 1) ** 2)

    return module, loss


def decoder(run) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """As `autoencoder` with the encoder as it is: better pictures from the same latents, denoisers stay valid."""
    module, loss = autoencoder(run)
    module.encoder.requires_grad_(False)  # type: ignore[union-attr]
    return module, loss


class TextToImage(nn.Module):
    """Text encoder and denoiser, trained together; on a CPU the denoiser runs as its bfloat16 replica."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder()
        self.unet = models.unet()
        self.replica = None if device != "cpu" else Replica(self.unet)

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """[B, C, h, w], [B], [B, 24] to the predicted velocity, float32 [B, C, h, w]."""
        text = self.text_encoder(tokens)[0]
        if self.replica is not None:
            return self.replica(noisy, timestep, encoder_hidden_states=text)
        with torch.autocast(noisy.device.type, torch.bfloat16):
            return self.unet(noisy, timestep, text, return_dict=False)[0].float()


class Pool:
    """Encoded scenes of one process: `take(step)` gives latents and captions, the same ones for the same step."""

    def __init__(self, run, rank: int, batch: int, singles: int = _SINGLES) -> None:
        self.run, self.rank, self.batch, self.singles = run, rank, batch, singles
        self.vae = weights.load_autoencoder().to(run.device)
        self.number = -1

    def _fill(self, number: int) -> None:
        rng = np.random.default_rng([self.run.seed, 1, number, self.rank])
        # Single objects first: shapes are learned from them, and relations build on shapes.
        seen = number * _POOL * _PASSES * self.run.processes
        kinds = (1.0, 0.0, 0.0) if seen < self.singles else (0.75, 0.13, 0.12)
        self.scenes = [world.random_scene(rng, kinds) for _ in range(_POOL)]
        with torch.inference_mode():
            chunks = [pixels(self.scenes[i : i + 64]).to(self.run.device) for i in range(0, _POOL, 64)]
            latents = torch.cat([self.vae.encoder(chunk) for chunk in chunks]) * self.vae.config["scaling_factor"]
        self.latents = latents.clone()
        self.number = number

    def take(self, step: int) -> tuple[Tensor, list[str], torch.Generator]:
        """Latents [B, C, h, w], captions (one in ten empty, some words left out) and the step's own generator."""
        per_pass = _POOL // self.batch
        number, place = divmod(step, per_pass * _PASSES)
        if number != self.number:
            self._fill(number)
        passage, place = divmod(place, per_pass)
        order = np.random.default_rng([self.run.seed, 2, number, passage, self.rank]).permutation(_POOL)
        chosen = order[place * self.batch : (place + 1) * self.batch]
        rng = np.random.default_rng([self.run.seed, 3, step, self.rank])
        captions = ["" if rng.random() < 0.1 else world.caption(self.scenes[i], rng, drop=0.2) for i in chosen]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        return self.latents[torch.from_numpy(chosen).to(self.latents.device)], captions, generator


def timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Int64 [batch] in 0..999, stratified, with extra weight on the noisiest quarter.

    Place is decided there: with uniform timesteps it stayed at chance for 100,000 images, and with these it was
    learned within 5,000.
    """
    noisy = int(batch * _NOISY_SHARE)

    def spread(count: int, low: float) -> Tensor:
        return low + (1 - low) * (torch.arange(count) + torch.rand(count, generator=generator)) / max(1, count)

    return (torch.cat([spread(noisy, 0.75), spread(batch - noisy, 0.0)]) * 1000).long().clamp(max=999)


def mini_sd(run) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """v-prediction on Stable Diffusion's schedule, timesteps stratified over the batch."""
    module = TextToImage(run.device)
    module.to(run.device)
    tokenize = models.tokenizer.build()
    alphas = models.scheduler().alphas_cumprod.to(run.device)
    pools: dict[int, Pool] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Pool(run, rank, batch))
        latents, captions, generator = pool.take(step)
        ids = tokenize(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(run.device)
        timestep = timesteps(batch, generator).to(run.device)
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        alpha, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        velocity = module(alpha * latents + sigma * noise, timestep, ids)
        return functional.mse_loss(velocity, alpha * noise - sigma * latents)

    return module, loss


BUILDERS: dict[str, Callable] = {
    "autoencoder": autoencoder,
    "decoder": decoder,
    "mini-sd": mini_sd,
    "mini-dit": flow.mini_dit,
    "wan-autoencoder": wan_training.autoencoder,
    "wan-long": wan_long.wan_long,
    "mini-wan": wan_training.mini_wan,
    "mini-wan-student": wan_student.mini_wan_student,
    "mini-wan-buffer": wan_buffer.mini_wan_buffer,
}
