"""Runs inside streamdiffusion's own environment: reads a job from a folder, frames from stdin, answers on stdout.

Knows nothing of fastdiff and must stay readable for the old versions that environment holds.
"""

import inspect
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from streamdiffusion import StreamDiffusion


class _NoEvent:
    """Stands in for CUDA's timing events, which its `__call__` makes whatever the device is."""

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 0.0


def _model(kind, folder, name):
    config = json.loads((folder / f"{name}.json").read_text())
    known = inspect.signature(kind.__init__).parameters
    model = kind(**{key: value for key, value in config.items() if key in known})
    model.load_state_dict(load_file(str(folder / f"{name}.safetensors")))
    return model.eval().requires_grad_(False)


class _NoisePrediction:
    """It takes every network to predict noise; one that predicts velocity is translated, at the cost of one sum."""

    def __init__(self, unet, scheduler):
        self.unet = unet
        self.signal = scheduler.alphas_cumprod.sqrt()
        self.noise = (1 - scheduler.alphas_cumprod).sqrt()

    def __call__(self, x, timesteps, **options):
        velocity = self.unet(x, timesteps, **options)[0]
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        noise = self.noise[timesteps].view(-1, 1, 1, 1)
        return (signal * velocity + noise * x,)


def _stream(folder, job):
    unet = _model(UNet2DConditionModel, folder, "unet")
    vae = _model(AutoencoderTiny, folder, "vae")
    config = json.loads((folder / "scheduler.json").read_text())
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(50)
    grid = scheduler.timesteps.tolist()
    pipe = SimpleNamespace(
        device=torch.device("cpu"),
        vae_scale_factor=2 ** (len(vae.config.encoder_block_out_channels) - 1),
        scheduler=scheduler,
        text_encoder=None,
        unet=_NoisePrediction(unet, scheduler) if config.get("prediction_type") == "v_prediction" else unet,
        vae=vae,
        encode_prompt=lambda **_: (torch.from_numpy(np.load(folder / "embeddings.npy")), None),
    )
    return StreamDiffusion(
        pipe,
        [grid.index(timestep) for timestep in job["timesteps"]],
        torch_dtype=torch.float32,
        width=job["width"],
        height=job["height"],
        cfg_type="none",
    )


def main():
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    torch.cuda.Event = _NoEvent
    torch.cuda.synchronize = lambda *_: None
    # whatever the libraries print must not end up between the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    stream = _stream(folder, job)
    noise = torch.from_numpy(np.load(folder / "noise.npy"))
    shape = (job["height"], job["width"], 3)

    def answer(content):
        answers.write(content)
        answers.flush()

    answer(b".")
    while True:
        verb = sys.stdin.buffer.read(1)
        if not verb:
            return
        if verb == b"P":
            stream.prepare("", num_inference_steps=50, guidance_scale=1.0)
            stream.init_noise = noise.clone()
            answer(b".")
            continue
        frame = np.frombuffer(sys.stdin.buffer.read(int(np.prod(shape))), np.uint8).reshape(shape)
        start = perf_counter()
        made = stream(Image.fromarray(frame))
        image = (made[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
        taken = (perf_counter() - start) * 1000
        answer(np.float64(taken).tobytes() + image.astype(np.float32).tobytes())


if __name__ == "__main__":
    main()
