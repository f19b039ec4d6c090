"""diffusers' caches with our guards: schedules with known answers, rows on their own, crashes foreseen."""

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.caching.diffusers_cache import DiffusersCache, refusal
from fastdiff.miniature.families import family


@pytest.fixture(scope="module")
def pipe():
    torch.set_num_threads(1)
    pipe = family("flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=10, **more):
    return pipe(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=steps,
        max_sequence_length=24,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images


def pattern(pipe, cache: DiffusersCache, steps: int = 10) -> str:
    """C for a step that computed the last block, - for one that did not."""
    steps_seen, ran = [], []
    inner = pipe.transformer.single_transformer_blocks[-1].attn.to_q
    mark = inner.register_forward_hook(lambda *arguments: ran.append(1))
    before = pipe.transformer.register_forward_pre_hook(lambda *arguments: ran.clear())
    after = pipe.transformer.register_forward_hook(lambda *arguments: steps_seen.append("C" if ran else "-"))
    try:
        with fastdiff.accelerate(pipe, cache) as handle:
            run(pipe, steps)
            assert handle.report().rows[0].accelerated == steps_seen.count("-")
    finally:
        for each in (mark, before, after):
            each.remove()
    return "".join(steps_seen)


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (DiffusersCache(threshold=1e9, warm_up=2, max_run=3), "CC---C---C"),
        (DiffusersCache(threshold=1e9, warm_up=3, max_run=1), "CCC-C-C-CC"),
        (DiffusersCache(threshold=1e9, max_run=0), "CCCCCCCCCC"),
        (DiffusersCache(method="taylorseer", warm_up=2, interval=3), "CC--C--C-C"),
        (DiffusersCache(method="pyramid_attention", warm_up=3, interval=2), "CCC-C-C-CC"),
        (DiffusersCache(method="mag", ratios=(1.0,) * 10, warm_up=2, max_run=2), "CC--C--C-C"),
        (DiffusersCache(method="mag", ratios=(1.0,) * 7, warm_up=2), "CCCCCCCCCC"),
    ],
    ids=lambda value: f"{value.method}" if isinstance(value, DiffusersCache) else value,
)
def test_computes_exactly_when_warm_up_run_interval_and_last_step_say(pipe, cache, expected):
    assert pattern(pipe, cache) == expected


@pytest.mark.parametrize(
    "cache",
    [DiffusersCache(threshold=0.0), DiffusersCache(method="taylorseer", interval=1), DiffusersCache(max_run=0)],
    ids=["threshold 0", "interval 1", "run 0"],
)
def test_what_never_skips_is_bit_exact(pipe, cache):
    plain = run(pipe)
    with fastdiff.accelerate(pipe, cache):
        assert torch.equal(run(pipe), plain)


def test_rows_decide_for_themselves_within_one_batch(pipe):
    denoiser, _, kwargs = capture(pipe, 32, 32)
    still = torch.zeros(8)
    wild = torch.tensor([0.0, 1, -1, 2, -2, 3, -3, 4])

    def rows(picked: list[int]) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad(), handle.request():
            for step in range(8):
                shift = torch.stack([still[step], wild[step]])[picked].view(-1, 1, 1)
                call = {
                    name: value.expand(len(picked), *value.shape[1:])
                    if isinstance(value, torch.Tensor) and not name.endswith("ids")
                    else value
                    for name, value in kwargs.items()
                }
                outputs.append(denoiser(**{**call, "hidden_states": call["hidden_states"] + shift})[0])
        return outputs

    with fastdiff.accelerate(pipe, DiffusersCache(threshold=0.02, warm_up=2)) as handle:
        still_alone, wild_alone, together = rows([0]), rows([1]), rows([0, 1])
        assert handle.report().rows[0].accelerated > 0
    for both, first, second in zip(together, still_alone, wild_alone, strict=True):
        torch.testing.assert_close(both[:1], first, rtol=0, atol=1e-5)
        torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-5)


def test_separate_guidance_with_equal_words_keeps_two_branches(pipe):
    cache = DiffusersCache(method="taylorseer", warm_up=2)
    with fastdiff.accelerate(pipe, cache) as handle:
        single = run(pipe)
        once = handle.report().rows[0].seen
        double = run(pipe, true_cfg_scale=2.0, negative_prompt="a red circle")
        assert handle.report().rows[0].seen == 3 * once
    torch.testing.assert_close(double, single, rtol=0, atol=1e-4)


def test_a_call_outside_of_any_request_computes(pipe):
    denoiser, args, kwargs = capture(pipe, 32, 32)
    with torch.no_grad():
        plain = denoiser(*args, **kwargs)[0]
        with fastdiff.accelerate(pipe, DiffusersCache(threshold=1e9)) as handle:
            for _ in range(6):
                assert torch.equal(denoiser(*args, **kwargs)[0], plain)
            assert handle.report().rows[0].accelerated == 0
            assert handle.report().rows[0].bytes_held == 0


def test_memory_is_reported_while_held_and_gone_afterwards(pipe):
    held = []
    with fastdiff.accelerate(pipe, DiffusersCache(threshold=1e9)) as handle:
        run(pipe, callback_on_step_end=lambda *arguments: held.append(handle.report().rows[0].bytes_held) or {})
        assert min(held) > 0
        assert handle.report().rows[0].bytes_held == 0


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("sd", "first_block", "no list of transformer blocks"),
        ("sd", "mag", "no list of transformer blocks"),
        ("sd3", "first_block", "returns no text stream"),
        ("pixart", "first_block", ""),
        ("flux", "first_block", ""),
        ("sdxl", "pyramid_attention", ""),
    ],
)
def test_diffusers_crashes_are_foreseen(name: str, method: str, reason: str):
    pipe = family(name)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert reason in refusal(denoiser, method)
    assert bool(reason) == bool(refusal(denoiser, method))


def test_another_cache_is_not_doubled():
    from diffusers import FirstBlockCacheConfig

    pipe = family("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(fastdiff.Unsupported, match=r"call disable_cache\(\) first"):
        fastdiff.accelerate(pipe, DiffusersCache())
