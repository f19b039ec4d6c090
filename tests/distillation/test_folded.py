"""One text token in the place of many that are all alike: the same numbers, and copies that keep doing it."""

import copy
from typing import Any

import pytest
import torch

from fastdiff.distillation.folded import ZEROS, FoldedAttention, folded, folds
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
    short = folded(transformer)
    lengths = []
    short.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(short(**given).sample, expected, rtol=1e-10, atol=1e-12)
    assert lengths == [words + 1]
    assert not any(isinstance(one, FoldedAttention) for one in transformer.attn_processors.values()), "a copy folds"


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


def test_a_prompt_that_does_not_end_in_zeros_is_refused(transformer):
    given = call(24) | {"encoder_hidden_states": torch.ones(2, 24 + ZEROS, WIDTH, dtype=torch.float64)}
    with pytest.raises(ValueError, match="must be zeros"):
        folded(transformer)(**given)


def test_only_pipelines_without_t5_fold(transformer):
    parts = weights.load_parts()
    pipe: Any = flow.pipeline(weights.load_autoencoder(), parts["text_encoder"], flow.transformer())
    assert folds(pipe)
    pipe.text_encoder_3 = object()
    assert not folds(pipe)
    pipe.text_encoder_3 = None
    pipe.transformer.set_attn_processor(FoldedAttention())
    assert not folds(pipe), "another processor has been put in: its tokens stay as they are"
