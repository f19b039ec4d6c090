"""The decoder's training on long clips: what it computes, what it teaches, and what stays to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.miniature import train, wan, wan_decoder, wan_training, wan_weights


@pytest.fixture
def shipped(monkeypatch, tmp_path, pipe):
    """An autoencoder under ``tmp_path``, and short clips."""
    monkeypatch.setattr(wan_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(wan_weights, "_CLIPS", 4)
    monkeypatch.setattr(wan_decoder, "_FRAMES", 9)
    monkeypatch.setattr(wan_decoder, "_POOL", 4)
    wan_weights.export("wan-autoencoder", pipe.vae.state_dict())
    return next((tmp_path / "mini-wan" / "vae").glob("*.safetensors"))


def test_it_decodes_as_ever_and_gradients_reach_back_some_chunks(pipe, monkeypatch):
    monkeypatch.setattr(wan_decoder, "_BACK", 2)
    latents = torch.randn(1, wan.CHANNELS, 5, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = wan_decoder._decoded(pipe.vae, latents)
    torch.testing.assert_close(made, wan_training.decode(pipe.vae, latents))
    made[:, :, -8:-4].sum().backward()  # of the fourth chunk
    assert latents.grad is not None
    reached = latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [False, False, True, True, False]


def test_only_the_decoder_learns_and_only_it_is_written(shipped, learned, tmp_path):
    before = load_file(shipped)
    run = train.Run("wan-decoder", images=40, batch=2, processes=1, folder=tmp_path)
    module, loss = wan_decoder.wan_decoder(run)
    values = [loss(step, 0, 2) for step in range(2)]
    assert values[1].item() == loss(1, 0, 2).item() > 0
    names = learned(module, values)
    assert names
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in names)
    with torch.no_grad():
        for value in module.parameters():
            value += 0.25
    wan_weights.export("wan-decoder", module.state_dict())
    after = load_file(shipped)
    assert after.keys() == before.keys()
    for name, value in after.items():
        taught = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(value, module.state_dict()[name].half() if taught else before[name]), name
    assert wan_weights.load_into("wan-decoder", wan.autoencoder())
    wan_weights.load_autoencoder()
