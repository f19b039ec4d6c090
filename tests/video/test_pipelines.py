"""Diffusers' video pipelines as they are: accelerations act on each and leave no trace."""

import pytest
import torch

import fastdiff
from fastdiff.anatomy import anatomy
from fastdiff.caching.block_residual import BlockResidual
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.caching.forecast import Forecast
from fastdiff.miniature.video_families import BUILDERS, inputs, video_family
from fastdiff.runtime.precision import Precision
from fastdiff.runtime.prompt_cache import PromptCache
from fastdiff.runtime.slicing import SlicedInference
from fastdiff.runtime.tiny_decoder import TinyDecoder
from fastdiff.sampling.steps import StepBudget

STEPS = 4
MEMBERS = {
    "bfloat16": Precision("bfloat16", "contiguous"),
    "sliced": SlicedInference(2),
    "forecast": Forecast(warm_up=2),
    "residual": BlockResidual(keep=0, warm_up=2),
    "first block": DiffusersCache(threshold=0.5, warm_up=2),
    "prompts": PromptCache(),
    "steps": StepBudget(3),
}


def clip(pipe, name, **changes):
    given = inputs(name) | {"num_inference_steps": STEPS} | changes
    return pipe(**given, generator=torch.Generator().manual_seed(0), output_type="pt").frames


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", BUILDERS)
def test_acts_says_so_and_leaves_no_trace(name, member):
    pipe = video_family(name)
    clip(pipe, name)
    plain = clip(pipe, name)
    one = MEMBERS[member]
    verdict = one.supports(pipe)
    if not verdict:
        assert verdict.reason
        with pytest.raises(fastdiff.Unsupported):
            fastdiff.accelerate(pipe, fastdiff.Plan([one]))
        return
    with fastdiff.accelerate(pipe, fastdiff.Plan([one])) as handle:
        made = clip(pipe, name)
        again = clip(pipe, name)
        assert made.shape == plain.shape
        assert torch.equal(made, again)
        if one.exact and member != "bfloat16":
            torch.testing.assert_close(made, plain, atol=1e-4, rtol=0)
        assert type(one).__name__ in str(handle.report())
    assert torch.equal(clip(pipe, name), plain)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_exact_preset_changes_no_clip(name):
    pipe = video_family(name)
    plain = clip(pipe, name)
    with fastdiff.accelerate(pipe, fastdiff.Plan.preset("exact")):
        torch.testing.assert_close(clip(pipe, name), plain, atol=1e-4, rtol=0)


def test_the_tiny_decoder_of_images_serves_videos_made_of_them():
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    pipe = video_family("animatediff")
    plain = clip(pipe, "animatediff")
    with fastdiff.accelerate(pipe, fastdiff.Plan([TinyDecoder(tiny)])):
        assert clip(pipe, "animatediff").shape == plain.shape
    assert torch.equal(clip(pipe, "animatediff"), plain)


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox", "hunyuan", "svd", "helios"])
def test_no_tiny_decoder_is_published_for_the_others(name):
    verdict = TinyDecoder().supports(video_family(name))
    assert not verdict
    assert anatomy(video_family(name)).vae is not None
