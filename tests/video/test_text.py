"""A prompt's keys and values: never stale, and exact where padding is folded."""

import pytest
import torch

from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from tests.video.nets import latents, prompts, wan

TIME = torch.tensor([400.0])


def test_folded_padding_is_the_padding() -> None:
    net, x, embeds = wan(), latents(2, 2), prompts(2, length=5, padding=40)
    embeds[1, 3:] = 0
    plain = net(x, TIME.expand(2), embeds, return_dict=False)[0]
    short = net(x, TIME.expand(2), embeds[:, :5], return_dict=False)[0]
    with CausalWan(net) as causal:
        folded = causal(x, TIME.expand(2), Text(embeds))
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-5)
    assert not torch.allclose(short, plain, atol=1e-3)


def test_padding_may_be_said_instead_of_given() -> None:
    net, x, embeds = wan(), latents(1, 2), prompts(1, length=5, padding=40)
    with CausalWan(net) as causal:
        given = causal(x, TIME, Text(embeds))
        for shown in (0, 1, 7):
            said = Text(embeds[:, : 5 + shown], 40 - shown)
            torch.testing.assert_close(causal(x, TIME, said), given, rtol=0, atol=1e-6)
        other = Text(prompts(1, length=9, padding=3, seed=4), 33)
        both = causal(x.expand(2, -1, -1, -1, -1), TIME.expand(2), Text.joined([Text(embeds[:, :5], 40), other]))
        torch.testing.assert_close(both[:1], given, rtol=0, atol=1e-5)


def test_a_write_in_place_is_seen() -> None:
    net, x, embeds = wan(), latents(1, 2), prompts()
    with CausalWan(net) as causal:
        text = Text(embeds)
        before = causal(x, TIME, text)
        assert torch.equal(causal(x, TIME, text), before) and text.version == 1
        place = embeds.data_ptr()
        embeds.copy_(prompts(seed=3))
        assert embeds.data_ptr() == place
        torch.testing.assert_close(causal(x, TIME, text), causal(x, TIME, Text(prompts(seed=3))), rtol=0, atol=0)
        assert text.version == 2


def test_a_write_in_place_is_seen_in_inference_mode_too() -> None:
    net, x = wan(), latents(1, 2)
    with torch.inference_mode(), CausalWan(net) as causal:
        embeds = prompts() * 1
        assert embeds.is_inference()
        text = Text(embeds)
        causal(x, TIME, text)
        causal(x, TIME, text)
        assert text.version == 1
        embeds.copy_(prompts(seed=3))
        assert torch.equal(causal(x, TIME, text), causal(x, TIME, Text(prompts(seed=3))))


def test_new_weights_need_a_word() -> None:
    net, x = wan(), latents(1, 2)
    with CausalWan(net) as causal:
        text = Text(prompts())
        before = causal(x, TIME, text)
        net.blocks[0].attn2.to_v.weight.mul_(2)
        text.invalidate()
        assert not torch.equal(causal(x, TIME, text), before) and text.version == 2


def test_rows_may_have_prompts_of_their_own() -> None:
    net, x = wan(), latents(2, 2)
    one, other = Text(prompts(length=4)), Text(prompts(length=7, padding=3, seed=2))
    with CausalWan(net) as causal:
        both = causal(x, TIME.expand(2), Text.joined([one, Text(other.embeds[:, :7])]))
        padded = torch.nn.functional.pad(one.embeds, (0, 0, 0, 3))
        torch.testing.assert_close(both[:1], causal(x[:1], TIME, Text(padded)), rtol=0, atol=1e-5)
        torch.testing.assert_close(both[1:], causal(x[1:], TIME, Text(other.embeds[:, :7])), rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="2 prompts for 1 rows"):
            causal(x[:1], TIME, Text.joined([one, other]))


def test_embeddings_have_three_axes() -> None:
    with pytest.raises(ValueError, match=r"\[B, L, E\]"):
        Text(torch.zeros(3, 4))
