"""The arithmetic of layers whose input is cut into strips: what a strip must know of the others, and how it uses it.

Plain tensor functions without communication. `x` has its rows at dimension -2 ([B, C, H, W], [B, C, F, H, W]) unless a
`dim` says otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.parallel.strips import Kernel, Range


def kernel_of(module: Any, dim: int = -2) -> Kernel:
    """The geometry of a convolution or average pool along dimension `dim` (-2: height; -3: frames).

    Raises:
        ValueError: padding that is not zeros, or named padding: neither can be cut.
    """
    if isinstance(module, nn.AvgPool2d):
        size, stride, padding = (_along(value, dim) for value in (module.kernel_size, module.stride, module.padding))
        return Kernel(size, stride, padding, padding)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise ValueError(f"padding {module.padding!r} of mode {module.padding_mode!r} cannot be cut into strips")
    size, stride, padding, dilation = (
        _along(value, dim) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return Kernel(size, stride, padding, padding, dilation)


def convolve(module: Any, x: Tensor, first: int, rows: int, kernel: Kernel, produces: Range, dim: int = -2) -> Tensor:
    """Apply a convolution to consecutive rows so that it gives exactly the output rows `produces`.

    Args:
        module: `nn.Conv2d` or `nn.Conv3d`; its weights and geometry across the other dimensions are used.
        x: input rows from row `first` of the picture on, holding all of `kernel.needs(produces)` inside the picture.
        first: which row of the picture `x` begins with.
        rows: rows of the whole picture.
        kernel: the geometry along `dim`, which may differ from the module's (padding that a caller does by hand).
        produces: the output rows wanted, in the numbering of the whole output.
        dim: the dimension that is cut.

    Returns:
        The output, `produces[1] - produces[0]` rows.
    """
    low, high = kernel.needs(produces)
    x = x.narrow(dim, max(low, 0) - first, min(high, rows) - max(low, 0))
    before, after = max(0, -low), max(0, high - rows)
    if before or after:
        x = F.pad(x, (0, 0) * (-1 - dim) + (before, after))
    padding = list(module.padding)
    padding[dim] = 0
    function = F.conv2d if isinstance(module, nn.Conv2d) else F.conv3d
    return function(x, module.weight, module.bias, module.stride, tuple(padding), module.dilation, module.groups)


def statistics(x: Tensor, groups: int) -> Tensor:
    """Mean and sum of squared deviations of each group of channels of one strip.

    Args:
        x: [B, C, ...].

    Returns:
        [B, groups, 2], float64 for float64 input and float32 for any other: half-precision sums overflow.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    grouped = wide.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(dim=-1)  # [B, groups]
    squares = (grouped - mean[..., None]).square().sum(dim=-1)
    return torch.stack((mean, squares), dim=-1)


def merge(parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Merge the statistics of strips into mean and variance of the whole (Chan, Golub and LeVeque 1979).

    The variance is divided by the number of values, as `nn.GroupNorm` does, not by one less; sums of squared deviations
    never cancel, so it is never negative.

    Args:
        parts: [B, groups, 2] of each strip, as `statistics` gives them.
        counts: values per group in each strip.

    Returns:
        mean and variance, each [B, groups].
    """
    total = counts[0]
    mean, squares = parts[0].unbind(-1)
    for part, count in zip(parts[1:], counts[1:], strict=True):
        difference = part[..., 0] - mean
        squares = squares + part[..., 1] + difference.square() * (total * count / (total + count))
        mean = mean + difference * (count / (total + count))
        total += count
    return mean, squares / total


def follow(stale: Tensor, own_then: Tensor, own_now: Tensor) -> Tensor:
    """Estimate another strip's statistics now from its old ones and how one's own have changed since.

    DistriFusion's correction (Li et al. 2024, arXiv 2402.19481, section 4.2), with the spread scaled rather than
    shifted, by at most 4, so that it cannot become negative. Equal to `stale` bit for bit when nothing has changed.

    Args:
        stale: [B, groups, 2], another strip's statistics of an earlier step.
        own_then, own_now: [B, groups, 2], one's own of that step and of this one.
    """
    mean = stale[..., 0] + (own_now[..., 0] - own_then[..., 0])
    usable = own_then[..., 1] > 0
    ratio = torch.where(usable, own_now[..., 1] / own_then[..., 1].where(usable, torch.ones_like(mean)), 1)
    return torch.stack((mean, stale[..., 1] * ratio.clamp(0.25, 4)), dim=-1)


def normalize(x: Tensor, mean: Tensor, variance: Tensor, module: nn.GroupNorm) -> Tensor:
    """Group normalisation of a strip with given statistics.

    Args:
        x: [B, C, ...].
        mean, variance: [B, groups].
        module: gives eps, weight and bias.
    """
    per_group = x.shape[1] // module.num_groups
    scale = (variance + module.eps).rsqrt().repeat_interleave(per_group, dim=1)  # [B, C]
    mean = mean.repeat_interleave(per_group, dim=1)
    if module.weight is not None:
        scale = scale * module.weight.to(scale.dtype)
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.to(scale.dtype)
    shape = (*scale.shape, *(1,) * (x.dim() - 2))
    return (x.to(scale.dtype) * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _along(value: int | Sequence[int], dim: int) -> int:
    return value if isinstance(value, int) else value[dim]
