"""Embeddings by content: the same words hit, and any change of what they depend on misses."""

import pytest
import torch

import fastdiff
from fastdiff.miniature.families import family
from fastdiff.runtime.prompt_cache import PromptCache


@pytest.fixture
def pipe():
    torch.set_num_threads(1)
    return family("sd")


def encode(pipe, prompt="a red circle", guided=True, **more):
    return pipe.encode_prompt(prompt, torch.device("cpu"), 1, guided, "", **more)


def hits(handle) -> int:
    return handle.report().rows[0].accelerated


def test_the_same_words_are_encoded_once_whatever_string_holds_them(pipe):
    plain = encode(pipe)
    with fastdiff.accelerate(pipe, PromptCache()) as handle:
        encode(pipe)
        again = encode(pipe, "".join(["a red ", "circle"]))
        assert hits(handle) == 1
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
        again[0].zero_()
        assert torch.equal(encode(pipe)[0], plain[0])
        assert handle.report().rows[0].bytes_held == sum(tensor.nbytes for tensor in plain)


def test_any_other_argument_is_another_entry(pipe):
    with fastdiff.accelerate(pipe, PromptCache()) as handle:
        encode(pipe)
        encode(pipe, "a blue circle")
        encode(pipe, guided=False)
        pipe.encode_prompt("a red circle", torch.device("cpu"), 2, True, "")
        pipe.encode_prompt(["a red circle"], torch.device("cpu"), 1, True, [""])
        assert hits(handle) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(1.5),
        lambda weight: weight.data[3, 5].add_(0.01),
        lambda weight: weight.data.copy_(weight.data.flip(0)),
        lambda weight: weight.data.copy_(weight.data.flip(1)),
        lambda weight: weight.data.neg_(),
    ],
)
def test_weights_changed_in_place_are_noticed_without_a_version(pipe, change):
    weight = pipe.text_encoder.get_parameter(_a_weight(pipe))
    with fastdiff.accelerate(pipe, PromptCache()) as handle:
        before = encode(pipe)[0]
        change(weight)
        after = encode(pipe)[0]
        assert hits(handle) == 0
        assert not torch.equal(before, after)


def _a_weight(pipe) -> str:
    return next(name for name, _ in pipe.text_encoder.named_parameters() if name.endswith("q_proj.weight"))


def test_a_lora_and_its_strength_are_noticed(pipe):
    from peft import LoraConfig

    with fastdiff.accelerate(pipe, PromptCache()) as handle:
        encode(pipe)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        with_lora = encode(pipe)[0]
        assert hits(handle) == 0
        for part in pipe.text_encoder.modules():
            if isinstance(getattr(part, "scaling", None), dict):
                part.scaling["default"] = 0.0
        without = encode(pipe)[0]
        assert hits(handle) == 0
        assert not torch.equal(with_lora, without)


def test_embeddings_and_training_pass_through(pipe):
    with fastdiff.accelerate(pipe, PromptCache()) as handle:
        embeddings = encode(pipe)[0]
        for _ in range(2):
            pipe.encode_prompt(None, torch.device("cpu"), 1, False, prompt_embeds=embeddings)
        pipe.text_encoder.train()
        encode(pipe)
        encode(pipe)
        assert hits(handle) == 0


def test_the_least_recently_used_goes_first(pipe):
    size = sum(tensor.nbytes for tensor in encode(pipe))
    with fastdiff.accelerate(pipe, PromptCache(max_bytes=2 * size)) as handle:
        for prompt in ("one", "two", "one", "three", "one"):
            encode(pipe, f"{prompt} circle")
        assert hits(handle) == 2
        encode(pipe, "two circle")
        assert hits(handle) == 2
        assert handle.report().rows[0].bytes_held == 2 * size
