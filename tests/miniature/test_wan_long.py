"""The autoencoder's training on long clips: what it computes, what it learns, and what it must leave as it was."""

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.miniature import train, wan, wan_long, wan_training, wan_weights


@pytest.fixture
def shipped(monkeypatch, tmp_path, pipe):
    """An autoencoder under ``tmp_path``, and clips of five latent frames."""
    monkeypatch.setattr(wan_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(wan_weights, "_CLIPS", 4)
    monkeypatch.setattr(wan_long, "_FRAMES", 17)
    wan_weights.export("wan-autoencoder", pipe.vae.state_dict())
    return next((tmp_path / "mini-wan" / "vae").glob("*.safetensors"))


def clips(frames, seed=0, count=1):
    return torch.rand(count, 3, frames, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_encodes_and_decodes_as_ever(pipe, monkeypatch):
    monkeypatch.setattr(wan_long, "_NOISE", 0.0)
    clip = clips(17)
    with torch.no_grad():
        latents, frames = wan_long._through(pipe.vae, clip, torch.Generator(), cut=9)
        torch.testing.assert_close(latents, wan_training.encode(pipe.vae, clip)[:, : wan.CHANNELS])
        torch.testing.assert_close(frames, wan_training.decode(pipe.vae, latents))


@pytest.mark.parametrize("cut", [1, 3])
def test_after_a_cut_it_decodes_the_other_clip(pipe, monkeypatch, cut):
    monkeypatch.setattr(wan_long, "_NOISE", 0.0)
    clip = clips(17, count=2)
    with torch.no_grad():
        latents, frames = wan_long._through(pipe.vae, clip, torch.Generator(), cut)
        torch.testing.assert_close(latents, wan_training.encode(pipe.vae, clip)[:, : wan.CHANNELS])
        torch.testing.assert_close(frames, wan_training.decode(pipe.vae, wan_long.exchanged(latents, cut)))
    swapped = wan_long.exchanged(clip, 1 + (cut - 1) * wan.PER_LATENT)
    same = (swapped == clip).all(dim=(0, 1, 3, 4))
    assert same.tolist() == [frame < 1 + (cut - 1) * wan.PER_LATENT for frame in range(17)]


def test_gradients_reach_back_some_chunks(pipe, monkeypatch):
    monkeypatch.setattr(wan_long, "_BACK", 2)
    clip = clips(17).requires_grad_()
    _, frames = wan_long._through(pipe.vae, clip, torch.Generator(), cut=9)
    frames[:, :, 9:13].sum().backward()  # of the fourth chunk
    assert clip.grad is not None
    reached = clip.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert not reached[:5].any()
    assert reached[5:13].any()
    assert not reached[13:].any()


def test_latents_that_stay_are_not_drawn_anywhere(shipped, monkeypatch, tmp_path):
    """An encoder with no memory says the same of a frame wherever it stands."""
    monkeypatch.setattr(wan_long, "encode", lambda vae, frames: frames[:, :1, ::4].repeat(1, 2 * wan.CHANNELS, 1, 1, 1))

    def through(vae, clip, generator, cut):
        latents = clip[:, :1, ::4].repeat(1, wan.CHANNELS, 1, 1, 1).requires_grad_()
        return latents, wan_long.exchanged(clip, 1 + 4 * (cut - 1))

    monkeypatch.setattr(wan_long, "_through", through)
    _, loss = wan_long.wan_long(train.Run("wan-long", images=40, batch=2, processes=1, folder=tmp_path))
    assert [loss(step, 0, 2).item() for step in range(8)] == [0.0] * 8


def test_in_the_end_only_the_decoder_learns(shipped, learned, tmp_path):
    module, loss = wan_long.wan_long(train.Run("wan-long", images=40, batch=2, processes=1, folder=tmp_path))
    names = learned(module, [loss(step, 0, 2) for step in (17, 18)])
    assert {name.split(".")[0] for name in names} == {"decoder", "post_quant_conv"}


def test_it_learns_and_what_it_says_of_its_latents_stays(shipped, learned, tmp_path):
    before, config = load_file(shipped), shipped.with_name("config.json").read_text("utf-8")
    module, loss = wan_long.wan_long(train.Run("wan-long", images=40, batch=2, processes=1, folder=tmp_path))
    values = [loss(step, 0, 2) for step in range(2)]
    assert values[1].item() == loss(1, 0, 2).item() > 0
    names = learned(module, values)
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    with torch.no_grad():
        for value in module.parameters():
            value += 0.25
    wan_weights.export("wan-long", module.state_dict())
    after = load_file(shipped)
    assert after.keys() == before.keys()
    assert torch.equal(after["quant_conv.bias"][wan.CHANNELS :], before["quant_conv.bias"][wan.CHANNELS :])
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        assert torch.equal(after[name], module.state_dict()[name].half())
    assert shipped.with_name("config.json").read_text("utf-8") == config
    assert wan_weights.load_into("wan-long", wan.autoencoder())
