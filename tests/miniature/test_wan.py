"""The miniature video model: its training computes what the pipeline will, and learns what it should."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.miniature import moving, train, wan, wan_forward, wan_training, wan_weights
from fastdiff.video.causal import CausalWan


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_model_stays_within_its_budget(pipe):
    count = sum(p.numel() for part in (pipe.vae, pipe.text_encoder, pipe.transformer) for p in part.parameters())
    assert count < 8_000_000
    assert 2 * count < 16_000_000, "bytes in half precision"


def test_the_pipeline_runs(pipe):
    frames = pipe("a red circle", height=32, width=32, num_frames=17, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 17, 32, 32, 3)


def test_the_training_forward_is_the_models_own(pipe):
    x, text = drawn(2, wan.CHANNELS, 3, 4, 4), drawn(2, 6, wan.TEXT_WIDTH, seed=1)
    timestep = torch.tensor([[900.0, 10.0, 400.0], [5.0, 700.0, 999.0]])
    padded = torch.cat([text, text.new_zeros(2, 30, wan.TEXT_WIDTH)], dim=1)
    with torch.no_grad():
        expected = pipe.transformer(x, timestep.repeat_interleave(16, 1), padded, return_dict=False)[0]
        made = wan_forward.forward(pipe.transformer, x, timestep, text, wan_forward.text_bias(6, 30))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def test_the_causal_forward_is_the_plugs(pipe):
    x, text = drawn(1, wan.CHANNELS, 4, 4, 4), drawn(1, 5, wan.TEXT_WIDTH, seed=1)
    timestep = torch.tensor([[900.0, 10.0, 400.0, 70.0]])
    mask = wan_forward.block_causal(4, 16)
    with torch.no_grad():
        made = wan_forward.forward(pipe.transformer, x, timestep, text, None, mask)
        with CausalWan(pipe.transformer) as causal, causal.block_causal(chunk=1):
            expected = pipe.transformer(x, timestep, text, return_dict=False)[0]
        later = x.clone()
        later[:, :, 2:] += 1
        changed = wan_forward.forward(pipe.transformer, later, timestep, text, None, mask)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)
    assert torch.equal(changed[:, :, :2], made[:, :, :2]), "what comes later is not seen"
    assert not torch.equal(changed[:, :, 2:], made[:, :, 2:])


def test_training_encodes_and_decodes_as_the_autoencoder_does(pipe):
    clip = drawn(1, 3, 9, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        latents = pipe.vae.encode(clip).latent_dist.mode()
        assert torch.equal(wan_training.encode(pipe.vae, clip)[:, : wan.CHANNELS], latents)
        assert torch.equal(wan_training.decode(pipe.vae, latents).clamp(-1, 1), pipe.vae.decode(latents).sample)


def test_levels_cover_and_context_is_not_learned():
    rng = np.random.default_rng(0)
    sigma = np.sort(wan_training.levels(64, rng))
    assert 0 <= sigma[0] < sigma[-1] < 1
    assert (sigma > 2 / 3).sum() > 32
    starts = np.array([0, 0, 1, 4] * 50)
    sigma, weight = wan_training.causal_levels(starts, rng)
    assert set(np.unique(weight)) == {0.0, 1.0}
    assert (sigma[weight == 0] <= 0.1).all()
    assert not weight[starts > 0, 0].any(), "a window from the middle of a clip has no beginning to learn"
    assert weight.any(1).all()
    flat = (np.ptp(sigma[starts == 0], axis=1) == 0).mean()
    rising = (np.diff(sigma[starts == 0], axis=1) > 0).all(1).mean()
    assert 0.05 < flat < 0.35
    assert 0.2 < rising < 0.5


def test_windows_begin_where_they_are_told():
    latents = torch.arange(18.0).view(2, 1, 9, 1, 1)
    made = wan_training.windows(latents, np.array([0, 4]))
    assert made.flatten().tolist() == [0, 1, 2, 3, 4, 13, 14, 15, 16, 17]


def test_before_the_words_change_there_is_the_twin_and_it_is_not_learned():
    rng, shape = np.random.default_rng(0), (200, 5)
    own, twins = torch.zeros(200, 1, 5, 1, 1), torch.ones(200, 1, 5, 1, 1)
    sigma, weight = rng.random(shape), np.ones(shape)
    weight[:50, 1:] = 0.0  # nothing is left to learn here once the words have changed
    made, told, learned = wan_training.switched(own, twins, sigma, weight, rng)
    before = made[:, 0, :, 0, 0].numpy() == 1
    assert 0.15 < before.any(1).mean() < 0.35
    assert (np.diff(before.astype(int), axis=1) <= 0).all(), "nothing comes back after the change"
    assert not learned[before].any()
    assert (told[before] <= 0.1).all()
    assert learned.any(1).all()
    assert np.array_equal(told[~before], sigma[~before])
    assert np.array_equal(made[:, 0, -1].flatten().numpy(), np.zeros(200)), "the last frame always is what is asked for"


def test_twins_move_alike_and_are_called_otherwise(small, tmp_path):
    run = train.Run("mini-wan", images=400, batch=4, processes=1, folder=tmp_path)
    pool = wan_training.Latents(run, 0)
    latents, twins, scenes, _ = pool.take(0, 4, 33, 8, 1)
    held, encoded = pool.pool(0, 33, 8)
    for latent, twin, scene in zip(latents, twins, scenes, strict=True):
        place = held.index(scene)
        other = held[(place + 4) % 8]
        assert torch.equal(latent, encoded[place])
        assert torch.equal(twin, encoded[(place + 4) % 8])
        assert other.motion == scene.motion
        assert (other.things[0].x, other.things[0].y) == (scene.things[0].x, scene.things[0].y)
        assert moving.truth(other) != moving.truth(scene)


@pytest.fixture
def small(monkeypatch, pipe):
    """Pools of a few clips, encoded by an autoencoder that never learned anything."""
    monkeypatch.setattr(wan_training, "_POOL", 8)
    monkeypatch.setattr(wan_weights, "load_autoencoder", lambda: copy.deepcopy(pipe.vae))


def test_a_step_of_training_reaches_the_text_and_comes_back_the_same(small, tmp_path):
    run = train.Run("mini-wan", images=400, batch=4, processes=1, folder=tmp_path)
    for step in (0, 61, 62):  # single frames, and windows in both ways
        (module, value), (_, again) = (_stepped(run, step) for _ in range(2))
        assert value == again > 0
        for part in (module.text_encoder, module.transformer):
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            assert any(gradient.abs().max() > 0 for gradient in gradients)


def _stepped(run, step) -> tuple[Any, float]:
    torch.manual_seed(0)
    module, loss = wan_training.mini_wan(run)
    value = loss(step, 0, run.batch)
    value.backward()
    return module, value.item()


def test_autoencoder_training_learns(tmp_path):
    run = train.Run("wan-autoencoder", images=400, batch=2, processes=1, folder=tmp_path)
    torch.manual_seed(0)
    module, loss = wan_training.autoencoder(run)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    values = []
    for step in range(5):
        optimizer.zero_grad()
        value = loss(step, 0, 2)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


def test_weights_come_back_as_they_were_written(tmp_path, monkeypatch, pipe):
    monkeypatch.setattr(wan_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(wan_weights, "_CLIPS", 4)
    wan_weights.export("wan-autoencoder", pipe.vae.state_dict())
    vae: Any = wan_weights.load_autoencoder()
    scene = moving.scene(np.random.default_rng(0))
    clip = wan_training.pixels([moving.render(scene, 9)])
    with torch.no_grad():
        posterior = vae.encode(clip).latent_dist
    assert posterior.std.max() < 1e-3, "latents are points"
    model = wan_training.TextToVideo()
    wan_weights.export("mini-wan", model.state_dict())
    again = wan_training.TextToVideo()
    assert wan_weights.load_into("mini-wan", again)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float())
    assert wan_weights.load_into("wan-autoencoder", wan.autoencoder())
    assert str(tmp_path) not in (tmp_path / "mini-wan/vae/config.json").read_text("utf-8")


def test_words_are_embedded_as_the_pipeline_embeds_them(pipe):
    model = wan_training.TextToVideo()
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    words = ["a red circle moving left quickly on a white background", ""]
    with torch.no_grad():
        made = model.embed(words, "cpu")
        expected, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(made, expected[:, : made.shape[1]], atol=1e-5, rtol=0)
    assert not expected[:, made.shape[1] :].any()
