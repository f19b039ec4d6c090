"""The causal plug on random Wan transformers: three ways to the same output, and no trace of it afterwards."""

import threading
from typing import Any

import pytest
import torch

from fastdiff.acceleration import Unsupported
from fastdiff.miniature.families import family
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from tests.video.nets import latents, prompts, wan

CLOSE: Any = {"rtol": 0.0, "atol": 1e-5}
TIMES = torch.tensor([[900.0, 700.0, 500.0, 300.0, 100.0]])


def chunked(causal: CausalWan, x: torch.Tensor, times: torch.Tensor, text: Text, chunk: int = 1, **options):
    cache = causal.cache(len(x), x.shape[2], *x.shape[3:], **options)
    parts = []
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        parts.append(causal(x[:, :, part], times[:, part], text, cache=cache, commit=True))
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(("patch", "size"), [((1, 1, 1), 2), ((1, 2, 2), 4)])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_on_the_cache_are_one_forward_with_a_block_causal_mask(patch, size: int, chunk: int) -> None:
    net = wan(patch=patch)
    x, embeds = latents(2, 5, size), prompts(2)
    times = TIMES.expand(2, -1)
    with CausalWan(net) as causal:
        with causal.block_causal(chunk):
            whole = net(x, times, embeds, return_dict=False)[0]
        torch.testing.assert_close(chunked(causal, x, times, Text(embeds), chunk), whole, **CLOSE)
        torch.testing.assert_close(causal(x, times, Text(embeds), chunk=chunk), whole, **CLOSE)


def test_a_mask_over_one_chunk_is_the_plain_model() -> None:
    net, x, embeds = wan(), latents(2, 3), prompts(2)
    plain = net(x, torch.tensor([700.0, 20.0]), embeds, return_dict=False)[0]
    a_token = torch.tensor([700.0, 20.0])[:, None].expand(2, 12)
    with CausalWan(net) as causal:
        assert torch.equal(net(x, torch.tensor([700.0, 20.0]), embeds, return_dict=False)[0], plain)
        with causal.block_causal(chunk=3):
            for times in (torch.tensor([700.0, 20.0]), a_token[:, :3], a_token):
                torch.testing.assert_close(net(x, times, embeds, return_dict=False)[0], plain, **CLOSE)


def test_later_frames_change_nothing_and_earlier_ones_do() -> None:
    net, x, embeds = wan(), latents(1, 4), prompts()
    with CausalWan(net) as causal, causal.block_causal(2):
        before = net(x, TIMES[:, :4], embeds, return_dict=False)[0]
        later, earlier = x.clone(), x.clone()
        later[:, :, 2:] += 1
        earlier[:, :, :2] += 1
        changed = net(later, TIMES[:, :4], embeds, return_dict=False)[0]
        assert torch.equal(changed[:, :, :2], before[:, :, :2]) and not torch.equal(changed[:, :, 2:], before[:, :, 2:])
        assert not torch.allclose(net(earlier, TIMES[:, :4], embeds, return_dict=False)[0][:, :, 2:], before[:, :, 2:])


@pytest.mark.parametrize("offset", [1, 40, 5000])
def test_output_does_not_depend_on_where_time_begins(offset: int) -> None:
    net, x, embeds = wan(), latents(1, 5), prompts()
    with CausalWan(net) as causal:
        outputs = []
        for first in (0, offset):
            with causal.block_causal(1, offset=first):
                outputs.append(net(x, TIMES, embeds, return_dict=False)[0])
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_gradients_flow_through_the_mask() -> None:
    net, x, embeds = wan().requires_grad_(True), latents(1, 3), prompts()
    with CausalWan(net) as causal, causal.block_causal(1):
        net(x, TIMES[:, :3], embeds, return_dict=False)[0].square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in net.named_parameters() if "image" not in name)


def test_it_is_gone_without_a_trace() -> None:
    net, x, embeds = wan(), latents(), prompts()
    before = net(x, torch.tensor([500.0]), embeds, return_dict=False)[0]
    processors = dict(net.attn_processors)
    causal = CausalWan(net)
    with pytest.raises(Unsupported, match="already"):
        CausalWan(net)
    causal(x, torch.tensor([500.0]), Text(embeds))
    causal.remove()
    causal.remove()
    assert net.attn_processors == processors and "forward" not in net.rope.__dict__
    assert torch.equal(net(x, torch.tensor([500.0]), embeds, return_dict=False)[0], before)


def test_interleaved_sessions_are_two_solo_ones() -> None:
    net = wan()
    inputs = [latents(1, 4, seed=i) for i in range(2)]
    texts = [prompts(seed=i) for i in range(2)]
    with CausalWan(net) as causal:
        solo = [chunked(causal, x, TIMES[:, :4], Text(text)) for x, text in zip(inputs, texts, strict=True)]
        caches = [causal.cache(1, 4, 2, 2) for _ in range(2)]
        held = [Text(text) for text in texts]
        made: list[list[torch.Tensor]] = [[], []]
        for frame in range(4):
            for i in (1, 0):
                part = slice(frame, frame + 1)
                made[i].append(causal(inputs[i][:, :, part], TIMES[:, part], held[i], cache=caches[i], commit=True))
    for parts, expected in zip(made, solo, strict=True):
        assert torch.equal(torch.cat(parts, dim=2), expected)


def test_sessions_in_threads_do_not_meet() -> None:
    net = wan()
    inputs = [latents(1, 5, seed=i) for i in range(4)]
    with CausalWan(net) as causal:
        expected = [chunked(causal, x, TIMES, Text(prompts(seed=i))) for i, x in enumerate(inputs)]
        found: dict[int, torch.Tensor] = {}
        gate = threading.Barrier(4)

        def run(i: int) -> None:
            gate.wait()
            found[i] = chunked(causal, inputs[i], TIMES, Text(prompts(seed=i)))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_a_forward_that_fails_leaves_cache_and_model_clean() -> None:
    net, x = wan(), latents(1, 3)
    with CausalWan(net) as causal:
        text, cache = Text(prompts()), causal.cache(1, 3, 2, 2)
        first = causal(x[:, :, :1], TIMES[:, :1], text, cache=cache, commit=True)
        expected = causal(x[:, :, 1:2], TIMES[:, 1:2], text, cache=cache)
        handle = net.blocks[1].ffn.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            causal(x[:, :, 1:2], TIMES[:, 1:2], text, cache=cache, commit=True)
        handle.remove()
        assert cache.held(0) == 1
        assert torch.equal(causal(x[:, :, 1:2], TIMES[:, 1:2], text, cache=cache), expected)
        assert torch.equal(causal(x[:, :, :1], TIMES[:, :1], text), first)


def test_recaching_under_the_same_prompt_changes_nothing_and_under_another_is_a_fresh_start() -> None:
    net, x = wan(), latents(1, 4)
    with CausalWan(net) as causal:
        old, new = Text(prompts()), Text(prompts(seed=5))
        cache = causal.cache(1, 4, 2, 2)
        assert not causal.recache(cache, old)
        for frame in range(3):
            part = slice(frame, frame + 1)
            causal(x[:, :, part], TIMES[:, part], old, cache=cache, commit=True)
        keys = cache.keys.values.clone()
        assert causal.recache(cache, old)
        torch.testing.assert_close(cache.keys.values, keys, **CLOSE)
        assert causal.recache(cache, new)
        last = causal(x[:, :, 3:], TIMES[:, 3:4], new, cache=cache)
        torch.testing.assert_close(last, chunked(causal, x, TIMES[:, :4], new)[:, :, 3:], **CLOSE)


def test_recaching_leaves_absolute_positions_where_they_were() -> None:
    with CausalWan(wan()) as causal:
        text, cache = Text(prompts()), causal.cache(2, 4, 2, 2, positions="absolute")
        x, times = latents(2, 9), torch.zeros(2, 9)
        for frame in range(9):
            part = slice(frame, frame + 1)
            causal(x[:, :, part], times[:, part], text, cache=cache, commit=True)
        keys = cache.layout(1).held.sort().values
        assert causal.recache(cache, text, rows=[1])
        assert torch.equal(cache.layout(1).held.sort().values, keys) and keys[1].tolist() == [5, 6, 7, 8]
        assert cache.layout(1).new.tolist() == [[9], [9]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 1.5}, "chunk=1.5"),
        ({"window": -3}, "window=-3"),
        ({"window": 0.5}, "window=0.5"),
        ({"commit": -1}, "commit=-1"),
        ({"commit": 5}, "commit=5"),
        ({"commit": 1.0}, "commit=1.0"),
    ],
)
def test_impossible_numbers_of_frames_are_refused(options: dict, message: str) -> None:
    with CausalWan(wan()) as causal:
        cache = causal.cache(1, 4, 2, 2)
        with pytest.raises(ValueError, match=message):
            causal(latents(1, 4), TIMES[:, :4], Text(prompts()), cache=cache, **options)
        assert cache.held(0) == 0


def test_a_removed_plug_says_so() -> None:
    causal = CausalWan(wan())
    causal.remove()
    with pytest.raises(RuntimeError, match="removed"):
        causal(latents(1, 1), TIMES[:, :1], Text(prompts()))
    with pytest.raises(RuntimeError, match="removed"), causal.block_causal():
        pass


def test_int8_keys_give_nearly_the_same_video() -> None:
    net, x = wan(), latents(1, 5)
    with CausalWan(net) as causal:
        text = Text(prompts())
        whole, small = (chunked(causal, x, TIMES, text, storage=kind) for kind in ("native", "int8"))
    assert 0 < (small - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize(
    ("shape", "time", "message"),
    [
        ((1, 3, 1, 2, 2), (1,), r"latents are \[B, 4, F, h, w\]"),
        ((1, 4, 1, 2, 2), (3,), r"timesteps are \[1\] or \[1, 1\]"),
        ((1, 4, 1, 4, 4), (1,), "16 tokens a frame, in a cache made for 4"),
        ((2, 4, 1, 2, 2), (2,), "2 rows of latents for 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple, time: tuple, message: str) -> None:
    with CausalWan(wan()) as causal:
        cache = causal.cache(1, 3, 2, 2)
        with pytest.raises(ValueError, match=message):
            causal(torch.zeros(shape), torch.zeros(time), Text(prompts()), cache=cache)


def test_other_models_are_refused() -> None:
    with pytest.raises(Unsupported, match="no WanTransformer3DModel"):
        CausalWan(family("flux").transformer)
