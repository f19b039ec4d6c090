"""Changes of basis that make a layer's inputs and weights easier to round, and leave its output what it was.

x Wᵀ = (x m R) (W m⁻¹ R)ᵀ for any scale m per channel and any orthogonal R: m moves difficulty from activations to
weights (SmoothQuant, https://arxiv.org/abs/2211.10438), R spreads outliers over a block of channels, by a Hadamard
matrix or by rotations found for the outliers at hand (DuQuant, https://arxiv.org/abs/2406.01721, as LRQ-DiT uses it).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_BLOCK = 128
_SWAPS = 64
_WORTH_IT = 0.95


@dataclass(frozen=True)
class Rotation:
    """An orthogonal change of basis of channels: blocks, then perhaps another order, then blocks again.

    Attributes:
        first: [1, b, b] for every block of b channels alike, or [K / b, b, b].
        order: int64 [K], which channel goes where after the first rotation; None leaves the order.
        second: like `first`; None where there is no second rotation.
    """

    first: Tensor
    order: Tensor | None = None
    second: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [..., K]; a weight's rows rotate the same way."""
        x = _blockwise(x, self.first)
        if self.order is not None:
            x = x[..., self.order]
        return x if self.second is None else _blockwise(x, self.second)

    def undo(self, x: Tensor) -> Tensor:
        """Rotate [..., K] back."""
        if self.second is not None:
            x = _blockwise(x, self.second.mT)
        if self.order is not None:
            x = x[..., self.order.argsort()]
        return _blockwise(x, self.first.mT)


@functools.cache
def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix [size, size] of a power of two; it is symmetric and its own inverse. Shared."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix has a power of two rows, and {size} is none")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def block_of(channels: int, largest: int = LARGEST_BLOCK) -> int:
    """The largest power of two up to `largest` that divides a number of channels."""
    return min(channels & -channels, largest)


def hadamard_rotation(channels: int, largest: int = LARGEST_BLOCK) -> Rotation:
    """The same Hadamard rotation in every block of channels."""
    return Rotation(hadamard(block_of(channels, largest))[None])


def outlier_rotation(inputs: Tensor, largest: int = LARGEST_BLOCK) -> Rotation:
    """The rotation found for samples of inputs [n, K]: greedy in each block, channels dealt anew, greedy again."""
    size = block_of(inputs.shape[1], largest)
    first = _greedy(inputs, size)
    turned = _blockwise(inputs, first)
    order = _dealt(turned.abs().amax(0), inputs.shape[1] // size)
    return Rotation(first, order, _greedy(turned[:, order], size))


def best_rotation(inputs: Tensor) -> Rotation | None:
    """None, Hadamard or a found rotation: the simplest whose peaks over root mean square are about the lowest."""
    chosen, lowest = None, peak_ratio(inputs)
    for rotation in (hadamard_rotation(inputs.shape[1]), outlier_rotation(inputs)):
        peak = peak_ratio(rotation.apply(inputs))
        if peak < _WORTH_IT * lowest:
            chosen, lowest = rotation, peak
    return chosen


def peak_ratio(inputs: Tensor) -> float:
    """How far a token's largest entry stands above its root mean square, on average over tokens [n, K]."""
    rms = inputs.square().mean(-1).sqrt().clamp_min(1e-12)
    return float((inputs.abs().amax(-1) / rms).mean())


def smoothing(peak: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Float32 [K] to multiply inputs with (and divide weight columns by): peak**-strength · weight peak**(1-strength).

    Args:
        peak: the largest magnitude [K] each input channel has.
        weight: [N, K].
        strength: 0 leaves all difficulty to activations, 1 moves all of it into weights.
    """
    largest = weight.abs().amax(0).float().clamp_min(1e-5)
    divisor = peak.float().clamp_min(1e-5) ** strength / largest ** (1 - strength)
    return 1 / divisor.clamp(1e-4, 1e4)


def fold_rotation(
    producer: Tensor, bias: Tensor | None, consumer: Tensor, size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights of two layers with nothing but linear mixing of tokens between them, rotated by Hadamard blocks there.

    What passes between them is rotated; what comes out is unchanged, and nothing is computed while they run.

    Args:
        producer: [C, K] and its bias [C]; consumer: [N, C].
        size: a block, such as the channels of one attention head (or a power of two that divides them).
    """
    turn = Rotation(hadamard(size).to(producer)[None])
    turned = turn.apply(producer.mT).mT
    return turned, None if bias is None else turn.apply(bias), turn.apply(consumer)


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    size = blocks.shape[-1]
    parts = x.unflatten(-1, (-1, size))  # [..., K / b, b]
    if len(blocks) == 1:
        return (parts @ blocks[0].to(x)).flatten(-2)
    return (parts[..., None, :] @ blocks.to(x)).flatten(-3)


def _greedy(inputs: Tensor, size: int) -> Tensor:
    """[K / b, b, b]: swaps of the worst channel to the front and spreading it out, so often as it lowers the peak."""
    spread = _spreading(size).to(inputs)
    parts = inputs.unflatten(1, (-1, size)).transpose(0, 1).contiguous()  # [G, n, b]
    turn = torch.eye(size).to(inputs).repeat(len(parts), 1, 1)
    best, lowest = turn.clone(), parts.abs().amax((1, 2))
    for _ in range(_SWAPS):
        worst = parts.abs().amax(1).argmax(1)  # [G]
        swap = torch.arange(size, device=inputs.device).repeat(len(parts), 1)
        swap[:, 0] = worst
        swap.scatter_(1, worst[:, None], 0)
        # where the worst is in front already the scatter above put it back
        step = spread[swap.argsort(1)]  # rows permuted: [G, b, b]
        parts, turn = parts @ step, turn @ step
        peak = parts.abs().amax((1, 2))
        better = peak < lowest
        best = torch.where(better[:, None, None], turn, best)
        lowest = torch.where(better, peak, lowest)
    return best


def _spreading(size: int) -> Tensor:
    """Orthogonal [b, b] whose first row is uniform: the channel in front is spread evenly over all."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q.mT.float()


def _dealt(peak: Tensor, blocks: int) -> Tensor:
    """int64 [K]: channels in falling order of their peaks, dealt to blocks there and back."""
    falling = peak.argsort(descending=True).view(-1, blocks)
    falling[1::2] = falling[1::2].flip(1)
    return falling.mT.flatten()
