"""Codes of one to eight bits in bytes, and tensors kept in modules as bytes."""

from typing import Any

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [ceil(n · bits / 8)] of codes [n] below 2**bits; `unpack` gives them back."""
    if 8 % bits:
        # low bits first, eight at a time into a byte
        spread = (codes.to(torch.uint8)[:, None] >> torch.arange(bits, device=codes.device)) & 1
        codes, bits = spread.flatten(), 1
    each = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -len(codes) % each)).view(-1, each)
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (padded.int() << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [count]: what `pack` was given."""
    width = bits if 8 % bits == 0 else 1
    shifts = torch.arange(0, 8, width, device=packed.device)
    pieces = ((packed[:, None].int() >> shifts) & (2**width - 1)).flatten()
    if width == bits:
        return pieces[:count].to(torch.uint8)
    digits = pieces[: count * bits].view(count, bits) << torch.arange(bits, device=packed.device)
    return digits.sum(-1).to(torch.uint8)


def grouped(weight: Tensor, group: int) -> Tensor:
    """[N, ceil(K / group), group] of [N, K], zeros at the end; a group of 0 is a whole row."""
    group = group or weight.shape[1]
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def size_of(stored: dict[str, Tensor]) -> int:
    """Bytes of stored tensors."""
    return sum(tensor.nbytes for tensor in stored.values())


class ByteStore(torch.nn.Module):
    """A module that keeps tensors as buffers of bytes.

    Casting a model to another float dtype casts float buffers too, and a scale in bfloat16 is worth little; bytes
    stay what they are and still move between devices.
    """

    def __init__(self):
        super().__init__()
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        """Store a tensor under a name."""
        self._kinds[name] = tensor.dtype, tuple(tensor.shape)
        self.register_buffer(f"{name}_bytes", tensor.detach().contiguous().view(-1).view(torch.uint8))

    def read(self, name: str) -> Tensor:
        """The tensor stored under a name, with its own dtype and shape."""
        dtype, shape = self._kinds[name]
        kept: Any = getattr(self, f"{name}_bytes")
        return kept.view(dtype).view(shape)

    def read_all(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Several stored tensors by name."""
        return {name: self.read(name) for name in names}
