"""Guidance in an interval: outside it the call is exactly the unguided one, at half the rows."""

from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.miniature.families import family
from fastdiff.sampling.interval import GuidanceInterval
from fastdiff.sampling.told import level_of


def _run(pipe: Any, **settings: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = dict(height=32, width=32, num_inference_steps=6, output_type="latent")
    if "PixArt" in type(pipe).__name__:
        given |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    made = pipe("a red circle", generator=torch.Generator().manual_seed(3), **{**given, **settings})
    return made.images.clone()


def _rows(pipe: Any) -> list[int]:
    """Grows with the rows that every denoiser call really computes."""
    rows: list[int] = []
    first = pipe.unet.conv_in if hasattr(pipe, "unet") else pipe.transformer.x_embedder
    first.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_outside_the_interval_it_is_the_unguided_call(kind: str):
    pipe: Any = family(kind)
    unguided = _run(pipe, guidance_scale=1.0)
    guided = _run(pipe, guidance_scale=4.0)
    with fastdiff.accelerate(pipe, GuidanceInterval(0.0, 1e-9)) as handle:
        found = _run(pipe, guidance_scale=4.0)
        row = handle.report().rows[0]
    torch.testing.assert_close(found, unguided, rtol=0, atol=2e-4)
    assert not torch.allclose(found, guided, atol=1e-2)
    assert row.seen == row.accelerated == 6
    with fastdiff.accelerate(pipe, GuidanceInterval(0.0, 1.0)) as handle:
        assert torch.equal(_run(pipe, guidance_scale=4.0), guided)
        assert handle.report().rows[0].accelerated == 0


def test_a_middle_interval_calls_both_branches_only_there():
    pipe: Any = family("sd")
    with fastdiff.accelerate(pipe, GuidanceInterval(0.4, 0.8)):
        rows = _rows(pipe)
        _run(pipe, guidance_scale=4.0)
    pipe.scheduler.set_timesteps(6)
    levels = [level_of(pipe.scheduler, float(time)) for time in pipe.scheduler.timesteps]
    assert rows == [2 if 0.4 < level <= 0.8 else 1 for level in levels]
    assert set(rows) == {1, 2}


@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_without_guidance_or_outside_of_a_pipeline_nothing_is_left_out(kind: str):
    pipe: Any = family(kind)
    plain = _run(pipe, guidance_scale=1.0)
    with fastdiff.accelerate(pipe, GuidanceInterval(0.0, 1e-9)) as handle:
        assert torch.equal(_run(pipe, guidance_scale=1.0), plain)
        assert handle.report().rows[0].accelerated == 0


def test_a_stream_of_two_rows_is_not_taken_for_two_branches():
    pipe: Any = family("sd")
    generator = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 128, generator=generator)
    with torch.no_grad():
        expected = pipe.unet(x, 900, encoder_hidden_states=words).sample
        with fastdiff.accelerate(pipe, GuidanceInterval(0.0, 1e-9)) as handle, handle.request():
            assert torch.equal(pipe.unet(x, 900, encoder_hidden_states=words).sample, expected)


def test_two_calls_for_two_branches_become_one():
    pipe: Any = family("flux")
    pipe.transformer.register_to_config(guidance_embeds=False)
    pipe.transformer.time_text_embed = diffusers.models.embeddings.CombinedTimestepTextProjEmbeddings(32, 32)
    words = {"guidance_scale": 0.0, "true_cfg_scale": 4.0, "negative_prompt": "blue"}
    unguided = _run(pipe, guidance_scale=0.0, max_sequence_length=24)
    guided = _run(pipe, **words, max_sequence_length=24)
    with fastdiff.accelerate(pipe, GuidanceInterval(0.0, 1e-9)) as handle:
        rows = _rows(pipe)
        found = _run(pipe, **words, max_sequence_length=24)
        row = handle.report().rows[0]
    assert torch.equal(found, unguided)
    assert not torch.allclose(guided, unguided, atol=1e-3)
    assert len(rows) == 6
    assert (row.seen, row.accelerated) == (12, 6)


def test_levels_are_those_of_the_schedule():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert level_of(flow, 250.0) == level_of(flow, 0.25) == 0.25
    vp = diffusers.DDIMScheduler()
    for time in (0, 17, 999):
        product = float(vp.alphas_cumprod[time])
        signal, noise = product**0.5, (1 - product) ** 0.5
        assert level_of(vp, float(time)) == pytest.approx(noise / (signal + noise), abs=1e-12)
    assert level_of(vp, 10.0) < level_of(vp, 10.5) < level_of(vp, 11.0)


def test_it_says_where_it_cannot_act():
    assert "as a number" in GuidanceInterval().supports(family("flux")).reason
    for wrong in ({"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.5}):
        with pytest.raises(ValueError, match="GuidanceInterval"):
            GuidanceInterval(**wrong)
    from fastdiff.caching.diffusers_cache import DiffusersCache

    with pytest.raises(ValueError, match="both branches"):
        fastdiff.Plan((DiffusersCache(), GuidanceInterval()))
