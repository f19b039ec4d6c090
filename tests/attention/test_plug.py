"""Every attention call of every family is seen, and nothing outside the denoiser is."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import fastdiff
from fastdiff.anatomy import anatomy, attentions, capture
from fastdiff.attention.plug import Call, Moment, Plug, Route, padding
from fastdiff.attention.sparse import SparseAttention
from fastdiff.hooks import Hooks, Requests
from fastdiff.miniature.families import FAMILIES, family
from fastdiff.runtime.compile import Compile
from tests.attention.tiny import tiny


class Count(TorchFunctionMode):
    """Counts every attention call, whoever makes it."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _inputs(name: str) -> tuple[Any, tuple, dict[str, Any]]:
    if name in FAMILIES:
        denoiser, args, kwargs = capture(family(name), 32, 32)
        return denoiser, args, {**kwargs, "return_dict": False}
    torch.manual_seed(0)
    model, inputs = tiny(name)
    return model.eval(), (), {**inputs, "return_dict": False}


@pytest.mark.parametrize("name", [*FAMILIES, "hunyuan-video", "wan", "cogvideox", "ltx", "mochi"])
@torch.no_grad()
def test_every_attention_call_of_the_denoiser_is_seen(name: str):
    denoiser, args, kwargs = _inputs(name)
    with Count() as every:
        expected = denoiser(*args, **kwargs)[0]
    seen: list[str] = []
    hooks = Hooks("test", Requests())

    def attend(call: Any) -> Tensor:
        seen.append(call.layer)
        mask = None if call.lengths is None else torch.arange(call.k.shape[2]) < call.lengths.view(-1, 1, 1, 1)
        return functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)

    plug = Plug(hooks, denoiser, attend, 1)
    declined: list[str] = []
    plug.decline = lambda layer, reason: declined.append(reason)
    output = denoiser(*args, **kwargs)[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    # a diffusers release that computes attention elsewhere is noticed here first
    # Mochi pools its words by an attention of its own, outside of any attention module
    assert len(seen) + len(declined) == every.calls - (name == "mochi") > 0
    assert len(seen) == len(set(seen)) > 0
    assert set(declined) <= {"cross-attention", "its mask is no padding of keys"}
    hooks.undo()
    assert torch.equal(denoiser(*args, **kwargs)[0], expected)


def test_padding_is_told_from_other_masks():
    hidden = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = torch.tensor([2, 4], dtype=torch.int32)
    added = torch.zeros(2, 1, 1, 4).masked_fill(~hidden[:, None, None], -1e9)
    for mask in (hidden, hidden[:, None, None], added):
        found = padding(mask, 2, 4)
        assert found is not None and torch.equal(found, expected)
    for other in (hidden.flip(1), torch.rand(2, 1, 1, 4), torch.ones(2, 2, 4, 4, dtype=torch.bool)):
        assert padding(other, 2, 4) is None
    assert padding(hidden[:1], 3, 4) is not None


def test_another_backend_is_refused_aloud():
    pipe = family("flux")
    pipe.transformer.set_attention_backend("_native_math")
    try:
        verdict = SparseAttention().supports(pipe)
        assert not verdict
        assert "_native_math" in verdict.reason
        with pytest.raises(fastdiff.Unsupported, match="set_attention_backend"):
            fastdiff.accelerate(pipe, SparseAttention())
    finally:
        pipe.transformer.set_attention_backend("native")
    assert SparseAttention().supports(pipe)


def test_short_sequences_stay_exact_and_say_so():
    pipe = family("sd")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with fastdiff.accelerate(pipe, SparseAttention()) as handle:
        pipe("a red circle", num_inference_steps=2, height=32, width=32, generator=generator, output_type="latent")
        report = str(handle.report())
    assert "fewer than 1024 tokens" in report
    assert "did not engage" in report
    assert anatomy(pipe).denoiser.__dict__.get("forward") is None


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
@torch.no_grad()
def test_a_denoiser_with_sparse_attention_is_one_graph(name: str):
    pipe = family(name)
    small: dict[str, Any] = dict(density=0.5, query_block=4, key_block=4, warm_up=1, refresh=0, minimum_tokens=8)
    outputs = []
    for plan in ([SparseAttention(**small)], [SparseAttention(**small), Compile(scope="whole", backend="eager")]):
        denoiser, args, kwargs = capture(pipe, 32, 32)
        with fastdiff.accelerate(pipe, plan) as handle, handle.request():
            made = [denoiser(*args, **{**kwargs, "return_dict": False})[0] for _ in range(3)]
            outputs.append(made)
            report = handle.report()
        assert report.rows[0].accelerated == 2
    assert "1 graph(s) compiled, 0 of them again, 0 graph breaks" in str(report)
    for plain, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def _layer(seen: list[Call]) -> tuple[Any, Plug, Requests]:
    requests = Requests()
    plug = Plug(Hooks("test", requests), anatomy(family("sd")).denoiser, seen.append, 8)
    request = requests.open()
    request.state((plug, "now"), dict)["moment"] = Moment(request, "branch")
    return request, plug, requests


def test_grouped_queries_are_handed_on_and_other_calls_are_exact_with_a_reason():
    seen: list[Call] = []
    request, plug, _ = _layer(seen)
    q, (k, v) = torch.randn(1, 4, 16, 8), torch.randn(2, 1, 2, 16, 8)
    whole = (k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    with request:
        layer = plug.layers[0]
        found = layer(q, k, v, enable_gqa=True)
        assert seen[0].k.shape[1] == 2
        torch.testing.assert_close(found, functional.scaled_dot_product_attention(q, *whole))
        cases: list[tuple[dict[str, Any], str]] = [
            (dict(is_causal=True), "causal"),
            (dict(attn_mask=torch.randn(1, 4, 16, 16)), "no padding of keys"),
        ]
        for place, (changed, reason) in enumerate(cases, 1):
            layer = plug.layers[place]
            expected = functional.scaled_dot_product_attention(q, *whole, **changed)
            assert torch.equal(layer(q, *whole, **changed), expected)
            assert reason in plug.declined[layer.name]
        layer = plug.layers[3]
        layer(q[0], whole[0][0], whole[1][0])
        assert "not [batch, heads" in plug.declined[layer.name]
    assert len(seen) == 1


def test_context_parallelism_is_refused_aloud():
    pipe = family("flux")
    pipe.transformer._parallel_config = object()
    verdict = SparseAttention().supports(pipe)
    assert not verdict
    assert "context parallelism" in verdict.reason


@torch.no_grad()
def test_nothing_outside_of_one_denoiser_is_touched():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def everybody_s() -> list[Any]:
        registry = _AttentionBackendRegistry
        return [
            functional.scaled_dot_product_attention,
            registry._active_backend,
            dict(registry._backends),
            list(AttentionBackendName),
            {kind: dict(vars(kind)) for pipe in (one, other) for kind in _kinds(anatomy(pipe).denoiser)},
        ]

    one, other = family("flux"), family("flux")
    denoiser, args, kwargs = capture(other, 32, 32)
    expected, before = denoiser(*args, **kwargs)[0], everybody_s()
    small: dict[str, Any] = dict(density=0.5, query_block=4, key_block=4, warm_up=1, refresh=0, minimum_tokens=8)
    with fastdiff.accelerate(one, SparseAttention(**small)) as handle:
        own, own_args, own_kwargs = capture(one, 32, 32)
        with handle.request():
            changed = [own(*own_args, **own_kwargs)[0] for _ in range(2)]
        assert everybody_s() == before
        assert torch.equal(denoiser(*args, **kwargs)[0], expected)
    assert not torch.equal(*changed)
    assert everybody_s() == before


def _kinds(denoiser: Any) -> set[type]:
    """Classes of attention modules and of their processors."""
    modules = [module for _, module in attentions(denoiser)]
    return {type(part) for module in modules for part in (module, getattr(module, "processor", None))} - {type(None)}


@pytest.mark.parametrize("name", ["sd", "flux"])
@torch.no_grad()
def test_a_plug_that_declines_everything_changes_no_bit(name: str):
    pipe = family(name)
    denoiser, args, kwargs = capture(pipe, 32, 32)
    expected = denoiser(*args, **{**kwargs, "return_dict": False})[0]
    hooks, seen = Hooks("test", Requests()), []
    Plug(hooks, denoiser, seen.append, 1)
    assert torch.equal(denoiser(*args, **{**kwargs, "return_dict": False})[0], expected)
    assert seen
    hooks.undo()
    assert torch.equal(denoiser(*args, **{**kwargs, "return_dict": False})[0], expected)


def test_what_asks_for_a_log_sum_exp_is_refused_and_not_given_a_plain_output():
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    seen: list[Call] = []
    request, plug, _ = _layer(seen)
    q, k, v = torch.randn(3, 1, 16, 2, 8)  # [B, S, N, D], as the dispatch takes them
    with request, Route(plug.layers[0]):
        dispatch_attention_fn(q, k, v)
        assert len(seen) == 1
        with pytest.raises(ValueError, match="return_lse"):
            dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True})
    assert len(seen) == 1
