"""Distance between sets of pictures: unbiased MMD² on fixed features, with jackknife intervals.

A student that re-noises draws other pictures than its teacher from the same noise, so fidelity says nothing about it;
what can be asked is whether its pictures are distributed as the true ones. The features are made by hand (colours,
edges, low frequencies), so no network has to be trusted and nothing is downloaded.
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from .statistics import Interval


def features(pictures: Tensor) -> Tensor:
    """Float64 ``[B, 640]`` of pictures ``[B, 3, H, W]`` in 0..1, H and W at least 8.

    A 4 x 4 x 4 colour histogram (square roots, so that inner products are Hellinger affinities), eight orientations of
    edges in 8 x 8 cells (length 1), and the 8 x 8 lowest cosine coefficients of the grey picture.

    Raises:
        ValueError: another shape.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or min(pictures.shape[-2:]) < 8:
        raise ValueError(f"pictures are [B, 3, H, W] with sides of at least 8, not {list(pictures.shape)}")
    pictures = pictures.double()
    grey = pictures.mean(1)
    return torch.cat([_colours(pictures), _edges(grey), _low(grey)], 1)


def _colours(pictures: Tensor) -> Tensor:
    levels = (pictures * 4).long().clamp(0, 3).flatten(2)
    index = levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]
    return (functional.one_hot(index, 64).sum(1).double() / index.shape[1]).sqrt()


def _edges(grey: Tensor) -> Tensor:
    padded = functional.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    angle = (torch.atan2(down, across) / math.pi % 1 * 8).long().clamp(max=7)
    weighted = functional.one_hot(angle, 8) * (across**2 + down**2).sqrt()[..., None]
    cells = functional.adaptive_avg_pool2d(weighted.permute(0, 3, 1, 2), 8).flatten(1)
    return cells / cells.norm(dim=1, keepdim=True).clamp(min=1e-6)


def _low(grey: Tensor) -> Tensor:
    def cosines(length: int) -> Tensor:
        place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        waves = torch.cos(math.pi * torch.arange(8, dtype=torch.float64)[:, None] * place)
        return waves * (torch.full((8, 1), 2.0).double().index_fill(0, torch.tensor([0]), 1.0).sqrt() / length)

    height, width = grey.shape[-2:]
    return torch.einsum("uh,bhw,vw->buv", cosines(height), grey, cosines(width)).flatten(1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """The cubic kernel of KID (https://arxiv.org/abs/1801.01401), for features of length about 1."""
    return (a @ b.T + 1) ** 3


def _statistic(x: Tensor, y: Tensor) -> Tensor:
    """``[n, n]``: entries (i, j) whose mean off the diagonal is the unbiased MMD² of pairs (x_i, y_i)."""
    cross = _kernel(x, y)
    return _kernel(x, x) + _kernel(y, y) - cross - cross.T


def _jackknife(entries: Tensor) -> Interval:
    count = len(entries)
    if count < 3:
        raise ValueError(f"an interval needs at least 3 pictures, not {count}")
    off = entries - entries.diagonal().diag()
    total = off.sum()
    value = total / (count * (count - 1))
    without = (total - 2 * off.sum(1)) / ((count - 1) * (count - 2))
    spread = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return Interval(float(value), float(value - 1.96 * spread), float(value + 1.96 * spread), count)


def mmd2(x: Tensor, y: Tensor) -> Interval:
    """Unbiased squared maximum mean discrepancy of features ``[n, d]`` each; about 0 for one distribution.

    Pair (x_i, y_i) may share a caption: leaving pairs out (the jackknife) then keeps captions together.

    Raises:
        ValueError: other shapes, or fewer than 3.
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"two sets of one shape [n, d] are needed, not {list(x.shape)} and {list(y.shape)}")
    return _jackknife(_statistic(x.double(), y.double()))


def mmd2_difference(x: Tensor, z: Tensor, y: Tensor) -> Interval:
    """MMD² of ``x`` to ``y`` less that of ``z`` to ``y``, paired by caption; below 0 where ``x`` is the closer."""
    if not x.shape == y.shape == z.shape or x.ndim != 2:
        raise ValueError("three sets of one shape [n, d] are needed")
    x, y, z = x.double(), y.double(), z.double()
    return _jackknife(_statistic(x, y) - _statistic(z, y))
