"""Quantisation written out in torch: per group, per channel, to four bits and in microscaled groups."""

import math

import torch
from torch import Tensor

from . import FP8_MAX, K_GROUP, Q_GROUP, Quantised

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantise_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    fp8: bool,
    smooth: bool,
    q_group: int = Q_GROUP,
    k_group: int = K_GROUP,
) -> Quantised:
    """See `quantise`."""
    queries, keys, values = q.float(), k.float(), v.float()
    mean = keys.mean(2) if smooth else torch.zeros_like(keys[:, :, 0])  # [B, M, D]
    keys = keys - mean[:, :, None]
    v_mean = values.mean(2)
    centred = values - v_mean[:, :, None]
    v_scale = _poisoned(centred.abs().amax(2), centred.sum(2)) / FP8_MAX
    v_scale = torch.where(v_scale == 0, 1, v_scale)
    q8, q_scale = integers(queries, q_group)
    k8, k_scale = integers(keys, k_group)
    own = mean.repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, N, D]
    return Quantised(
        q=q8,
        k=k8,
        v=(centred / v_scale[:, :, None]).mT.contiguous().to(torch.float8_e4m3fn) if fp8 else None,
        q_scale=q_scale * (scale * math.log2(math.e)),
        k_scale=k_scale,
        v_scale=v_scale,
        v_mean=v_mean,
        shift=(queries @ own[..., None])[..., 0] * scale,
        q_pool=pooled(queries, q_group),
        k_pool=pooled(keys, k_group),
        q_group=q_group,
        k_group=k_group,
    )


def integers(x: Tensor, group: int, most: int = 127) -> tuple[Tensor, Tensor]:
    """int8 values in -most..most of float32 [..., S, D] and the scale [..., ceil(S / group)] of each group of tokens.

    Rounded half away from zero; a group of zeros has scale 1.
    """
    grouped = _grouped(x, group)  # [..., G, group, D]
    scale = _poisoned(grouped.abs().amax((-1, -2)), grouped.sum((-1, -2))) / most
    scale = torch.where(scale == 0, 1, scale)
    each = scale.repeat_interleave(group, -1)[..., : x.shape[-2]]
    ratio = torch.nan_to_num(x / each[..., None])
    whole = torch.where(ratio >= 0, (ratio + 0.5).floor(), (ratio - 0.5).ceil()).clamp(-most, most)
    return whole.to(torch.int8), scale


def dequantised(whole: Tensor, scale: Tensor, group: int) -> Tensor:
    """Float32 values of what `integers` gave."""
    return whole.float() * scale.repeat_interleave(group, -1)[..., : whole.shape[-2], None]


def pooled(x: Tensor, group: int) -> Tensor:
    """Means over groups of tokens of [..., S, D]: [..., ceil(S / group), D]; a shorter last group has its own mean."""
    counts = torch.full((-(-x.shape[-2] // group),), group, device=x.device)
    counts[-1:] = x.shape[-2] - group * (len(counts) - 1)
    return _grouped(x, group).sum(-2) / counts[:, None]


def int4_scores_reference(q: Tensor, k: Tensor, scale: float, smooth_q: bool = True, group: int = 128) -> Tensor:
    """Scores [B, N, S, T] with q and k in four bits per token (SageAttention2).

    Smoothing q takes the mean of each block of queries off and adds its product with the keys back in float32.
    """
    queries, keys = q.float(), k.float() - k.float().mean(2, keepdim=True)
    means = pooled(queries, group).repeat_interleave(group, 2)[:, :, : q.shape[2]]
    added = means @ keys.mT if smooth_q else 0.0
    queries = queries - means if smooth_q else queries
    q4, q_scale = integers(queries, 1, 7)
    k4, k_scale = integers(keys, 1, 7)
    return (dequantised(q4, q_scale, 1) @ dequantised(k4, k_scale, 1).mT + added) * scale


def microscaled(x: Tensor, group: int = 16) -> Tensor:
    """Float32 values of x [..., D] in NVFP4 (SageAttention3, https://arxiv.org/abs/2505.11594).

    Groups of 16 channels hold e2m1 values under one e4m3 scale; D is a multiple of 16.
    """
    if x.shape[-1] % group:
        raise ValueError(f"microscaling takes groups of {group} channels, and there are {x.shape[-1]}")
    parts = x.float().unflatten(-1, (-1, group))
    scale = (parts.abs().amax(-1, keepdim=True) / E2M1[-1]).to(torch.float8_e4m3fn).float()
    levels = torch.tensor(E2M1, device=x.device)
    ratio = (parts / torch.where(scale == 0, 1, scale)).clamp(-6, 6)
    nearest = levels[(ratio.abs()[..., None] - levels).abs().argmin(-1)]
    return (nearest * ratio.sign() * scale).flatten(-2)


def microscaled_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SageAttention3's attention on float inputs: all operands in NVFP4, rows of probabilities lifted to its range."""
    keys = k.float() - k.float().mean(2, keepdim=True)
    scores = microscaled(q) @ microscaled(keys).mT * scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    # the scale of a group is e4m3 as well, so a row fills 448 times 6
    top = FP8_MAX * E2M1[-1]
    product = microscaled(weights * top) / top @ microscaled(v.float().mT).mT
    return (product / weights.sum(-1, keepdim=True)).to(q.dtype)


def _grouped(x: Tensor, group: int) -> Tensor:
    groups = -(-x.shape[-2] // group)
    spare = groups * group - x.shape[-2]
    return torch.nn.functional.pad(x, (0, 0, 0, spare)).unflatten(-2, (groups, group))


def _poisoned(largest: Tensor, total: Tensor) -> Tensor:
    """NaN where anything summed into `total` was not finite."""
    return largest + total * 0
