"""The same engine on real architectures, and against diffusers' own pipelines."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxImg2ImgPipeline,
    LCMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from fastdiff.acceleration import Unsupported
from fastdiff.miniature.families import family
from fastdiff_pipelines import SequentialStream, Stream
from fastdiff_pipelines.denoiser import SD3, Captioned, Flux, UNet, denoiser_for

PROMPT = "a red circle on a blue background"
SIZE: dict[str, Any] = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def frames():
    """Four different frames, uint8 [64, 64, 3]."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 255, (4, 4, 4, 3), dtype=np.uint8)
    return list(coarse.repeat(16, axis=1).repeat(16, axis=2))


@pytest.mark.parametrize(
    ("name", "sampler", "guidance"),
    [
        ("sd", "lcm", "onetime"),
        ("sd", "dpm", "full"),
        ("sdxl", "lcm", "none"),
        ("sdxl", "ddim", "full"),
        ("sd3", "euler", "onetime"),
        ("sd3", "lcm", "full"),
        ("flux", "euler", "full"),
        ("flux", "lcm", "self"),
        ("pixart", "dpm", "self"),
        ("pixart", "tcd", "full"),
    ],
)
def test_a_stream_is_one_frame_at_a_time(frames, name, sampler, guidance):
    pipe = family(name)
    options: dict[str, Any] = dict(
        steps=3, strength=0.8, sampler=sampler, guidance=guidance, delta=0.8, negative_prompt="green", **SIZE
    )
    options["guidance_scale"] = 1.0 if guidance == "none" else 1.5
    stream, alone = Stream(pipe, PROMPT, **options), SequentialStream(pipe, PROMPT, **options)
    found = [output for frame in frames[:2] for output in stream.push(frame)]
    expected = [output for frame in frames[:2] for output in alone.push(frame)]
    stream.update(prompt="a green square on a black background")
    alone.update(prompt="a green square on a black background")
    found += [output for frame in frames[2:] for output in stream.push(frame)] + stream.flush()
    expected += [output for frame in frames[2:] for output in alone.push(frame)]
    assert [output.frame_id for output in found] == [0, 1, 2, 3]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-5)
    assert not torch.equal(found[0].pixels, found[1].pixels)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_every_denoiser_takes_a_timestep_per_row(name):
    """Rows at three timesteps in one call are three calls, for every architecture the stream knows."""
    pipe = family(name)
    denoiser = denoiser_for(pipe, 64, 64)
    side = 64 // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    with torch.inference_mode():
        one, other = denoiser.encode(PROMPT, 3.5), denoiser.encode_negative("a green square", 3.5)
        conditioning = {key: torch.cat([one[key], other[key], one[key]]) for key in one}
        x = torch.randn(3, denoiser.channels, side, side)
        told = torch.tensor([900.0, 500.0, 20.0])
        together = denoiser(x, told, conditioning)
        alone = [
            denoiser(x[i : i + 1], told[i : i + 1], {key: value[i : i + 1] for key, value in conditioning.items()})
            for i in range(3)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(denoiser(x, told.flip(0), conditioning), together, atol=1e-4)
    kinds = {"sd": UNet, "sdxl": UNet, "sd3": SD3, "flux": Flux, "pixart": Captioned}
    assert type(denoiser) is kinds[name] and together.shape == x.shape


def _noise_of(monkeypatch, pipeline, noise):
    """Let a diffusers pipeline draw the stream's noise."""
    module = import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: noise.reshape(shape).clone())


PARITY = [
    ("sd", StableDiffusionImg2ImgPipeline, "ddim", 1.0),
    ("sd", StableDiffusionImg2ImgPipeline, "ddim", 4.0),
    ("sd", StableDiffusionImg2ImgPipeline, "dpm", 4.0),
    ("sd", StableDiffusionImg2ImgPipeline, "lcm", 1.0),
    ("sdxl", StableDiffusionXLImg2ImgPipeline, "ddim", 4.0),
    ("sd3", StableDiffusion3Img2ImgPipeline, "euler", 1.0),
    ("sd3", StableDiffusion3Img2ImgPipeline, "euler", 4.0),
    ("flux", FluxImg2ImgPipeline, "euler", 1.0),
]


@pytest.mark.parametrize(("name", "kind", "sampler", "scale"), PARITY)
def test_a_frame_is_what_diffusers_image_to_image_makes_of_it(monkeypatch, frames, name, kind, sampler, scale):
    pipe = family(name)
    if sampler == "ddim":
        kind_of: Any = DDIMScheduler
        pipe.scheduler = kind_of.from_config(pipe.scheduler.config, clip_sample=False)
    steps = 1 if sampler == "lcm" else 2
    stream = Stream(
        pipe,
        PROMPT,
        steps=steps,
        strength=0.5,
        sampler=sampler,
        guidance="none" if scale == 1 else "full",
        guidance_scale=scale,
        **SIZE,
    )
    (found,) = stream.run(frames[:1])
    official = kind(**pipe.components)
    if sampler == "lcm":
        official.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    official.set_progress_bar_config(disable=True)
    session = stream._session
    _noise_of(monkeypatch, official, session.prepared.noises[:1])
    with torch.inference_mode():
        latent = session.encode([torch.from_numpy(frames[0])])[0]
    arguments: dict[str, Any] = dict(image=latent, num_inference_steps=2 * steps, strength=0.5, output_type="pt")
    arguments["guidance_scale"] = 3.5 if name == "flux" else scale
    if sampler == "lcm":
        arguments["num_inference_steps"] = 1
        monkeypatch.setattr(official, "get_timesteps", lambda count, strength, device: _lcm_half(official, strength))
    expected = official(PROMPT, **SIZE_OF.get(name, {}), **arguments).images[0]
    torch.testing.assert_close(found.pixels, expected, rtol=0, atol=2e-5)


SIZE_OF = {"sd3": SIZE, "flux": SIZE}


def _lcm_half(official, strength):
    official.scheduler.set_timesteps(1, strength=strength)
    return official.scheduler.timesteps, 1


def test_text_to_image_is_what_diffusers_makes(monkeypatch):
    pipe = family("flux")
    stream = Stream(pipe, PROMPT, steps=3, strength=1.0, sampler="euler", **SIZE)
    (found,) = stream.run([None])
    pipe.set_progress_bar_config(disable=True)
    noise = stream._session.prepared.noises[:1]
    packed = noise.view(1, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 16)
    expected = pipe(PROMPT, latents=packed, num_inference_steps=3, guidance_scale=3.5, output_type="pt", **SIZE)
    torch.testing.assert_close(found.pixels, expected.images[0], rtol=0, atol=2e-5)


def test_a_half_precision_denoiser_keeps_its_states_in_float32(frames):
    pipe = family("sd3")
    exact = list(Stream(pipe, PROMPT, sampler="euler", steps=3, **SIZE).run(frames[:2]))
    pipe.transformer.to(torch.bfloat16)
    stream = Stream(pipe, PROMPT, sampler="euler", steps=3, **SIZE)
    assert stream._session.shape.state == torch.float32
    for one, other in zip(stream.run(frames[:2]), exact, strict=True):
        assert one.pixels.dtype == torch.float32
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=0.1)
        assert not torch.equal(one.pixels, other.pixels)


def test_models_the_stream_cannot_serve_are_named():
    pipe = family("sd")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(Unsupported, match="takes 9 channels and its autoencoder makes 4"):
        Stream(pipe, PROMPT)
    pipe = family("sd")
    pipe.unet.register_to_config(addition_embed_type="image_hint")
    with pytest.raises(Unsupported, match="image_hint"):
        Stream(pipe, PROMPT)

    class Stranger:
        vae = family("sd").vae

    with pytest.raises(Unsupported, match="no stream for Stranger"):
        Stream(Stranger(), PROMPT, **SIZE)
    with pytest.raises(ValueError, match=r"does not take|divisible by its scale"):
        Stream(family("sd"), PROMPT, height=66, width=64)
