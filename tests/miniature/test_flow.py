"""`mini-dit`'s training: the velocity it learns is the flow's, and a step of it reaches every block."""

from typing import Any

import pytest
import torch

from fastdiff.miniature import flow, losses, models, train, weights

MEAN, SPREAD = 0.7, 1.3


class Gaussian:
    """The best v-prediction for latents that are all of one normal distribution."""

    dtype = torch.float32

    def __init__(self):
        alphas = models.scheduler().alphas_cumprod.double()
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()

    def to(self, *_):
        return self

    eval = to
    requires_grad_ = to

    def __call__(self, seen, timestep, text, return_dict=False):
        signal, noise = (value[timestep].view(-1, 1, 1, 1) for value in (self.signal, self.noise))
        clean = MEAN + signal * SPREAD**2 / (signal**2 * SPREAD**2 + noise**2) * (seen.double() - signal * MEAN)
        eps = (seen.double() - signal * clean) / noise
        return (signal * eps - noise * clean,)


def expected(x, sigma):
    """The mean of noise minus data at a state of the flow, in closed form."""
    x, sigma = x.double(), sigma.double().view(-1, 1, 1, 1)
    gain = (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
    clean = MEAN + gain * (x - (1 - sigma) * MEAN)
    return (x - clean) / sigma


def states(sigma, count):
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + SPREAD * torch.randn(count, 4, 8, 8, generator=generator)
    asked = torch.full((count,), sigma) if isinstance(sigma, float) else sigma
    velocity = flow.Velocity(Gaussian(), "cpu")
    return asked, velocity, velocity(clean, asked, torch.zeros(count, 1, 1), generator)


def test_on_the_teachers_schedule_it_is_the_flows_velocity():
    asked, velocity, (x, sigma, made) = states(torch.rand(256, generator=torch.Generator().manual_seed(1)) * 0.93, 256)
    torch.testing.assert_close(made.double(), expected(x, sigma), rtol=1e-4, atol=1e-4)
    assert (sigma >= asked).all(), "moved to the next timestep, never to the one before"
    known = velocity.sigmas.float()
    assert all((known - value).abs().min() < 1e-6 for value in sigma)


@pytest.mark.parametrize("sigma", [0.97, 1.0])
def test_beyond_it_the_mean_is_right(sigma):
    """One estimate scatters there; what it scatters around is the flow's velocity, wherever the state is."""
    _, velocity, (x, told, made) = states(sigma, 4096)
    assert sigma > velocity.sigmas[-1]
    assert (told == torch.tensor(sigma)).all()
    off, place = (made.double() - expected(x, told)).flatten(), x.double().flatten()
    for weight in (torch.ones_like(place), place):
        product = off * weight
        assert product.mean().abs() < 4 * product.std() / len(product) ** 0.5
    assert abs(x.var().item() - ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)) < 0.02


def test_sigmas_fill_the_range_and_dwell_on_noise():
    drawn = flow.sigmas(256, torch.Generator().manual_seed(0)).sort().values
    assert drawn[0] >= 0 and drawn[-1] <= 1
    assert drawn.diff().max() < 0.02
    assert 0.6 < (drawn > 0.75).float().mean() < 0.65


def test_the_pipeline_reads_what_the_text_encoder_of_mini_sd_learned():
    parts = weights.load_parts()
    pipe: Any = flow.pipeline(weights.load_autoencoder(), parts["text_encoder"], flow.transformer())
    prompt, _, _, _ = pipe.encode_prompt("a big red ring", None, None, device="cpu", do_classifier_free_guidance=False)
    ids = pipe.tokenizer("a big red ring", padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = parts["text_encoder"](ids, output_hidden_states=True).hidden_states
    told = prompt[:, : ids.shape[1], : 2 * models.TEXT_WIDTH]
    torch.testing.assert_close(told, torch.cat([layers[2], layers[1]], dim=-1))


def test_a_step_of_training_reaches_every_block_and_comes_back_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(losses, "_POOL", 8)
    run = train.Run("mini-dit", images=40, batch=4, processes=1, folder=tmp_path)
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        module, loss = flow.mini_dit(run)
        value = loss(1, 0, 4)
        value.backward()
        values.append(value.item())
    assert values[0] == values[1] > 0
    silent = [name for name, p in module.named_parameters() if p.grad is None]
    assert all("context_embedder" not in name and "attn.to_q" not in name for name in silent), silent
    learned = {name.split(".")[1] for name, p in module.named_parameters() if "blocks" in name and p.grad is not None}
    assert learned == {str(number) for number in range(5)}
