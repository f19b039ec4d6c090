"""What a denoiser computes and would exchange, layer by layer, counted once on tensors without data.

The formulas here are those of the papers, written down apart from the code that sends; the tests hold the counters of
real and simulated ranks to them, byte for byte.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.parallel import layers
from fastdiff.parallel.rules import find, reach
from fastdiff.parallel.simulator import FlopCount
from fastdiff.parallel.strips import Kernel, Strips


@dataclass(frozen=True)
class Attending:
    """One self-attention: batch, rows and width of its tokens, channels of keys and values together."""

    batch: int
    rows: int
    width: int
    channels: int


@dataclass(frozen=True)
class Convolving:
    """One convolution that looks beyond its row: values per input row (batch, channels and width), and its geometry."""

    values: int
    rows: int
    kernel: Kernel


@dataclass
class Inventory:
    """The layers of one forward that exchange anything when rows are cut, and its cost on one device.

    Attributes:
        attentions, convolutions: in order of execution; the first convolution is not among them, its input is whole.
        normalizations: values in each group norm's statistics (2 per group and batch row).
        flops: floating-point operations of the forward, two a multiply-add.
        sample: shape of the input; output: elements of the output.
        item: bytes an element.
        weights: bytes of the weights.
        activation: an estimate of the activations' bytes: four times the largest layer's input and output.
    """

    sample: tuple[int, ...]
    item: int
    attentions: list[Attending] = field(default_factory=list)
    convolutions: list[Convolving] = field(default_factory=list)
    normalizations: list[int] = field(default_factory=list)
    flops: int = 0
    output: int = 0
    weights: int = 0
    activation: int = 0

    @property
    def keys_and_values(self) -> int:
        """Elements of all keys and values together."""
        return sum(one.batch * one.rows * one.width * one.channels for one in self.attentions)

    def attention_bytes(self, strips: Strips, rank: int, portion: float | None = None) -> int:
        """What `rank` receives for its attentions: all other keys and values, or a portion of its neighbours'."""
        total = 0
        for one in self.attentions:
            level = strips.level(one.rows)
            low, high = level.own(rank) if portion is None else level.windows(reach(portion, level))[rank]
            rows = one.rows - (high - low) if portion is None else high - low - level.heights[rank]
            total += one.batch * rows * one.width * one.channels
        return total * self.item

    def convolution_bytes(self, strips: Strips, rank: int) -> int:
        """What `rank` receives for its convolutions: the rows it needs and nobody else's."""
        total = 0
        for one in self.convolutions:
            level = strips.level(one.rows)
            out = level.strided(one.kernel.stride, one.kernel.output(one.rows))
            low, high = one.kernel.needs(out.own(rank))
            first, last = level.own(rank)
            total += one.values * (max(0, first - max(0, low)) + max(0, min(one.rows, high) - last))
        return total * self.item

    def normalization_bytes(self, ranks: int) -> int:
        """What a rank receives for its group norms: two numbers a group from every other rank, at least float32."""
        return (ranks - 1) * sum(self.normalizations) * max(4, self.item)

    def output_bytes(self, strips: Strips, rank: int) -> int:
        """What `rank` receives of the finished output."""
        return self.output * (strips.rows - strips.heights[rank]) // strips.rows * self.item

    def forward_bytes(self, strips: Strips, rank: int, portion: float | None = None) -> int:
        """What `rank` receives in one forward."""
        return (
            self.attention_bytes(strips, rank, portion)
            + self.convolution_bytes(strips, rank)
            + self.normalization_bytes(strips.ranks)
            + self.output_bytes(strips, rank)
        )

    def distrifusion_bytes(self, ranks: int) -> float:
        """Bytes a rank receives per forward in DistriFusion as released: halos and moments gathered from all ranks."""
        gathered = (ranks - 1) / ranks * self.keys_and_values
        halos = (ranks - 1) * sum(2 * one.values * one.kernel.before for one in self.convolutions)
        return self.item * (gathered + halos + (ranks - 1) * sum(self.normalizations))

    def operations(self) -> tuple[int, int]:
        """Gathers (attentions, norms, output and the flag) and neighbour exchanges of one forward."""
        return len(self.attentions) + len(self.normalizations) + 2, len(self.convolutions)


def take(denoiser: Any, arguments: dict[str, Any], dtype: torch.dtype | None = None) -> Inventory:
    """Count a denoiser's layers by running a copy of it on the meta device.

    Args:
        denoiser: a diffusers model; it is built again from its configuration, without weights.
        arguments: of its forward, the sample first; tensors on any device, only their shapes matter.
        dtype: of the count; the denoiser's own if not given.
    """
    dtype = denoiser.dtype if dtype is None else dtype
    assert dtype is not None
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config).to(dtype).eval()
    moved = _moved(arguments, dtype)
    sample = next(iter(moved.values()))
    found = Inventory(tuple(sample.shape), dtype.itemsize)
    found.weights = sum(parameter.numel() * dtype.itemsize for parameter in twin.parameters())
    _watch(twin, found)
    with torch.no_grad(), FlopCount() as count:
        output = twin(**moved, return_dict=False)[0]
    found.flops, found.output = count.total, output.numel()
    return found


def _watch(model: nn.Module, found: Inventory) -> None:
    rules = find(model)
    width: dict[str, int] = {}

    def on(module: nn.Module, note: Callable[[Any, Tensor], None]) -> None:
        module.register_forward_pre_hook(lambda part, args: note(part, args[0]))

    def convolution(name: str) -> Callable[[Any, Tensor], None]:
        def note(part: Any, x: Tensor) -> None:
            width["now"] = x.shape[-1]
            # diffusers' encoder pads by hand before a convolution without padding
            if name != rules.entry:
                kernel = layers.kernel_of(part)
                found.convolutions.append(Convolving(x.numel() // x.shape[-2], x.shape[-2], kernel))

        return note

    for name, module in rules.convolutions.items():
        on(module, convolution(name))
    for module in rules.normalizations.values():

        def normalization(part: Any, x: Tensor) -> None:
            width["now"] = x.shape[-1] if x.dim() > 3 else width["now"]
            found.normalizations.append(2 * x.shape[0] * part.num_groups)

        on(module, normalization)
    for module in rules.attentions.values():
        _watch_attention(module, found, width)
    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda part, args, y: _weigh(found, args, y))


def _watch_attention(module: Any, found: Inventory, width: dict[str, int]) -> None:
    places: list[Tensor] = []

    def keys(part: Any, args: Any, output: Tensor) -> None:
        if places and args[0] is places[-1]:
            batch, tokens, channels = output.shape
            columns = width.get("now", 1)
            found.attentions.append(Attending(batch, tokens // columns, columns, 2 * channels))

    module.to_q.register_forward_pre_hook(lambda part, args: places.append(args[0]))
    module.to_k.register_forward_hook(keys)


def _weigh(found: Inventory, args: Any, output: Any) -> None:
    tensors = [part for part in (*args, output) if isinstance(part, Tensor)]
    found.activation = max(found.activation, 4 * sum(part.numel() for part in tensors) * found.item)


def _moved(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta", dtype=dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _moved(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, dtype) for part in value)
    return value
