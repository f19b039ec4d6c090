"""The autoencoder on several ranks."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

import fastdiff
from fastdiff.parallel.decoder import DecoderParallel
from fastdiff.parallel.simulator import Run, Simulator, replica
from tests.parallel.nets import awake, largest, pipeline, sd, vae


def _pipe(part: Any) -> Any:
    return pipeline(sd(), vae=part)


@torch.no_grad()
def _decode(part: Any, plan: Any, ranks: int, z: torch.Tensor) -> Run:
    def one(communicator):
        pipe = _pipe(replica(part))
        with fastdiff.accelerate(pipe, plan):
            return pipe.vae.decode(z).sample

    return Simulator(ranks).run(one)


@pytest.mark.parametrize(("ranks", "rows"), [(2, 8), (3, 13), (4, 8)])
@torch.no_grad()
def test_rows_decode_to_the_untiled_picture(ranks: int, rows: int):
    part, z = vae().double(), torch.randn(1, 4, rows, 6, dtype=torch.float64)
    assert largest(_decode(part, DecoderParallel(), ranks, z), part.decode(z).sample) < 1e-13
    part, z = part.float(), z.float()
    assert largest(_decode(part, DecoderParallel(), ranks, z), part.decode(z).sample) < 1e-5


@torch.no_grad()
def test_the_tiny_autoencoder_and_the_encoder():
    sizes: dict[str, Any] = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    tiny = awake(AutoencoderTiny(**sizes, num_encoder_blocks=(0, 1, 1), num_decoder_blocks=(1, 1, 1)))
    z = torch.randn(1, 4, 9, 8)
    assert largest(_decode(tiny, DecoderParallel(), 2, z), tiny.decode(z).sample) < 1e-5

    part, image = vae().double(), torch.rand(1, 3, 26, 16, dtype=torch.float64)

    def one(communicator):
        pipe = _pipe(replica(part))
        with fastdiff.accelerate(pipe, DecoderParallel(encode=True)):
            return pipe.vae.encode(image).latent_dist.mean

    # the encoder pads below by hand before its strided convolution
    assert largest(Simulator(2).run(one), part.encode(image).latent_dist.mean) < 1e-13


@pytest.mark.parametrize("ranks", [2, 3])
@torch.no_grad()
def test_tiles_are_those_of_one_device_bit_for_bit(ranks: int):
    part, z = vae(), torch.randn(1, 4, 20, 12)
    tiled = replica(part)
    tiled.enable_tiling()
    truth = tiled.decode(z).sample
    assert not torch.equal(truth, part.decode(z).sample)
    run = _decode(part, DecoderParallel("tiles"), ranks, z)
    assert all(torch.equal(result, truth) for result in run.results)
    assert "convolution" not in run.traffic[0].operations


@torch.no_grad()
def test_a_picture_too_low_is_decoded_whole():
    part, z = vae(), torch.randn(1, 4, 1, 8)
    assert all(torch.equal(result, part.decode(z).sample) for result in _decode(part, DecoderParallel(), 2, z).results)
