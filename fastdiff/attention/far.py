"""What stands for the keys that sparse attention leaves out.

`Centroid` needs no history, and is the default because it won or tied on a trained model (`bench attention`): the mean
of each block left out stands for its keys. `Merge` is ours too: at a full step attention over the chosen and over the
other keys is computed apart (together exactly the full one, at the same cost); the far part and its log-sum-exp are
kept, and later steps merge it with a fresh near part, so that how much it weighs follows the current logits by itself.
`Tracked` joins the two: it is nearest to the exact output of a layer, but errs the same way from step to step. `Ratio`
is Re-ttention (https://arxiv.org/abs/2505.22918): a fixed share and a residual.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.attention.plug import Call
from fastdiff_kernels.attention import Selection, attention, blocks_in
from fastdiff_kernels.quantise.reference import pooled


@dataclass
class Nothing:
    """The keys left out count for nothing: plain sparse attention."""

    precision: str = "exact"
    # whether a full step must have been before
    remembers: ClassVar[bool] = False

    def full(self, call: Call, selection: Selection, output: Tensor, lse: Tensor) -> None:
        """Learn from a full step, whose output [B, N, S, D] and log-sum-exp [B, N, S] are given."""

    def sparse(self, call: Call, selection: Selection) -> Tensor:
        """Output [B, N, S, D] of a sparse step."""
        return near(call, selection, self.precision)[0]


@dataclass
class Merge(Nothing):
    """The far part of the last full step, merged by log-sum-exp; kept in e4m3 unless `wide`."""

    remembers: ClassVar[bool] = True
    wide: bool = False
    output: Tensor | None = None
    lse: Tensor | None = None

    def full(self, call: Call, selection: Selection, output: Tensor, lse: Tensor) -> None:
        """See `Nothing.full`."""
        other = selection.complement(blocks_in(call.k.shape[2], selection.key_block))
        far, self.lse = near(call, other, self.precision)
        self.output = far if self.wide else far.clamp(-448, 448).to(torch.float8_e4m3fn)

    def sparse(self, call: Call, selection: Selection) -> Tensor:
        """See `Nothing.sparse`."""
        assert self.output is not None and self.lse is not None
        far = self.output.to(call.q.dtype), self.lse
        return near(call, selection, self.precision, far)[0]


@dataclass
class Ratio(Nothing):
    """Re-ttention: the near part times its share of the sum at the last full step, plus that step's residual.

    The share grows by 0.04 a sparse step, as published, but never beyond one.
    """

    remembers: ClassVar[bool] = True
    growth: float = 0.04
    share: Tensor | None = None
    residual: Tensor | None = None

    def full(self, call: Call, selection: Selection, output: Tensor, lse: Tensor) -> None:
        """See `Nothing.full`."""
        part, part_lse = near(call, selection, self.precision)
        self.share = (part_lse - lse).exp().clamp(max=1)[..., None]
        self.residual = output - (self.share * part).to(output.dtype)

    def sparse(self, call: Call, selection: Selection) -> Tensor:
        """See `Nothing.sparse`."""
        assert self.share is not None and self.residual is not None
        part, _ = near(call, selection, self.precision)
        output = (self.share * part).to(part.dtype) + self.residual
        self.share = (self.share + self.growth).clamp(max=1)
        return output


@dataclass
class Centroid(Nothing):
    """Block means of keys and values left out, each weighing as many tokens as it stands for."""

    def sparse(self, call: Call, selection: Selection) -> Tensor:
        """See `Nothing.sparse`."""
        return near(call, selection, self.precision, centroids(call, selection))[0]


@dataclass
class Tracked(Merge):
    """Ours: the kept far part moves with the block means of now.

    Kept is by how much the far part of the last full step differed from its centroid form. At that step the two add up
    to the exact far part; later the centroids follow queries, keys and values, at the memory of `Merge`.
    """

    def full(self, call: Call, selection: Selection, output: Tensor, lse: Tensor) -> None:
        """See `Nothing.full`."""
        other = selection.complement(blocks_in(call.k.shape[2], selection.key_block))
        far, far_lse = near(call, other, self.precision)
        means, means_lse = centroids(call, selection)
        difference = far.float() - means
        self.output = difference if self.wide else difference.clamp(-448, 448).to(torch.float8_e4m3fn)
        # where nothing is left out both are minus infinity
        self.lse = torch.where(far_lse == -math.inf, 0, far_lse - means_lse)

    def sparse(self, call: Call, selection: Selection) -> Tensor:
        """See `Nothing.sparse`."""
        assert self.output is not None and self.lse is not None
        means, means_lse = centroids(call, selection)
        far = means + self.output.to(means.dtype), means_lse + self.lse
        return near(call, selection, self.precision, far)[0]


def centroids(call: Call, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attention to the means of the blocks left out: float32 output [B, N, S, D] and log-sum-exp [B, N, S]."""
    blocks = blocks_in(call.k.shape[2], selection.key_block)
    groups = call.q.shape[1] // call.k.shape[1]
    keys, values = (pooled(one.float(), selection.key_block) for one in (call.k, call.v))
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    sizes = torch.full((blocks,), float(selection.key_block), device=call.q.device)
    sizes[-1] = call.k.shape[2] - selection.key_block * (blocks - 1)
    scores = call.q.float() @ keys.mT * call.scale + sizes.log()
    taken = selection.mask(blocks).repeat_interleave(selection.query_block, 2)[:, :, : call.q.shape[2]]
    if call.lengths is not None:
        last = (torch.arange(blocks, device=call.q.device) + 1) * selection.key_block
        taken = taken | (last > call.lengths.view(-1, 1, 1, 1))
    scores = scores.masked_fill(taken, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ values, scores.logsumexp(-1)


FAR: dict[str, type[Nothing]] = {
    "none": Nothing,
    "merge": Merge,
    "ratio": Ratio,
    "centroid": Centroid,
    "tracked": Tracked,
}


def near(
    call: Call, selection: Selection | None, precision: str = "exact", far: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the chosen keys of a call."""
    return attention(
        call.q,
        call.k,
        call.v,
        scale=call.scale,
        selection=selection,
        precision=precision,
        lengths=call.lengths,
        far=far,
    )
