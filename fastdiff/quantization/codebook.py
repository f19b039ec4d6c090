"""Vector quantisation: short pieces of a weight replaced by the number of the nearest entry of a small book
(VQ4DiT, https://arxiv.org/abs/2408.17131): two bits a weight with pieces of four and 256 entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_number

from .packing import grouped, pack, unpack

_PIECES = 1 << 16
_CHUNK = 1 << 14
_HELD_OUT = 4
_UNSEEN = 0.3


@dataclass(frozen=True)
class Codebook:
    """Pieces of `length` weights as one of `entries` shared pieces.

    Args:
        length: weights in a piece.
        entries: a power of two up to 256.
        rounds: of k-means.
        candidates, steps: where inputs are given, every piece chooses among its nearest entries by a softmax that is
            trained together with the book, for so many steps, on the layer's output error; the likeliest is kept.
    """

    length: int = 4
    entries: int = 256
    rounds: int = 20
    candidates: int = 4
    steps: int = 100

    def __post_init__(self):
        check_number("Codebook", "length", self.length, 1, whole=True)
        check_number("Codebook", "rounds", self.rounds, 1, whole=True)
        check_number("Codebook", "candidates", self.candidates, 1, self.entries, whole=True)
        check_number("Codebook", "steps", self.steps, 0, whole=True)
        if self.entries not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"Codebook: entries={self.entries!r} must be a power of two from 2 to 256")

    @property
    def _bits(self) -> int:
        return (self.entries - 1).bit_length()

    def encode(self, weight: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Store float32 [N, K]; with inputs [n, K], for the least error of their products rather than of weights."""
        pieces = grouped(weight.float(), self.length).flatten(0, 1)  # [P, length]
        share = None if inputs is None else _importance(inputs, self.length, len(weight))
        book = self._book(pieces, share)
        chosen = _nearest(pieces, book, share)
        if inputs is not None and self.steps:
            held = torch.arange(len(inputs)) % _HELD_OUT == 0
            trained = self._trained(weight.float(), pieces, book, share, inputs[~held].float())
            # kept only where inputs it was not trained on agree
            if _output_error(weight, *trained, inputs[held]) < _output_error(weight, book, chosen, inputs[held]):
                book, chosen = trained
        return {"codes": pack(chosen, self._bits), "book": book.half()}

    def decode(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Float32 [N, K]."""
        across = -(-shape[1] // self.length)
        chosen = unpack(stored["codes"], self._bits, shape[0] * across)
        return _assembled(stored["book"].float(), chosen, shape)

    def _book(self, pieces: Tensor, share: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(pieces), generator=generator).to(pieces.device)[:_PIECES]
        some = pieces[order]
        weights = torch.ones_like(some) if share is None else share[order]
        book = some[: self.entries].clone()
        book = torch.cat([book, book.new_zeros(self.entries - len(book), self.length)])
        for _ in range(self.rounds):
            chosen = _nearest(some, book, None if share is None else weights)
            count = torch.zeros_like(book).index_add_(0, chosen, weights)
            total = torch.zeros_like(book).index_add_(0, chosen, some * weights)
            book = torch.where(count > 0, total / count.clamp_min(1e-20), book)
            empty = (count.sum(1) == 0).nonzero()[:, 0]
            # an entry nobody chose moves to a piece that is served worst
            missed = (weights * (some - book[chosen]).square()).sum(1)
            worst = missed.topk(min(len(empty), len(some))).indices
            book[empty[: len(worst)]] = some[worst]
        return book.half().float()

    def _trained(
        self, weight: Tensor, pieces: Tensor, book: Tensor, share: Tensor | None, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        distance, near = _distances(pieces, book, share).topk(self.candidates, largest=False)
        # the nearest begins as good as chosen
        logits = (-10 * distance / distance.mean().clamp_min(1e-12)).detach().requires_grad_()
        trained = book.clone().requires_grad_()
        optimiser = torch.optim.Adam(
            [{"params": [trained], "lr": 0.005 * float(book.std())}, {"params": [logits], "lr": 0.1}]
        )
        target = inputs @ weight.mT
        power = inputs.square().mean(0)
        for _ in range(self.steps):
            with torch.enable_grad():
                mixed = (logits.softmax(-1)[..., None] * trained[near]).sum(1)
                mixed = mixed.view(len(weight), -1)[:, : weight.shape[1]]
                # a sample of inputs leaves directions unseen, and in those weights count for themselves
                unseen = ((mixed - weight).square() * power).sum(1).mean()
                loss = (inputs @ mixed.mT - target).square().mean() + _UNSEEN * unseen
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
        chosen = near.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
        return trained.detach().half().float(), chosen


def _importance(inputs: Tensor, length: int, rows: int) -> Tensor:
    """[P, length]: the mean square of the inputs that each weight of each piece multiplies."""
    square = inputs.float().square().mean(0, keepdim=True)
    return grouped(square / square.mean().clamp_min(1e-20), length).expand(rows, -1, -1).flatten(0, 1)


def _assembled(book: Tensor, chosen: Tensor, shape: tuple[int, int]) -> Tensor:
    return book[chosen.long()].view(shape[0], -1)[:, : shape[1]]


def _output_error(weight: Tensor, book: Tensor, chosen: Tensor, inputs: Tensor) -> float:
    shape = (weight.shape[0], weight.shape[1])
    return float((inputs.float() @ (_assembled(book, chosen, shape) - weight.float()).mT).square().mean())


def _distances(pieces: Tensor, book: Tensor, share: Tensor | None) -> Tensor:
    """Squared distances [P, entries], each weight's counted by its share [P, length]."""
    if share is None:
        return pieces.square().sum(1, keepdim=True) - 2 * pieces @ book.mT + book.square().sum(1)
    weighted = share * pieces
    return (weighted * pieces).sum(1, keepdim=True) - 2 * weighted @ book.mT + share @ book.square().mT


def _nearest(pieces: Tensor, book: Tensor, share: Tensor | None) -> Tensor:
    parts = [slice(start, start + _CHUNK) for start in range(0, len(pieces), _CHUNK)]
    shares = [None if share is None else share[part] for part in parts]
    return torch.cat([_distances(pieces[part], book, one).argmin(1) for part, one in zip(parts, shares, strict=True)])
