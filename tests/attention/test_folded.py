"""One text token in the place of many that are all alike: the same numbers, and copies that keep doing it."""

import copy
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

import fastdiff
from fastdiff.attention.folded import ZEROS, FoldedAttention, FoldedText, alike, folded
from fastdiff.miniature import flow, models, weights

WIDTH = 2 * models.TEXT_WIDTH


def call(words: int, zeros: int = ZEROS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(words)
    text = torch.randn(2, words, WIDTH, generator=generator, dtype=torch.float64)
    return {
        "hidden_states": torch.randn(2, 4, 10, 6, generator=generator, dtype=torch.float64),
        "timestep": torch.tensor([300.0, 900.0], dtype=torch.float64),
        "encoder_hidden_states": torch.cat([text, text.new_zeros(2, zeros, WIDTH)], dim=1),
        "pooled_projections": torch.randn(2, WIDTH, generator=generator, dtype=torch.float64),
    }


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return flow.transformer().double().eval()


@pytest.mark.parametrize("words", [1, 24, 77])
@torch.no_grad()
def test_one_token_stands_for_the_zeros(transformer, words):
    given = call(words)
    expected = transformer(**given).sample
    short: Any = folded(transformer)
    lengths = []
    short.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(short(**given).sample, expected, rtol=1e-10, atol=1e-12)
    assert lengths == [words + 1]
    assert not any(isinstance(one, FoldedAttention) for one in transformer.attn_processors.values()), "a copy folds"


@torch.no_grad()
def test_blocks_that_attend_to_the_picture_a_second_time_fold_too():
    """Stable Diffusion 3.5 medium has them; their second attention knows no text."""
    torch.manual_seed(0)
    kind: Any = SD3Transformer2DModel
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}
    widths = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "caption_projection_dim": 32}
    made = kind(sample_size=16, pos_embed_max_size=32, dual_attention_layers=(0, 1), **sizes, **widths).double().eval()
    torch.testing.assert_close(folded(made)(**call(7)).sample, made(**call(7)).sample, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_copy_of_the_copy_folds_by_its_own_weights(transformer):
    first = folded(transformer)
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        parameter.mul_(0.9)
    given = call(24)
    plain = copy.deepcopy(transformer)
    plain.load_state_dict(second.state_dict())
    torch.testing.assert_close(second(**given).sample, plain(**given).sample, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(second(**given).sample, first(**given).sample)


def test_gradients_are_those_of_the_whole_prompt(transformer):
    given = call(24)
    made = {}
    for name, module in (("plain", copy.deepcopy(transformer)), ("folded", folded(transformer))):
        module(**given).sample.square().mean().backward()
        made[name] = {key: value.grad for key, value in module.named_parameters()}
    for key, expected in made["plain"].items():
        if expected is not None:
            torch.testing.assert_close(made["folded"][key], expected, rtol=1e-8, atol=1e-14, msg=key)


def test_a_prompt_that_does_not_end_in_zeros_is_left_as_it_is(transformer):
    given = call(24) | {"encoder_hidden_states": torch.ones(2, 24 + ZEROS, WIDTH, dtype=torch.float64)}
    with torch.no_grad():
        torch.testing.assert_close(folded(transformer)(**given).sample, transformer(**given).sample)


def test_tokens_are_alike_where_all_rows_end_in_zeros():
    text = torch.zeros(2, 9, 4)
    assert alike(text) == 9
    text[0, 2, 1] = 1.0
    assert alike(text) == 6
    text[1, 7, 3] = -1.0
    assert alike(text) == 1
    text[1, 8, 0] = 1e-30
    assert alike(text) == 0


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(1)
    parts = weights.load_parts()
    made: Any = flow.pipeline(weights.load_autoencoder(), parts["text_encoder"], flow.transformer())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, num_inference_steps=3, output_type="latent", **more).images


def test_a_pipeline_draws_the_same_with_a_fraction_of_the_tokens(pipe):
    words = {"prompt": ["a red circle", "a big blue ring"], "guidance_scale": 4.0}
    expected = draw(pipe, **words)
    lengths = []
    kept = list(pipe.transformer.attn_processors.values())
    with fastdiff.accelerate(pipe, FoldedText(), strict=True) as handle:
        first = pipe.transformer.transformer_blocks[0]
        hook = first.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[:2]), with_kwargs=True
        )
        made = draw(pipe, **words)
        hook.remove()
        assert handle.report().rows[0].accelerated == 3
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert lengths == [(4, 25)] * 3
    assert list(pipe.transformer.attn_processors.values()) == kept
    torch.testing.assert_close(draw(pipe, **words), expected, rtol=0, atol=0)


def test_own_embeddings_without_zeros_are_left_as_they_are_and_it_says_so(pipe):
    own = {"prompt_embeds": torch.randn(1, 30, WIDTH), "pooled_prompt_embeds": torch.randn(1, WIDTH)}
    expected = draw(pipe, **own, guidance_scale=1.0)
    with fastdiff.accelerate(pipe, FoldedText()) as handle:
        torch.testing.assert_close(draw(pipe, **own, guidance_scale=1.0), expected, rtol=1e-4, atol=1e-4)
        row = handle.report().rows[0]
        assert row.accelerated == 0
        assert row.misses


def test_only_pipelines_without_t5_and_with_the_usual_processors_fold(pipe):
    assert FoldedText().supports(pipe)
    pipe.text_encoder_3 = object()
    assert "text_encoder_3=None" in FoldedText().supports(pipe).reason
    pipe.text_encoder_3 = None
    pipe.transformer.set_attn_processor(FoldedAttention())
    assert not FoldedText().supports(pipe), "another processor has been put in: its tokens stay as they are"
    assert not FoldedText().supports(fastdiff.load())


@torch.no_grad()
def test_words_written_into_the_same_tensor_are_seen(pipe):
    given = {name: value.float() for name, value in call(24).items()}
    changed = torch.randn(2, 24 + ZEROS, WIDTH, generator=torch.Generator().manual_seed(5))
    expected = pipe.transformer(**{**given, "encoder_hidden_states": changed}).sample
    with fastdiff.accelerate(pipe, FoldedText()) as handle, handle.request():
        pipe.transformer(**given)
        given["encoder_hidden_states"].copy_(changed)
        torch.testing.assert_close(pipe.transformer(**given).sample, expected, rtol=1e-4, atol=1e-5)
