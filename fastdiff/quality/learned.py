"""Metrics that need a trained network, which the caller brings: none is downloaded and none is chosen here."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def perceptual(a: Tensor, b: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Perceptual distance of pictures [B, 3, H, W] in 0..1, as ``lpips.LPIPS`` gives it: float64 [B], 0 where equal.

    Args:
        network: takes two batches in -1..1 and gives a distance each, such as ``lpips.LPIPS(net="alex")``
            (https://arxiv.org/abs/1801.03924).
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(f"pictures are two [B, 3, H, W] of one shape, not {list(a.shape)} and {list(b.shape)}")
    with torch.no_grad():
        return network(a.float() * 2 - 1, b.float() * 2 - 1).double().reshape(len(a), -1).mean(1)


def clip_score(pictures: Tensor, texts: Sequence[str], model: Any, processor: Any) -> Tensor:
    """CLIP score (https://arxiv.org/abs/2104.08718): 100 times the cosine of picture and text, at least 0; float64 [B].

    Args:
        pictures: [B, 3, H, W] in 0..1. texts: one for each.
        model, processor: a ``transformers.CLIPModel`` and its ``CLIPProcessor``.
    """
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures for {len(texts)} texts")
    images = [(one.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy() for one in pictures]
    given = processor(text=list(texts), images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        told = model(**given)
    seen, read = (
        one.double() / one.double().norm(dim=-1, keepdim=True) for one in (told.image_embeds, told.text_embeds)
    )
    return (100 * (seen * read).sum(-1)).clamp(min=0)
