"""Denoisers of a few milliseconds of families that have no pipeline in `fastdiff.miniature.families`."""

from typing import Any

import torch


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
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
