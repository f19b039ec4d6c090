"""Every attention call of every family is seen, and nothing outside the denoiser is."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import fastdiff
from fastdiff.anatomy import anatomy, capture
from fastdiff.attention.plug import Plug, padding
from fastdiff.attention.sparse import SparseAttention
from fastdiff.hooks import Hooks, Requests
from fastdiff.miniature.families import FAMILIES, family


def _tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A denoiser of a few milliseconds and its inputs, of a family that has no pipeline here."""
    import diffusers

    text = torch.randn(1, 8, 16)
    at = {"timestep": torch.tensor([500])}
    video = torch.randn(1, 4, 2, 8, 8)
    if name == "hunyuan-video":
        model = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        inputs = dict(encoder_attention_mask=mask, pooled_projections=torch.randn(1, 8), guidance=torch.tensor([6.0]))
        return model, dict(hidden_states=video, encoder_hidden_states=text, **at, **inputs)
    if name == "wan":
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
        )  # fmt: skip
        return model, dict(hidden_states=video, encoder_hidden_states=text, **at)
    if name == "cogvideox":
        model = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=8,
        )  # fmt: skip
        return model, dict(hidden_states=video.transpose(1, 2), encoder_hidden_states=text, **at)
    if name == "ltx":
        model = diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=16,
        )  # fmt: skip
        mask = torch.ones(1, 8, dtype=torch.bool)
        return model, dict(hidden_states=torch.randn(1, 128, 4), encoder_hidden_states=text,
                           encoder_attention_mask=mask, num_frames=2, height=8, width=8, **at)  # fmt: skip
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=8,
        in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    mask = torch.ones(1, 8, dtype=torch.bool)
    return model, dict(hidden_states=video, encoder_hidden_states=text, encoder_attention_mask=mask, **at)


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
    model, inputs = _tiny(name)
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
