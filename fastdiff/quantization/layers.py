"""Which linear layers of a denoiser to quantise, and putting others in their places so that it can be undone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks

from .packing import ByteStore
from .transforms import Rotation, hadamard_rotation

SKIP = ("*time*", "*norm*", "*embed*", "*modulation*", "*adaln*", "proj_out")
"""Layers that see one vector a picture, or the last of all: little work, and errors there show most."""
MINIMUM_FEATURES = 256
ROTATIONS = ("none", "hadamard", "found")


@dataclass(frozen=True)
class Place:
    """One linear layer and where it stands.

    Attributes:
        name: the denoiser's name and the layer's path in it, such as "unet.mid_block.attentions.0.proj_in".
        parent, attribute: the module that holds it, and as what.
    """

    name: str
    parent: Any
    attribute: str
    linear: torch.nn.Linear


class QuantisedLinear(ByteStore):
    """What stands in for a linear layer: the shape, the bias, and the change of basis of its inputs.

    Args:
        linear: the layer, which is left as it is; the bias is shared with it.
        smooth: [K] multiplied into inputs; rotation: applied after it.
    """

    def __init__(self, linear: torch.nn.Linear, smooth: Tensor | None = None, rotation: Rotation | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._dtype = linear.weight.dtype
        self._rotated = tuple(
            name for name in ("first", "order", "second") if getattr(rotation, name, None) is not None
        )
        for name in self._rotated:
            self.keep(name, getattr(rotation, name).to(linear.weight.device))
        self._smoothed = smooth is not None
        if smooth is not None:
            self.keep("smooth", smooth.float().to(linear.weight.device))

    @property
    def rotation(self) -> Rotation | None:
        """The rotation of inputs; None where there is none."""
        return Rotation(**self.read_all(self._rotated)) if self._rotated else None

    @property
    def smooth(self) -> Tensor | None:
        """What inputs are multiplied with before they are rotated; None where there is nothing."""
        return self.read("smooth") if self._smoothed else None

    def transformed_weight(self, weight: Tensor) -> Tensor:
        """Float32 [N, K]: a weight in the basis that inputs are brought to."""
        weight, smooth, rotation = weight.detach().float(), self.smooth, self.rotation
        weight = weight if smooth is None else weight / smooth
        return weight if rotation is None else rotation.apply(weight)

    def transformed(self, x: Tensor) -> Tensor:
        """Inputs [..., K] in that basis."""
        smooth, rotation = self.smooth, self.rotation
        x = x if smooth is None else x * smooth.to(x.dtype)
        return x if rotation is None else rotation.apply(x)

    def stored_weight(self) -> Tensor:
        """Float32 [N, K]: the weight as it was kept, in the basis of `transformed`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """[N, K] in the layer's own basis and dtype, made anew at every reading."""
        weight, smooth, rotation = self.stored_weight(), self.smooth, self.rotation
        weight = weight if rotation is None else rotation.undo(weight)
        return (weight if smooth is None else weight * smooth).to(self._dtype)

    def extra_repr(self) -> str:
        """Shape and size, as torch prints modules."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={held_bytes([self])}"


def check_selection(owner: str, minimum_features: int, skip: tuple[str, ...]) -> None:
    """Check the two settings that every acceleration of linear layers has."""
    check_number(owner, "minimum_features", minimum_features, 1, whole=True)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise ValueError(f"{owner}: skip={skip!r} must hold patterns such as '*norm*'")


def places(pipe: Any, minimum_features: int = MINIMUM_FEATURES, skip: tuple[str, ...] = SKIP) -> list[Place]:
    """Every linear layer of the denoisers with so many inputs and outputs, but for those whose path fits `skip`."""
    found = []
    for denoiser, module in anatomy(pipe).denoisers.items():
        for path, attribute, parent, child in _linears(module):
            small = min(child.in_features, child.out_features) < minimum_features
            if not small and not any(fnmatch(path, pattern) for pattern in skip):
                found.append(Place(f"{denoiser}.{path}", parent, attribute, child))
    return found


def _linears(module: Any) -> Iterator[tuple[str, str, Any, torch.nn.Linear]]:
    seen: set[int] = set()
    for path, parent in module.named_modules():
        for attribute, child in parent.named_children():
            # exact: a subclass may do more than multiply
            if type(child) is torch.nn.Linear and id(child) not in seen:
                seen.add(id(child))
                yield f"{path}.{attribute}".lstrip("."), attribute, parent, child


def verdict(found: list[Place], minimum_features: int) -> Verdict:
    """Refused where there is nothing to quantise, or where weights are not plain floats at hand."""
    if not found:
        return Verdict(
            False, f"no linear layer has {minimum_features} inputs and outputs; set a smaller minimum_features"
        )
    for place in found:
        weight = place.linear.weight
        if weight.is_meta:
            return Verdict(False, f"{place.name} is offloaded; load the pipeline without offloading")
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return Verdict(False, f"{place.name} holds quantised weights already; load the model without")
    return Verdict(True)


def install(pipe: Any, hooks: Hooks, made: Sequence[tuple[Place, torch.nn.Module]]) -> None:
    """Put modules in the places of linear layers and count the denoiser's calls.

    The linear layers stay in memory for `remove`, and are reported with the rest.
    """
    for place, module in made:
        module.train(place.linear.training)
        hooks.set(place.parent, place.attribute, module)
    before = held_bytes(place.linear for place, _ in made)
    after = held_bytes(module for _, module in made)
    hooks.counter.held = lambda: before + after
    hooks.counter.note(
        f"{len(made)} linear layers: {before / 2**20:.2f} MiB of weights in {after / 2**20:.2f} MiB; "
        "the originals are kept for removal"
    )

    def around(inner: Callable, *args: Any, **kwargs: Any) -> Any:
        hooks.counter.count(True)
        return inner(*args, **kwargs)

    for denoiser in anatomy(pipe).denoisers.values():
        hooks.wrap(denoiser, "forward", around)


def value_pairs(found: list[Place]) -> dict[str, tuple[Place, int]]:
    """Names of value projections that lead to one output projection only, with that place and a head's channels.

    What attention does between the two mixes tokens and leaves channels alone, so that a rotation of a head's
    channels passes through it.
    """
    by_name = {place.name: place for place in found}
    pairs = {}
    for name, place in by_name.items():
        attention = place.parent
        out = by_name.get(name.removesuffix("to_v") + "to_out.0")
        plain = getattr(attention, "add_v_proj", None) is None and not mixes_pictures(attention)
        heads = getattr(attention, "heads", None)
        if name.endswith(".to_v") and out is not None and plain and isinstance(heads, int):
            channels = place.linear.out_features
            # grouped keys have fewer heads of the same size
            size = out.linear.in_features // heads
            if out.linear.in_features % heads == 0 and channels % size == 0:
                pairs[name] = out, size
    return pairs


def mixes_pictures(attention: Any) -> bool:
    """True when an attention layer adds values of an image prompt (IP-Adapter) to those of its own projection."""
    return getattr(getattr(attention, "processor", None), "to_v_ip", None) is not None


def online_rotation(kind: str, channels: int, inputs: Tensor | None) -> Rotation | None:
    """A rotation of inputs by the name of its kind."""
    from .transforms import best_rotation

    if kind == "none" or channels % 2:
        return None
    if kind == "hadamard":
        return hadamard_rotation(channels)
    if inputs is None:
        raise Unsupported("rotate='found' needs samples of inputs; give statistics= a file that collect() wrote")
    return best_rotation(inputs)


def held_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of the weights that modules hold, whatever wraps them, each counted once however often it is shared."""
    found: dict[int, int] = {}
    for module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name == "bias":
                continue
            wrapped: Any = tensor
            parts = [getattr(wrapped, part) for part in getattr(wrapped, "tensor_data_names", ())] or [wrapped]
            found |= {part.data_ptr(): part.nbytes for part in parts}
    return sum(found.values())
