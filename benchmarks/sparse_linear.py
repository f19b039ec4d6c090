"""Fine-tunes sparse-linear attention on the embedded model, for the `sla` rows of `bench attention`.

    python -m benchmarks.sparse_linear 128 --steps 280
    python -m benchmarks.sparse_linear 128 --steps 460 --rate 0.0007
    python -m benchmarks.sparse_linear 64 --steps 260 --batch 16

The teacher is the model itself with dense attention, on renders of the world at every noise level; one caption in ten
is empty. Resumable: a killed run goes on from `.training/`, and a larger `--steps` moves its end.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from fastdiff.attention.linear import FineTune, Linear
from fastdiff.miniature import losses, world
from fastdiff_app.engine import load_pipeline

# by side in pixels: 1,024 tokens at 128 px, and the 256 that the model was trained with
SETTINGS = {
    128: Linear(density=0.1, query_block=16, key_block=16, minimum_tokens=128),
    64: Linear(density=0.1, query_block=8, key_block=8, minimum_tokens=64),
}
SAVE_SECONDS = 60


def weights(size: int) -> Path:
    """Where the weights for pictures of this side lie."""
    return Path(__file__).resolve().parent / "weights" / f"mini-sd-sla-{size}.safetensors"


def batches(pipe: Any, batch: int, seed: int, size: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """Keyword arguments of denoiser calls without end, the same ones for the same seed and place."""
    alphas = pipe.scheduler.alphas_cumprod
    step = first
    while True:
        rng = np.random.default_rng([seed, step])
        scenes = [world.random_scene(rng, (0.75, 0.13, 0.12)) for _ in range(batch)]
        captions = ["" if rng.random() < 0.1 else world.caption(scene, rng, drop=0.2) for scene in scenes]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.no_grad():
            latents = pipe.vae.encode(losses.pixels(scenes, size)).latents * pipe.vae.config.scaling_factor
            text = pipe.encode_prompt(captions, "cpu", 1, False)[0]
        timestep = losses.timesteps(batch, generator)
        alpha = alphas[timestep][:, None, None, None]
        noise = torch.randn(latents.shape, generator=generator)
        yield {
            "sample": alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
            "timestep": timestep,
            "encoder_hidden_states": text,
        }
        step += 1


def train(size: int, steps: int, batch: int = 8, rate: float = 2e-3, folder: Path = Path(".training")) -> None:
    """Train to the end and write the weights; says how it goes every 20 steps."""
    pipe = load_pipeline(None, "text-to-image")
    checkpoint = folder / f"sparse-linear-{size}.pt"
    tuned = FineTune(pipe.unet, SETTINGS[size], next(batches(pipe, 1, 1, size)), rate, steps)
    if checkpoint.exists():
        tuned.resume(torch.load(checkpoint, weights_only=True))
    running, saved = None, monotonic()
    for arguments in batches(pipe, batch, 0, size, first=tuned.done):
        if tuned.done >= steps:
            break
        loss = tuned.step(arguments)
        running = loss if running is None else 0.95 * running + 0.05 * loss
        if tuned.done % 20 == 0:
            print(f"{tuned.done} of {steps}: relative squared error {running:.5f}", flush=True)
        if monotonic() - saved > SAVE_SECONDS or tuned.done == steps:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(tuned.state(), checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)
            saved = monotonic()
    tuned.save(weights(size))


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", type=int, choices=list(SETTINGS), help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
