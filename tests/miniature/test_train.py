"""The trainer: a killed run ends with the weights of an uninterrupted one, and the replica trains the master."""

import pytest
import torch
import torch.nn.functional as functional

from fastdiff.miniature import losses, train, weights


def linear(run):
    torch.manual_seed(run.seed)
    module = torch.nn.Linear(4, 3)

    def loss(step, rank, batch):
        generator = torch.Generator().manual_seed(1000 * run.seed + step)
        x = torch.randn(batch, 4, generator=generator)
        return functional.mse_loss(module(x), x[:, :3] * 2 + 1)

    return module, loss


@pytest.fixture
def exported(monkeypatch):
    """Registers the linear problem and keeps exports and shipped weights out of it."""
    kept = {}
    monkeypatch.setitem(losses.BUILDERS, "linear", linear)
    monkeypatch.setattr(weights, "export", lambda name, state: kept.update({name: state}))
    monkeypatch.setattr(weights, "load_into", lambda name, module: False)
    return kept


def run(folder, images=80, **changes):
    return train.Run("linear", images, batch=2, processes=1, folder=folder, save_seconds=0, **changes)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, exported, monkeypatch):
    train.train(run(tmp_path / "whole"))
    whole = torch.load(tmp_path / "whole" / "linear.pt", weights_only=True)

    def killed_at(step):
        def build(settings):
            module, loss = linear(settings)

            def stop(now, rank, batch):
                if now == step:
                    raise KeyboardInterrupt
                return loss(now, rank, batch)

            return module, stop

        return build

    for step in (0, 7, 8, 31):
        monkeypatch.setitem(losses.BUILDERS, "linear", killed_at(step))
        with pytest.raises(KeyboardInterrupt):
            train.train(run(tmp_path / "parts"))
    monkeypatch.setitem(losses.BUILDERS, "linear", linear)
    train.train(run(tmp_path / "parts"))
    parts = torch.load(tmp_path / "parts" / "linear.pt", weights_only=True)
    assert whole["step"] == parts["step"] == 40
    for group in ("module", "average"):
        for name, value in whole[group].items():
            assert torch.equal(value, parts[group][name])
    torch.testing.assert_close(exported["linear"], whole["average"], atol=0, rtol=0)


def test_the_rate_warms_up_stays_and_falls():
    settings = train.Run("linear", 64 * 10_000, learning_rate=1.0)
    assert settings.rate(0) == pytest.approx(1 / 200)
    assert settings.rate(199) == settings.rate(5000) == settings.rate(7999) == 1.0
    assert settings.rate(9000) == pytest.approx(0.5)
    assert settings.rate(9999) == pytest.approx(0.02)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="multiple of 2 processes"):
        train.Run("linear", 100, batch=3)


def test_the_replica_brings_float32_gradients_to_the_master():
    torch.manual_seed(0)
    module = losses.TextToImage("cpu")
    noisy, target = torch.randn(2, 4, 4, 16, 16)
    timestep, tokens = torch.tensor([3, 200, 500, 990]), torch.randint(0, 240, (4, 24))

    def gradients():
        module.zero_grad()
        functional.mse_loss(module(noisy, timestep, tokens), target).backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    half = gradients()
    replica, module.replica = module.replica, None
    velocity = module.unet(noisy, timestep, module.text_encoder(tokens)[0], return_dict=False)[0]
    module.zero_grad()
    functional.mse_loss(velocity, target).backward()
    full = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert half.dtype == torch.float32 and half.shape == full.shape
    assert (half - full).norm() < 0.05 * full.norm()

    module.replica = replica
    before = module(noisy, timestep, tokens)
    with torch.no_grad():
        module.unet.conv_out.weight.mul_(2)
        assert module.unet.conv_out.bias is not None
        module.unet.conv_out.bias.mul_(2)
    torch.testing.assert_close(module(noisy, timestep, tokens), 2 * before, atol=0.02, rtol=0.02)


def test_shipped_weights_do_not_say_where_they_were_made():
    written = [path.read_text("utf-8") for path in weights.FOLDER.rglob("*.json")]
    assert len(written) > 5
    assert not any("_name_or_path" in text or "/tmp" in text for text in written)
