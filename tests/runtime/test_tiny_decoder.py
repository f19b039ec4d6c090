"""The tiny decoder: swapped in, swapped back, refused where it does not belong."""

import pytest
import torch
from diffusers import AutoencoderTiny

import fastdiff
from fastdiff.miniature.families import family
from fastdiff.runtime.tiny_decoder import TinyDecoder


def tiny(channels: int = 4, levels: int = 3) -> AutoencoderTiny:
    widths, counts = (8,) * levels, (1,) * levels
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts,
    )


def test_swaps_the_autoencoder_and_its_name_in_the_config_and_back():
    pipe = family("sdxl")
    full, config = pipe.vae, dict(pipe.config)
    with fastdiff.accelerate(pipe, TinyDecoder(tiny())) as handle:
        assert isinstance(pipe.vae, AutoencoderTiny)
        assert pipe.config["vae"] == ("diffusers", "AutoencoderTiny")
        pipe.vae.decode(torch.zeros(1, 4, 4, 4))
        assert handle.report().rows[0].accelerated == 1
    assert pipe.vae is full
    assert dict(pipe.config) == config


def test_loads_a_folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    with fastdiff.accelerate(family("flux"), TinyDecoder(str(tmp_path))) as handle:
        assert isinstance(handle.pipe.vae, AutoencoderTiny)


@pytest.mark.parametrize(
    ("name", "decoder", "reason"),
    [
        ("sd", None, "tiny one already"),
        ("sd3", lambda: tiny(4), "latents of 4 channels and the pipeline of 16"),
        ("flux", lambda: tiny(4, levels=4), "8 pixels of a latent cell and the pipeline's 4"),
        ("flux", lambda: family("flux").vae, "not a tiny autoencoder"),
        ("flux", None, "no tiny decoder is published"),
        ("sd3", lambda: "./no/such/folder", "could not be loaded"),
    ],
)
def test_refuses_what_does_not_match(name: str, decoder, reason: str):
    pipe = family(name)
    before = pipe.vae
    with pytest.raises(fastdiff.Unsupported, match=reason):
        fastdiff.accelerate(pipe, TinyDecoder(decoder() if decoder else None))
    assert pipe.vae is before


def test_the_published_one_is_chosen_by_the_latents_and_offline_is_one_clear_error():
    pipe = family("sdxl")
    assert TinyDecoder().supports(pipe)
    with pytest.raises(fastdiff.Unsupported, match=r"madebyollin/taesdxl could not be loaded .* go online once"):
        fastdiff.accelerate(pipe, TinyDecoder())
