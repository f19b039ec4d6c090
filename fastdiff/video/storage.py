"""Frames of one kind of tensor for every layer and row of a cache, whole or in one byte a value."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.acceleration import check_choice

KINDS = ("native", "int8", "float8")
"""As given; or one byte a value with a scale for each token and head, symmetric integers or float8_e4m3fn."""

_LARGEST = {"int8": 127.0, "float8": 448.0}
_CODES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


class FrameStore:
    """``[layers, rows, frames, tokens, heads, width]`` values, written by slot and read by layer.

    Shapes never change and writes are in place, so a captured CUDA graph may hold on to it.

    Args:
        shape: the six sizes.
        kind: one of `KINDS`.
        dtype: of what goes in and comes out.
    """

    def __init__(self, shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device):
        check_choice("FrameStore", "storage", kind, KINDS)
        self.kind, self.dtype = kind, dtype
        self.values = torch.zeros(shape, dtype=_CODES.get(kind, dtype), device=device)
        self.scales = None if kind == "native" else torch.zeros(shape[:-1], dtype=torch.float32, device=device)

    def put(self, rows: Tensor, slots: Tensor, new: Tensor) -> None:
        """Write ``new`` ``[L, B, F, S, N, D]`` into ``slots`` ``[B, F]`` of ``rows`` ``[B]``."""
        place = (slice(None), rows[:, None], slots)
        if self.scales is None:
            self.values[place] = new.to(self.dtype)
            return
        scales = new.float().abs().amax(-1).clamp_min_(1e-12) / _LARGEST[self.kind]
        codes = new.float() / scales[..., None]
        if self.kind == "int8":
            self.values[place] = codes.round_().to(torch.int8)
        else:
            # float8 has no indexed writes of its own on every device; its bytes have
            self.values.view(torch.uint8)[place] = codes.to(torch.float8_e4m3fn).view(torch.uint8)
        self.scales[place] = scales

    def get(self, layer: int, rows: Tensor | None = None) -> Tensor:
        """One layer's frames of ``rows`` (all of them if None): ``[B, F, S, N, D]``, not to be written to."""
        values = _rows(self.values[layer], rows)
        if self.scales is None:
            return values
        scales = _rows(self.scales[layer], rows)
        return (values.float() * scales[..., None]).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)
    return tensor.index_select(0, rows)
