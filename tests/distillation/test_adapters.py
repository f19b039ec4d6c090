"""Guidance adapters, few-step students in a pipeline, and smaller students: what they change and what they leave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.distillation.adapters import AdaptedGuidance, Adapters, GuidanceAdapter, Guided, adapted, read
from fastdiff.distillation.compression import Compression, prune, self_attentions
from fastdiff.distillation.diffusers_networks import as_network
from fastdiff.distillation.few_step import FewStep
from fastdiff.distillation.networks import Batch, Levels, Networks
from fastdiff.distillation.phased import Phased
from fastdiff.distillation.trainer import Settings, distil
from fastdiff.miniature import untrained
from fastdiff.miniature.families import family

SETTINGS = Settings(steps=2, batch=2, rank=2, learning_rate=0.05, warmup=1, seed=3)


class Noise:
    """Latents without meaning."""

    def __init__(self, channels: int = 4):
        self.channels = channels

    def take(self, step: int, rank: int, batch: int) -> tuple[Tensor, list[str], torch.Generator]:
        generator = torch.Generator().manual_seed(step * 8 + rank)
        return torch.randn(batch, self.channels, 16, 16, generator=generator), ["a red circle"] * batch, generator


def _pipe(name: str) -> Any:
    pipe = untrained() if name == "sd" else family(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, **options: Any) -> Tensor:
    given = {"guidance_scale": 5.0, "num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
    given |= options
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **given).images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of two families after two steps of training."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = replace(SETTINGS, rank=0, adapter=12)
    return {
        name: distil(_pipe(name), AdaptedGuidance(), Noise(channels), settings, folder / name)
        for name, channels in (("sd", 4), ("sd3", 16))
    }


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_new_adapters_change_nothing_at_any_scale(name: str):
    denoiser = _pipe(name).components["unet" if name == "sd" else "transformer"]
    adapters = Adapters.of(denoiser)
    x = torch.randn(2, 4 if name == "sd" else 16, 16, 16)
    given: dict[str, Any] = {"timestep": torch.tensor([900.0, 3.0])}
    width = denoiser.config["cross_attention_dim" if name == "sd" else "joint_attention_dim"]
    given["encoder_hidden_states"] = torch.randn(2, 24, width)
    if name == "sd3":
        given["pooled_projections"] = torch.randn(2, denoiser.config["pooled_projection_dim"])
    before = denoiser(x, **given, return_dict=False)[0]
    guided = Guided(denoiser, adapters)
    for scale in (1.0, 7.5):
        made = guided(x, guidance_scale=torch.full((2,), scale), **given, return_dict=False)[0]
        assert torch.equal(made, before)
    assert list(guided.parameters()) == list(adapters.parameters())
    with torch.no_grad():
        layer: Any = next(iter(adapters.layers.values()))
        layer.out.weight.normal_()
    scales = [guided(x, guidance_scale=torch.full((2,), s), **given, return_dict=False)[0] for s in (1.0, 7.5)]
    assert not torch.equal(scales[0], before)
    assert not torch.equal(*scales)


def test_the_loss_at_scale_one_begins_at_nothing():
    pipe = _pipe("sd")
    levels = Levels.of(pipe.scheduler)
    student = Guided(pipe.unet, Adapters.of(pipe.unet))
    plain = as_network(_pipe("sd").unet, levels)
    network = as_network(student, levels)
    nets = Networks(levels, network, plain, network)
    latents, _, generator = Noise().take(0, 0, 2)
    words = {"encoder_hidden_states": torch.randn(2, 24, 128)}
    one = Batch(latents, words, {name: torch.zeros_like(value) for name, value in words.items()}, generator)
    assert AdaptedGuidance(scales=(1.0, 1.0)).loss(nets, one, nn.ModuleDict()) < 1e-10
    assert AdaptedGuidance(scales=(5.0, 5.0)).loss(nets, one, nn.ModuleDict()) > 1e-6


def test_adapters_begin_with_another_students(trained: dict[str, Path], tmp_path: Path):
    still = replace(SETTINGS, rank=0, adapter=12, learning_rate=0.0)
    again = distil(_pipe("sd"), AdaptedGuidance(), Noise(), still, tmp_path / "again", start=trained["sd"])
    before, after = (read(folder).state_dict() for folder in (trained["sd"], again))
    assert any(value.abs().max() > 0 for name, value in before.items() if "out" in name)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="gone on from"):
        distil(_pipe("sd"), AdaptedGuidance(), Noise(), replace(still, adapter=6), tmp_path / "b", start=trained["sd"])


def test_adapters_are_a_small_part_of_the_embedded_model():
    unet = untrained().unet
    count = sum(value.numel() for value in Adapters.of(unet).parameters())
    assert count < 0.05 * sum(value.numel() for value in unet.parameters())
    assert len(list(adapted(unet))) == 10


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_adapter_halves_the_rows_and_comes_off(name: str, trained: dict[str, Path]):
    pipe = _pipe(name)
    denoiser = pipe.components["unet" if name == "sd" else "transformer"]
    rows: list[int] = []
    watch = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    before, plain = _draw(pipe), list(rows)
    member = GuidanceAdapter(str(trained[name]))
    with fastdiff.accelerate(pipe, member, strict=True):
        rows.clear()
        weak, strong = _draw(pipe, guidance_scale=1.5), _draw(pipe, guidance_scale=7.5)
        assert rows == [1] * 6
        assert plain == [2] * 3
        assert not torch.equal(weak, strong)
        assert torch.equal(strong, _draw(pipe, guidance_scale=7.5))
    assert torch.equal(_draw(pipe), before)
    with fastdiff.accelerate(pipe, member) as handle:
        assert torch.equal(_draw(pipe, negative_prompt="a blue square"), _unguided(name, "a blue square"))
        assert "negative prompt" in str(handle.report())
    watch.remove()


def _unguided(name: str, words: str) -> Tensor:
    return _draw(_pipe(name), negative_prompt=words)


def test_students_of_other_weights_are_refused(trained: dict[str, Path], tmp_path: Path):
    other = untrained(seed=5)
    with pytest.raises(fastdiff.Unsupported, match="other weights"):
        fastdiff.accelerate(other, GuidanceAdapter(str(trained["sd"])))
    with pytest.raises(fastdiff.Unsupported, match=r"student\.json are needed"):
        fastdiff.accelerate(other, FewStep(str(tmp_path)))
    with pytest.raises(fastdiff.Unsupported, match="other weights"):
        fastdiff.accelerate(other, FewStep())


@pytest.mark.parametrize(("name", "channels"), [("sd", 4), ("sd3", 16)])
def test_a_student_is_drawn_with_as_it_was_trained(name: str, channels: int, tmp_path: Path):
    pipe = _pipe(name)
    folder = distil(pipe, Phased(substeps=1), Noise(channels), SETTINGS, tmp_path / "student")
    before = _draw(pipe)
    told: list[float] = []
    denoiser = pipe.components["unet" if name == "sd" else "transformer"]
    watch = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(
            float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        ),
        with_kwargs=True,
    )
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    with fastdiff.accelerate(pipe, FewStep(str(folder)), strict=True):
        made = pipe(
            "a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", height=64, width=64
        )
        assert told == ([999, 749, 499, 249] if name == "sd" else [1000, 750, 500, 250])
        assert torch.isfinite(made.images).all()
        with pytest.raises(ValueError, match="takes 4 steps, not 3"):
            _draw(pipe)
    watch.remove()
    assert all(torch.equal(value, weights[key]) for key, value in denoiser.state_dict().items())
    assert torch.equal(_draw(pipe), before)
    # the same as loading the file the way diffusers documents
    with fastdiff.accelerate(pipe, FewStep(str(folder))):
        fused = denoiser.state_dict()["conv_in.weight" if name == "sd" else "pos_embed.proj.weight"].clone()
        assert torch.equal(fused, weights["conv_in.weight" if name == "sd" else "pos_embed.proj.weight"])
        ours = _draw(pipe, num_inference_steps=4, guidance_scale=1.0)
    from fastdiff.distillation.students import scheduler_of, steps_of

    plain = _pipe(name)
    takes = ("timesteps", "eta") if name == "sd" else ("sigmas",)
    given = steps_of(folder, plain.scheduler.config, 4, takes)
    plain.scheduler = scheduler_of(folder, plain.scheduler.config)
    plain.load_lora_weights(str(folder))
    torch.testing.assert_close(_draw(plain, guidance_scale=1.0, **given), ours, rtol=0, atol=2e-3)


@pytest.mark.parametrize("model", ["mini-sd", "mini-dit"])
def test_the_embedded_students_draw_what_is_asked(model: str):
    """The shipped four-step student gets the colour and place of a few captions right, at an eighth of the calls."""
    from fastdiff.miniature import detector

    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    words = [
        "a big red circle on the left on a plain white background",
        "a small blue square at the top on a plain gray background",
    ]
    with fastdiff.accelerate(pipe, FewStep(), strict=True):
        noise = [torch.Generator().manual_seed(index) for index in range(2)]
        made = pipe(words, generator=noise, output_type="np").images
    found = [detector.detect((picture * 255).round().astype("uint8")) for picture in made]
    assert [(one["colour"], one["position"], one["shape"]) for one in found] == [
        ("red", "left", "circle"),
        ("blue", "top", "square"),
    ]


def test_pruned_denoisers_keep_their_weights_and_load_again(tmp_path: Path):
    unet = family("sdxl").unet
    smaller = prune(unet, layers=1)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in unet.parameters())
    state = unet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in smaller.state_dict().items())
    smaller.save_pretrained(tmp_path)
    again = type(unet).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in smaller.state_dict().items())
    without = prune(untrained().unet, middle=True)
    assert without.mid_block is None
    dit = family("sd3").transformer
    fewer = prune(dit, keep=(0, 2))
    assert torch.equal(fewer.transformer_blocks[1].attn.to_q.weight, dit.transformer_blocks[2].attn.to_q.weight)
    for wrong in ((), (2, 0), (0, 7), (0, 1)):
        with pytest.raises(ValueError, match="keep"):
            prune(dit, keep=wrong)
    with pytest.raises(fastdiff.Unsupported, match="take out"):
        prune(untrained().unet)


def test_a_smaller_student_learns_from_the_whole(tmp_path: Path):
    pipe = _pipe("sd3")
    smaller = prune(pipe.transformer, keep=(0, 2))
    assert self_attentions(smaller, pipe.transformer) == {
        "transformer_blocks.0.attn": "transformer_blocks.1.attn",
        "transformer_blocks.1.attn": "transformer_blocks.2.attn",
    }
    losses: list[float] = []
    settings = replace(SETTINGS, steps=12, rank=0, learning_rate=2e-3)
    folder = distil(
        pipe,
        Compression(),
        Noise(16),
        settings,
        tmp_path / "small",
        lambda step, loss: losses.append(loss),
        student=smaller,
    )
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] == 2


def test_compression_of_the_whole_is_nothing_but_the_task():
    pipe = _pipe("sd")
    levels = Levels.of(pipe.scheduler)
    network = as_network(pipe.unet, levels)
    nets = Networks(levels, network, network, network, modules=(pipe.unet, pipe.unet))
    latents, _, generator = Noise().take(0, 0, 2)
    words = {"encoder_hidden_states": torch.randn(2, 24, 128)}
    one = Batch(latents, words, words, generator)
    assert Compression(task=0.0).loss(nets, one, nn.ModuleDict()) == 0
    assert Compression(task=1.0).loss(nets, one, nn.ModuleDict()) > 0
