"""A streamed autoencoder says bit for bit what a call on the whole clip says."""

from typing import Any

import diffusers
import pytest
import torch

from fastdiff.acceleration import Unsupported
from fastdiff.video.streaming_vae import StreamingVAE, decoded

models: Any = diffusers  # whose annotations know one form of each model


def wan(**changes):
    settings = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
        "scale_factor_spatial": 4,
    }
    return models.AutoencoderKLWan(**settings | changes)


def residual():
    """Shaped like Wan 2.2's: patches and shortcuts."""
    return wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8)


def qwen():
    return models.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def cogvideo():
    return models.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=16,
        sample_width=16,
        temporal_compression_ratio=4,
    )


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def clip(frames, size=16, seed=1):
    return torch.rand(1, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streamed(call, whole, parts):
    """The outputs of calls with this many frames each, joined."""
    outputs = [call(part) for part in whole.split(parts, dim=2)]
    return torch.cat([output for output in outputs if output is not None], dim=2)


@pytest.mark.parametrize("build", [wan, residual, qwen, cogvideo])
@pytest.mark.parametrize("parts", [[17], [1, 4, 4, 4, 4], [3, 1, 7, 6]])
def test_encodes_and_decodes_like_the_whole_clip(build, parts):
    vae = made(build)
    # with two cells a side a backend may round the last 1 x 1 x 1 convolution by the number of frames it is given
    frames = clip(17, size=32 if build is residual else 16)
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mode()
        decoded = vae.decode(latents).sample
    session: Any = StreamingVAE(vae)
    assert torch.equal(streamed(session.encode, frames, parts), latents)
    back = streamed(session.decode, latents, [1, 2, 2])
    assert torch.equal(back, decoded)
    assert back.shape[2] == 17


def mochi():
    vae = models.AutoencoderKLMochi(
        in_channels=15,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vae.use_framewise_decoding = True
    return vae


@pytest.mark.parametrize("build", [wan, cogvideo, mochi])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_clip_of_any_length_is_decoded_to_its_end(build, count):
    vae = made(build)
    latents = torch.randn(1, 4, count, 4, 4, generator=torch.Generator().manual_seed(0))
    session = StreamingVAE(vae)
    with torch.no_grad():
        whole = vae.decode(session.unscaled(latents)).sample
    assert torch.equal(torch.cat(list(decoded(vae, latents)), dim=2), whole)


def test_mochi_decodes_in_parts():
    vae = made(mochi)
    latents = torch.randn(1, 4, 6, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latents).sample
    session: Any = StreamingVAE(vae)
    assert torch.equal(streamed(session.decode, latents, [1, 5]), whole)
    with pytest.raises(Unsupported, match="whole clips only"):
        session.encode(clip(6))


def test_sessions_do_not_mix_and_reset_begins_anew():
    vae = made(wan)
    one, two = clip(13, seed=1), clip(13, seed=2)
    alone = [streamed(StreamingVAE(vae).encode, frames, [1, 4, 4, 4]) for frames in (one, two)]
    first: Any = StreamingVAE(vae)
    second: Any = StreamingVAE(vae)
    together = [
        (first.encode(a), second.encode(b))
        for a, b in zip(one.split([1, 4, 4, 4], 2), two.split([1, 4, 4, 4], 2), strict=True)
    ]
    for number, expected in enumerate(alone):
        assert torch.equal(torch.cat([pair[number] for pair in together], dim=2), expected)
    vae.encode(two)  # a whole clip in between is nobody's business either
    first.reset()
    assert torch.equal(streamed(first.encode, two, [1, 4, 4, 4]), alone[1])


def test_memory_does_not_grow():
    session: Any = StreamingVAE(made(wan))
    held = []
    for _ in range(12):
        session.decode(torch.zeros(1, 4, 1, 4, 4))
        session.encode(torch.zeros(1, 3, 4, 16, 16))
        held.append(session.held_bytes)
    assert held[3] == held[-1] > 0


def test_an_interrupted_chunk_leaves_the_session_where_it_was():
    vae = made(wan)
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = streamed(StreamingVAE(vae).decode, latents, [1, 1, 1])
    session: Any = StreamingVAE(vae)
    first = session.decode(latents[:, :, :1])

    def interrupted(*_):
        raise KeyboardInterrupt

    hook = vae.decoder.norm_out.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.decode(latents[:, :, 1:2])
    hook.remove()
    rest = session.decode(latents[:, :, 1:])
    assert torch.equal(torch.cat([first, rest], dim=2), expected)


def test_bad_streams_are_refused_and_the_session_goes_on():
    session: Any = StreamingVAE(made(wan))
    frames = clip(5)
    first = session.encode(frames[:, :, :1])
    with pytest.raises(ValueError, match="began with frames"):
        session.encode(clip(4, size=32))
    with pytest.raises(ValueError, match="not finite"):
        session.encode(torch.full((1, 3, 4, 16, 16), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        session.encode(torch.zeros(1, 3, 16, 16))
    rest = session.encode(frames[:, :, 1:])
    assert torch.equal(torch.cat([first, rest], dim=2), streamed(StreamingVAE(session.vae).encode, frames, [5]))


@pytest.mark.parametrize("build", [wan, cogvideo])
def test_a_wrong_beginning_leaves_the_session_to_begin(build):
    session: Any = StreamingVAE(made(build))
    with pytest.raises(ValueError, match="latents have 4 channels, not 7"):
        session.decode(torch.zeros(1, 7, 3, 2, 2))
    with pytest.raises(ValueError, match="not finite"):
        session.decode(torch.full((1, 4, 3, 2, 2), float("nan")))
    with pytest.raises(RuntimeError, match="channels"):
        session.encode(torch.zeros(1, 5, 9, 16, 16))
    assert session.encode(clip(9)) is not None
    made_of_zeros = session.decode(torch.zeros(1, 4, 3, 2, 2))
    assert torch.isfinite(made_of_zeros).all()


def test_scales_are_those_of_the_pipeline():
    session: Any = StreamingVAE(made(wan))
    latents = torch.randn(1, 4, 2, 4, 4)
    mean, std = (torch.tensor(session.vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(session.scaled(latents), (latents - mean) / std)
    torch.testing.assert_close(session.unscaled(session.scaled(latents)), latents)


def test_other_autoencoders_are_refused():
    with pytest.raises(Unsupported, match="no cache"):
        StreamingVAE(models.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2))
    vae = made(wan)
    vae.enable_tiling(tile_sample_min_height=8, tile_sample_min_width=8)
    with pytest.raises(Unsupported, match="disable_tiling"):
        StreamingVAE(vae).encode(clip(1))
