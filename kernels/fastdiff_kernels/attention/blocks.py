"""Which key blocks each query block attends to: the look-up table that references and kernels read alike."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """A block mask as lists of block numbers.

    Attributes:
        blocks: int32 [B, N, I, M]; the first `counts` entries of a row are key blocks, each once, in any order.
        counts: int32 [B, N, I] in 0..M; a query block with none gives output 0 and log-sum-exp -inf.
        query_block, key_block: tokens in a block; the last block of either side may be shorter.
    """

    blocks: Tensor
    counts: Tensor
    query_block: int
    key_block: int

    @classmethod
    def from_mask(cls, mask: Tensor, query_block: int, key_block: int) -> "Selection":
        """The selection of a bool mask [B, N, I, J], True where a block is attended to; no sort is needed."""
        place = mask.cumsum(-1) - 1  # [B, N, I, J]
        width = int(mask.sum(-1).amax()) if mask.numel() else 0
        numbers = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        # blocks left out are written to a last column that is cut off again
        blocks = mask.new_zeros((*mask.shape[:-1], width + 1), dtype=torch.int64)
        blocks.scatter_(-1, torch.where(mask, place, width), numbers)
        counts = mask.sum(-1, dtype=torch.int32)
        return cls(blocks[..., :width].to(torch.int32).contiguous(), counts, query_block, key_block)

    def mask(self, key_blocks: int) -> Tensor:
        """Bool [B, N, I, J], True where selected; `key_blocks` is J."""
        mask = self.blocks.new_zeros((*self.counts.shape, key_blocks + 1), dtype=torch.bool)
        used = torch.arange(self.blocks.shape[-1], device=self.blocks.device) < self.counts[..., None]
        mask.scatter_(-1, torch.where(used, self.blocks.long(), key_blocks), True)
        return mask[..., :key_blocks]

    def complement(self, key_blocks: int) -> "Selection":
        """The selection of all blocks that this one leaves out."""
        return Selection.from_mask(~self.mask(key_blocks), self.query_block, self.key_block)

    def transposed(self, key_blocks: int) -> "Selection":
        """For each key block the query blocks that attend to it, as gradients of keys and values need it."""
        return Selection.from_mask(self.mask(key_blocks).mT.contiguous(), self.key_block, self.query_block)

    def density(self, key_blocks: int) -> float:
        """Share of block pairs that are computed, in 0..1."""
        return float(self.counts.double().mean()) / max(key_blocks, 1)

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise a `ValueError` unless this fits q [B, N, S, D] and k [B, M, T, D]."""
        rows = (*q.shape[:2], blocks_in(q.shape[2], self.query_block))
        if tuple(self.counts.shape) != rows or tuple(self.blocks.shape[:3]) != rows:
            raise ValueError(
                f"a selection for q {list(q.shape)} in blocks of {self.query_block} has counts of shape {list(rows)}, "
                f"not {list(self.counts.shape)}; make it anew for this shape"
            )
        if self.blocks.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise ValueError("a selection's blocks and counts are int32")
        if self.blocks.device != q.device or self.counts.device != q.device:
            raise ValueError(f"the selection lies on {self.blocks.device} and q on {q.device}; move it")


def blocks_in(tokens: int, block: int) -> int:
    """How many blocks cover this many tokens."""
    return -(-tokens // block)
