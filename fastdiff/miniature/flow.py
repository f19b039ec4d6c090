"""The miniature's transformer: `mini-dit`, shaped like Stable Diffusion 3, a flow over the latents of `mini-sd`.

It learns the velocity `mini-sd` sees rather than that of single samples: both networks estimate the same conditional
mean, but the teacher's estimate has none of the scatter of a sample, so a transformer, which needs several times the
images a UNet needs, gets there in a CPU's hours. Where the flow is noisier than the teacher's schedule, the teacher
looks at a less noisy state from which the noisier one was drawn, whose mean is the mean sought.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastdiff.attention.folded import ZEROS, FoldedAttention

from . import models

WIDTH = 192
_NOISY_SHARE = 0.5  # of each batch: sigmas from the noisiest quarter, where places are decided


def transformer() -> SD3Transformer2DModel:
    """Five joint blocks of width 192 over 2 x 2 patches; 6.9 million parameters."""
    kind: Any = SD3Transformer2DModel
    return kind(
        sample_size=models.SIZE // 4,
        patch_size=2,
        in_channels=models.LATENT_CHANNELS,
        out_channels=models.LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=48,
        num_attention_heads=WIDTH // 48,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * models.TEXT_WIDTH,
        pooled_projection_dim=2 * models.TEXT_WIDTH,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def text_encoders(trained: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The two CLIPs the pipeline asks for, out of the one `mini-sd` learned.

    Stable Diffusion 3 reads the layer before the last one. The first gets a third layer that adds nothing, so that it
    hands on the trained second layer; the second hands on the first.
    """
    deep, plain = copy.deepcopy(trained.config), copy.deepcopy(trained.config)
    deep.num_hidden_layers += 1
    made = []
    for config in (deep, plain):
        model = CLIPTextModelWithProjection(config)
        missing, unexpected = model.load_state_dict(_named(trained.state_dict(), model), strict=False)
        assert not unexpected and all(".2." in name or "text_projection" in name for name in missing), missing
        with torch.no_grad():
            model.text_projection.weight.copy_(torch.eye(*model.text_projection.weight.shape))
            for name, value in model.named_parameters():
                if ".layers.2." in name and ("out_proj" in name or "fc2" in name):
                    value.zero_()
        made.append(model.eval().requires_grad_(False))
    return made[0], made[1]


def _named(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters under the names another CLIP class gives them."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    return {prefix + name.removeprefix("text_model."): value for name, value in state.items()}


def pipeline(vae: Any, text: CLIPTextModel, denoiser: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The parts as a plain `StableDiffusion3Pipeline` without T5."""
    first, second = text_encoders(text)
    kind: Any = StableDiffusion3Pipeline
    return kind(
        vae=vae.eval(),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=models.tokenizer.build(),
        tokenizer_2=models.tokenizer.build(),
        tokenizer_3=None,
        transformer=denoiser.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


class Velocity:
    """The velocity of the flow as `mini-sd` estimates it, float32 ``[B, C, h, w]``, and the state it belongs to."""

    def __init__(self, unet: Any, device: str) -> None:
        half = torch.bfloat16
        self.unet = unet.to(device, half).eval().requires_grad_(False)
        alphas = models.scheduler().alphas_cumprod.double()
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.sigmas = self.noise / (self.signal + self.noise)

    @torch.no_grad()
    def __call__(
        self, clean: Tensor, sigma: Tensor, text: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, sigma, velocity)`` of clean latents at about the sigmas asked for ``[B]``, text ``[B, S, E]``.

        Sigmas on the teacher's schedule are moved to its next timestep; noisier ones stay.
        """
        timestep = torch.searchsorted(self.sigmas, sigma.cpu().double()).clamp(max=len(self.sigmas) - 1)
        beyond = sigma.cpu().double() > self.sigmas[-1]
        sigma = torch.where(beyond, sigma.cpu().double(), self.sigmas[timestep])
        signal, noise, wide = (_wide(value, clean) for value in (self.signal[timestep], self.noise[timestep], sigma))
        eps, more = (torch.randn(clean.shape, generator=generator).to(clean) for _ in range(2))
        seen = signal * clean + noise * eps
        half = self.unet.dtype
        output = self.unet(seen.to(half), timestep.to(clean.device), text.to(half), return_dict=False)[0].float()
        clean_seen, eps_seen = signal * seen - noise * output, noise * seen + signal * output
        # of a state noisier than the teacher's last: signal and noise of the flow in VP coordinates
        radius = (wide**2 + (1 - wide) ** 2).sqrt()
        ratio = (1 - wide) / radius / signal
        noisier = (ratio * seen + (1 - ratio**2).clamp(min=0).sqrt() * more) * radius
        outside = _wide(beyond, clean) > 0
        x = torch.where(outside, noisier, seen / (signal + noise))
        velocity = torch.where(outside, (noisier - clean_seen) / wide, eps_seen - clean_seen)
        return x, sigma.to(clean), velocity


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def sigmas(batch: int, generator: torch.Generator) -> Tensor:
    """Float ``[batch]`` in 0..1, stratified, with extra weight on the noisiest quarter."""
    noisy = int(batch * _NOISY_SHARE)

    def spread(count: int, low: float) -> Tensor:
        return low + (1 - low) * (torch.arange(count) + torch.rand(count, generator=generator)) / max(1, count)

    return torch.cat([spread(noisy, 0.75), spread(batch - noisy, 0.0)])


def mini_dit(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """Mean squared error to the teacher's velocity, sigmas stratified over the batch."""
    from . import weights
    from .losses import Pool
    from .replica import Replica

    module = transformer().to(run.device)
    taught = weights.load_parts()
    teacher = Velocity(taught["unet"], run.device)
    text = taught["text_encoder"].to(run.device)
    pipe: Any = pipeline(weights.load_autoencoder(), taught["text_encoder"], module)
    pipe.to(run.device)
    tokenize = models.tokenizer.build()
    network = Replica(module, FoldedAttention(ZEROS, torch.float32)) if run.device == "cpu" else module
    pools: dict[int, Pool] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Pool(run, rank, batch))
        latents, captions, generator = pool.take(step)
        ids = tokenize(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(run.device)
        with torch.no_grad():
            x, sigma, velocity = teacher(latents, sigmas(batch, generator), text(ids)[0].float(), generator)
            prompt, _, pooled, _ = pipe.encode_prompt(
                captions, None, None, device=run.device, do_classifier_free_guidance=False, max_sequence_length=ZEROS
            )
        if run.device == "cpu":
            prompt = prompt[:, : ids.shape[1] + 1]
        conditions = {"encoder_hidden_states": prompt, "pooled_projections": pooled}
        with torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=run.device != "cpu"):
            made = network(x, timestep=1000 * sigma, **conditions)
        return functional.mse_loss((made if isinstance(made, Tensor) else made.sample).float(), velocity)

    return module, loss
