"""A toy pipeline in float64 whose arithmetic is known, for identities that must hold to 1e-12."""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

SIZE, CELLS, CHANNELS = 16, 8, 12


class ToyAutoencoder(torch.nn.Module):
    """Invertible: 2 x 2 pixels become 12 channels, in [-1, 1] unscaled."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.25, shift_factor=None, latent_channels=CHANNELS)
        self.dtype = torch.float64
        self.encoded = 0

    def encode(self, images):
        self.encoded += 1
        return SimpleNamespace(latents=torch.nn.functional.pixel_unshuffle(images, 2))

    def decode(self, latents, return_dict=True):
        return (torch.nn.functional.pixel_shuffle(latents, 2),)


class ToyUNet(torch.nn.Module):
    """Looks like a UNet; its output depends on the row's own state, timestep and prompt, and on nothing else."""

    def __init__(self, network=None):
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=CHANNELS, sample_size=CELLS, addition_embed_type=None, time_cond_proj_dim=None
        )
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self.network = network
        self.batches: list[int] = []

    def forward(
        self, sample, timestep, encoder_hidden_states, timestep_cond=None, added_cond_kwargs=None, return_dict=True
    ):
        self.batches.append(len(sample))
        told = timestep.double().view(-1, 1, 1, 1)
        if self.network is not None:
            return (self.network(sample, told, encoder_hidden_states),)
        words = encoder_hidden_states.mean(dim=1)[:, :, None, None]
        mixed = sample.roll(1, dims=1) * 0.7 + sample.roll(1, dims=3) * 0.4 + words
        return (torch.tanh(mixed + told / 1000),)


class ToyPipeline:
    """The few things of a diffusers pipeline that a stream touches."""

    def __init__(self, scheduler, network=None):
        self.vae, self.unet, self.scheduler = ToyAutoencoder(), ToyUNet(network), scheduler
        self.encoded: list[str] = []

    @property
    def components(self):
        return {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}

    def encode_prompt(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None):
        positive = self._embed(prompt)
        return positive, self._embed(negative_prompt or "") if do_classifier_free_guidance else None

    def _embed(self, text):
        self.encoded.append(text)
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.randn(1, 3, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def toy(prediction: str = "epsilon", network=None) -> Any:
    """A toy pipeline whose network predicts "epsilon", "v_prediction", "sample" or "flow_prediction"."""
    if prediction == "flow_prediction":
        return ToyPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), network)
    scheduler: Any = DDIMScheduler
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return ToyPipeline(
        scheduler(**levels, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing"), network
    )


@pytest.fixture
def make_toy():
    """The factory `toy`."""
    return toy


@pytest.fixture
def clip() -> list[np.ndarray]:
    """Ten different frames, uint8 [16, 16, 3]."""
    return list(np.random.default_rng(3).integers(0, 255, (10, SIZE, SIZE, 3), dtype=np.uint8))


@pytest.fixture
def toy_size() -> dict[str, int]:
    """Size arguments of a stream over a toy pipeline."""
    return {"height": SIZE, "width": SIZE}
