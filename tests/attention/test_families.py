"""Attention's accelerations on denoisers of video models: they act, say so, keep requests apart, and leave no trace."""

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.attention.linear import FineTune, Linear, SparseLinear
from fastdiff.attention.order import TokenOrder
from fastdiff.attention.sparse import SparseAttention
from tests.attention.tiny import tiny

FAMILIES = ("hunyuan-video", "wan", "cogvideox", "ltx", "mochi")
STEPS = 5
SMALL: dict[str, Any] = dict(density=0.5, query_block=4, key_block=4, warm_up=1, refresh=3, minimum_tokens=8)
MEMBERS: dict[str, Any] = {
    "mass": SparseAttention(**SMALL),
    "tracked": SparseAttention(far="tracked", **SMALL),
    "ratio": SparseAttention(far="ratio", **SMALL),
    "near": SparseAttention(select="near", far="none", **SMALL),
    "int8": SparseAttention(density=1, precision="int8", minimum_tokens=8),
    "cubes": TokenOrder(2, frames=2),
}
everywhere = pytest.mark.parametrize("name", FAMILIES)


class Sampler:
    """As much of a pipeline as an acceleration looks at: a denoiser, called for two guidance branches a step."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.transformer, self.given = tiny(name)
        self.transformer.eval()
        self.scheduler = None
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    @torch.no_grad()
    def __call__(self, seed: int = 0, after: Callable[[int], Any] = lambda step: None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.given["hidden_states"].shape, generator=generator)
        words = self.given["encoder_hidden_states"]
        branches = [words + torch.randn(words.shape, generator=generator), torch.zeros_like(words)]
        for step in range(STEPS):
            at = torch.tensor([900 - 100 * step])
            outputs = [self._denoised(x, text, at) for text in branches]
            x = x - 0.1 * (outputs[1] + 2 * (outputs[0] - outputs[1]))
            after(step)
        return x

    def _denoised(self, x: Tensor, text: Tensor, at: Tensor) -> Tensor:
        given = {**self.given, "hidden_states": x, "encoder_hidden_states": text, "timestep": at}
        return self.transformer(**given, return_dict=False)[0]


@cache
def sampler(name: str) -> Sampler:
    """One for the whole file: that it can be shared is part of what is tested."""
    made = Sampler(name)
    made()
    return made


@everywhere
@pytest.mark.parametrize("member", MEMBERS)
def test_it_acts_says_so_and_leaves_no_trace(name: str, member: str):
    pipe, one = sampler(name), MEMBERS[member]
    plain = pipe()
    with fastdiff.accelerate(pipe, one, strict=True) as handle:
        first, second = pipe(), pipe()
        row = handle.report().rows[0]
    assert row.accelerated > 0
    assert not row.misses
    assert torch.equal(first, second)
    assert torch.equal(pipe(), plain)
    if one.exact:
        assert row.accelerated == row.seen
        torch.testing.assert_close(first, plain, rtol=0, atol=1e-4)
    else:
        assert not torch.equal(first, plain)


@everywhere
@pytest.mark.parametrize("member", ["mass", "tracked", "cubes"])
def test_nested_and_threaded_requests_equal_solo_ones(name: str, member: str):
    pipe = sampler(name)
    with fastdiff.accelerate(pipe, MEMBERS[member]):
        solo = [pipe(0), pipe(7)]
        inner: list[Tensor] = []
        outer = pipe(0, lambda step: inner.append(pipe(7)) if step == 2 else None)
        assert torch.equal(outer, solo[0])
        assert torch.equal(inner[0], solo[1])
        barrier = threading.Barrier(2, timeout=60)
        together: dict[int, Tensor] = {}

        def work(seed: int) -> None:
            together[seed] = pipe(seed, lambda step: barrier.wait())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(together[0], solo[0])
    assert torch.equal(together[7], solo[1])


@everywhere
def test_guidance_branches_in_one_call_equal_separate_ones(name: str):
    pipe = sampler(name)
    texts = [torch.randn_like(pipe.given["encoder_hidden_states"]) for _ in range(2)]
    steps = [torch.randn_like(pipe.given["hidden_states"]) for _ in range(3)]
    doubled = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in pipe.given.items() if _is_row(value)}
    both = torch.cat(texts)
    with fastdiff.accelerate(pipe, MEMBERS["tracked"]) as handle, torch.no_grad():
        with handle.request():
            whole = []
            for x in steps:
                changed = {"hidden_states": torch.cat([x, x]), "encoder_hidden_states": both}
                whole.append(pipe.transformer(**{**pipe.given, **doubled, **changed}, return_dict=False)[0])
        with handle.request():
            at = pipe.given["timestep"]
            parts = [torch.cat([pipe._denoised(x, text, at) for text in texts]) for x in steps]
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * float(one.abs().max()))


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def test_padded_words_of_hunyuan_stay_hidden_when_attention_is_sparse():
    pipe = Sampler("hunyuan-video")
    hidden = pipe.given["encoder_attention_mask"][0] == 0
    assert hidden.any()
    with fastdiff.accelerate(pipe, MEMBERS["mass"], strict=True) as handle:
        expected = pipe(3)
        # the refiner of the words, whose mask hides rows as well
        assert "1 layers exact: its mask is no padding of keys" in str(handle.report())
        pipe.given["encoder_hidden_states"][:, hidden] += 5.0
        torch.testing.assert_close(pipe(3), expected, rtol=0, atol=1e-5)
    pipe.given["encoder_hidden_states"][:, ~hidden] += 5.0
    assert not torch.allclose(pipe(3), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx", "mochi"])
def test_sparse_linear_attention_is_trained_and_taken_off(name: str, tmp_path: Path):
    pipe = sampler(name)
    plain = pipe()
    arguments = {**pipe.given, "return_dict": False}
    settings = Linear(density=0.5, query_block=4, key_block=4, minimum_tokens=8)
    tuned = FineTune(pipe.transformer, settings, arguments, steps=2)
    before = tuned.step(arguments)
    assert tuned.step(arguments) < before
    tuned.save(tmp_path / "sla.safetensors")
    with fastdiff.accelerate(pipe, SparseLinear(str(tmp_path / "sla.safetensors")), strict=True) as handle:
        first, second = pipe(), pipe()
        row = handle.report().rows[0]
    assert row.accelerated == row.seen > 0
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(pipe(), plain)
