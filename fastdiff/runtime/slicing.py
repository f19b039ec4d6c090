"""Large layers computed piece by piece, so that a denoiser needs less memory at once and says the same.

Streamlined Inference (https://arxiv.org/abs/2411.01171). Feature Slicer: what treats frames, pixels or tokens alike is
given a few at a time: a video UNet's spatial layers fewer frames, its temporal ones fewer pixels. Operator Grouping: a
slice goes through a whole chain (norm, activation, convolution, ...) before the next one starts, so that no step in
between exists in full. A norm that spans the slices keeps the statistics of the whole.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks

_KEEP_OWN_COUNT = ("SparseAttention", "SparseLinear", "UnitMask")


@dataclass(frozen=True)
class SlicedInference(Acceleration):
    """Compute resnets, transformer blocks, feed-forwards and temporal convolutions in slices. Exact; saves memory.

    Args:
        slices: pieces of each layer's input; as many as it has rows (or tokens, or lines) at most.
    """

    stage: ClassVar[str] = "blocks"
    slices: int = 4

    def __post_init__(self):
        check_number("SlicedInference", "slices", self.slices, 2, whole=True)

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Refused where a denoiser has none of the layers that can be sliced."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if not any(_slicer(part) for part in denoiser.modules()):
                return Verdict(False, f"the {name} has no resnet, transformer block or feed-forward that can be sliced")
        return Verdict(True)

    def conflict(self, other: Acceleration) -> str:
        """A layer called once a slice cannot keep state from call to call."""
        if type(other).__name__ in _KEEP_OWN_COUNT:
            return "the one calls attention once a slice and the other keeps its state from call to call; keep one"
        return ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every layer that can be sliced."""
        for denoiser in anatomy(pipe).denoisers.values():
            sliced = _Sliced(self.slices, hooks)
            kinds: dict[str, int] = {}
            for part in denoiser.modules():
                slicer = _slicer(part)
                if slicer:
                    kinds[type(part).__name__] = kinds.get(type(part).__name__, 0) + 1
                    hooks.wrap(part, "forward", sliced.bound(slicer, part))
            hooks.wrap(denoiser, "forward", sliced.count)
            hooks.counter.note(f"sliced: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")


class _Sliced:
    """Slices the layers of one denoiser and notes whether any input was large enough to."""

    def __init__(self, slices: int, hooks: Hooks):
        self.slices, self.hooks = slices, hooks
        self.engaged = False

    def count(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stand around the denoiser."""
        self.engaged = False
        output = inner(*args, **kwargs)
        self.hooks.counter.count(self.engaged)
        return output

    def bound(self, slicer: Callable, part: Any) -> Callable:
        """What stands around one layer."""

        def around(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            return slicer(self, part, inner, args, kwargs)

        return around

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """(start, size) of slices that differ by one at most; one alone where there is nothing to slice."""
        count = max(min(self.slices, length), 1)
        if count > 1:
            self.engaged = True
        edges = [place * length // count for place in range(count + 1)]
        return [(start, end - start) for start, end in itertools.pairwise(edges)]


def _slicer(part: Any) -> Callable | None:
    """How a layer is sliced; None where it is not known to allow it."""
    from diffusers.models.attention import BasicTransformerBlock, FeedForward
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(part, (ResnetBlock2D, BasicTransformerBlock)):
        return _by_rows
    if isinstance(part, FeedForward):
        return _by_tokens
    return _by_lines if _is_temporal_chain(part) else None


def _is_temporal_chain(part: Any) -> bool:
    """True for norm, activation, ..., convolution over frames alone, as temporal layers stack them."""
    if not isinstance(part, torch.nn.Sequential) or len(part) < 2 or not isinstance(part[0], torch.nn.GroupNorm):
        return False
    last = part[-1]
    between = all(isinstance(one, (torch.nn.SiLU, torch.nn.ReLU, torch.nn.Dropout)) for one in list(part)[1:-1])
    return (
        between
        and isinstance(last, torch.nn.Conv3d)
        and tuple(last.kernel_size[1:]) == (1, 1) == tuple(last.stride[1:])
    )


def _by_rows(sliced: _Sliced, part: Any, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Rows (frames, or pixels where those were folded into rows) a few at a time."""
    first = args[0] if args else next(iter(kwargs.values()))
    rows = len(first)
    return _joined(
        lambda start, size: inner(
            *(_rows_of(value, start, size, rows) for value in args),
            **{name: _rows_of(value, start, size, rows) for name, value in kwargs.items()},
        ),
        sliced.pieces(rows),
        0,
        rows,
    )


def _by_tokens(sliced: _Sliced, part: Any, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Tokens a few at a time."""
    x, *more = args if args else (kwargs.pop("hidden_states"),)
    axis = x.dim() - 2
    if axis < 0:
        return inner(x, *more, **kwargs)
    length = x.shape[axis]

    def piece(start: int, size: int) -> Tensor:
        return inner(x.narrow(axis, start, size), *more, **kwargs)

    return _joined(piece, sliced.pieces(length), axis, length)


def _by_lines(sliced: _Sliced, part: Any, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Lines of pixels a few at a time, normalised with the statistics of all of them. x is [B, C, F, H, W]."""
    (x,) = args
    norm = part[0]
    scale, shift = whole_statistics(norm, x)

    def piece(start: int, size: int) -> Tensor:
        some = x.narrow(3, start, size) * scale + shift
        for layer in list(part)[1:]:
            some = layer(some)
        return some

    return _joined(piece, sliced.pieces(x.shape[3]), 3, x.shape[3])


def whole_statistics(norm: torch.nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [B, C, 1, ...] that make of x [B, C, ...], or of any part of it, its part of the norm of x."""
    variance, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)).flatten(2), dim=2, correction=0)
    each = x.shape[1] // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(each, 1)  # [B, C]
    shift = -mean.repeat_interleave(each, 1) * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    shape = (*scale.shape, *(1,) * (x.dim() - 2))
    return scale.view(shape), shift.view(shape)


def _rows_of(value: Any, start: int, size: int, rows: int) -> Any:
    """Those rows of a tensor that has as many, also inside a dictionary; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value.narrow(0, start, size)
    if isinstance(value, dict):
        return {name: _rows_of(item, start, size, rows) for name, item in value.items()}
    return value


def _joined(compute: Callable[[int, int], Tensor], pieces: list[tuple[int, int]], axis: int, length: int) -> Tensor:
    """The pieces side by side, each let go of before the next is made."""
    if len(pieces) == 1:
        return compute(*pieces[0])
    whole = None
    for start, size in pieces:
        piece = compute(start, size)
        if whole is None:
            whole = piece.new_empty((*piece.shape[:axis], length, *piece.shape[axis + 1 :]))
        whole.narrow(axis, start, size).copy_(piece)
        del piece
    assert whole is not None
    return whole
