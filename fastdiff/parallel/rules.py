"""What each type of layer must do when its input is one strip of a picture. Chosen by module type, not by model.

A rule wraps one module's `forward`. Outside a cut forward (`Cut.now` is None) the module does what it always did.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration import Unsupported
from fastdiff.hooks import Hooks
from fastdiff.parallel import layers
from fastdiff.parallel.exchange import Pass
from fastdiff.parallel.strips import Kernel, Strips

TEMPORAL = ("TemporalBasicTransformerBlock", "TransformerTemporalModel", "AnimateDiffTransformer3D", "MotionModules")
"""Blocks whose attention runs over frames, at one place of the picture."""

# blocks that filter or normalise across rows by functions, where no module can be wrapped
_UNCUTTABLE = (
    "FirUpsample2D", "FirDownsample2D", "KUpsample2D", "KDownsample2D", "AdaGroupNorm", "SpatialNorm",
    "GatedSelfAttentionDense",
)  # fmt: skip
_ROTARY = ("rotary", "rope", "posembed")
# leaves that treat every place of the picture alike
_POINTWISE = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.Embedding, nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh,
    nn.Sigmoid, nn.Mish, nn.LeakyReLU, nn.Softmax, nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList,
)  # fmt: skip
_POINTWISE_NAMES = (
    "RMSNorm", "FP32LayerNorm", "FP32SiLU", "LayerNorm", "Timesteps", "AlphaBlender", "GaussianFourierProjection",
    "SinusoidalPositionalEmbedding", "LpNorm", "GlobalResponseNorm", "ApproximateGELU", "SwiGLU",
)  # fmt: skip


class Cut(threading.local):
    """The forward that this thread is in, if its input is cut. One for each model that rules are installed on."""

    now: Pass | None = None

    @contextmanager
    def during(self, forward: Pass) -> Iterator[Pass]:
        """Make `forward` the current one inside the block."""
        before, self.now = self.now, forward
        try:
            yield forward
        finally:
            self.now = before


@dataclass
class Rules:
    """The rules found for one model.

    Attributes:
        convolutions, normalizations, pools, padded, attentions, embeddings: layer name to module, by what it needs.
        refused: why the model cannot be cut; empty when it can.
        entry: name of the first convolution, whose neighbours' rows come from the input that every rank holds.
    """

    convolutions: dict[str, Any] = field(default_factory=dict)
    normalizations: dict[str, nn.GroupNorm] = field(default_factory=dict)
    pools: dict[str, nn.AvgPool2d] = field(default_factory=dict)
    padded: dict[str, nn.Module] = field(default_factory=dict)
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    refused: str = ""
    entry: str = ""

    @property
    def layers(self) -> frozenset[str]:
        """Names of all layers that have a rule."""
        tables = (self.convolutions, self.normalizations, self.pools, self.padded, self.attentions, self.embeddings)
        return frozenset(name for table in tables for name in table)

    def install(self, hooks: Hooks, cut: Cut) -> None:
        """Wrap every layer that needs it, for this model object only."""
        for name, module in self.convolutions.items():
            hooks.wrap(module, "forward", _Convolution(name, module, cut, name == self.entry))
        for name, module in self.normalizations.items():
            hooks.wrap(module, "forward", _Normalization(name, module, cut))
        for name, module in self.pools.items():
            hooks.wrap(module, "forward", _Pool(name, module, cut))
        for name, module in self.padded.items():
            hooks.wrap(module, "forward", _PaddedDownsample(name, module, cut))
        for name, module in self.attentions.items():
            hooks.wrap(module, "forward", _Attention(name, module, cut))
        for name, module in self.embeddings.items():
            hooks.wrap(module, "forward", _PatchEmbedding(name, module, cut))


def find(model: nn.Module) -> Rules:
    """Choose a rule for every layer of `model` that looks beyond its own place of the picture."""
    rules = Rules()
    inside: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        above = next((inside[prefix] for prefix in inside if name.startswith(prefix + ".")), "")
        if above == "done":
            continue
        reason = _choose(rules, name, module, kind, above)
        if reason:
            rules.refused = rules.refused or f"{name or 'the model'} ({kind}) {reason}"
        if name and (kind in TEMPORAL or name in rules.padded or name in rules.embeddings):
            inside[name] = "temporal" if kind in TEMPORAL else "done"
    first = getattr(model, "conv_in", None)
    if isinstance(first, nn.Conv2d) and "conv_in" in rules.convolutions and layers.kernel_of(first).stride == 1:
        rules.entry = "conv_in"
    return rules


def _choose(rules: Rules, name: str, module: Any, kind: str, above: str) -> str:
    """Put `module` into the table it belongs to; return why it cannot be cut, if it cannot."""
    if kind in _UNCUTTABLE:
        return "works across rows inside its forward, where no rule can reach"
    if any(word in kind.lower() for word in _ROTARY):
        return "turns tokens by their place, which a strip does not know; use ContextParallel for this model"
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return _choose_convolution(rules, name, module)
    if isinstance(module, nn.GroupNorm):
        rules.normalizations[name] = module
    elif isinstance(module, nn.AvgPool2d):
        if not layers.kernel_of(module).local:
            return "pools across rows of two strips"
        rules.pools[name] = module
    elif kind == "Downsample2D" and module.use_conv and module.padding == 0:
        rules.padded[name] = module
    elif kind == "PatchEmbed":
        rules.embeddings[name] = module
    elif all(hasattr(module, part) for part in ("to_q", "to_k", "to_v")):
        if getattr(module, "fused_projections", False):
            return "has fused projections; call pipe.unfuse_qkv_projections() first"
        if above != "temporal":
            rules.attentions[name] = module
    elif isinstance(module, nn.Upsample):
        if module.mode != "nearest":
            return f"resizes by {module.mode}, which needs rows of the neighbours"
    elif not any(module.children()) and not isinstance(module, _POINTWISE) and kind not in _POINTWISE_NAMES:
        return "is a layer that no rule knows; only layers that are known to be exact in strips are cut"
    return ""


def _choose_convolution(rules: Rules, name: str, module: Any) -> str:
    if type(module).forward not in (nn.Conv2d.forward, nn.Conv3d.forward):
        return "computes its convolution in its own way"
    try:
        kernel = layers.kernel_of(module)
    except ValueError as error:
        return str(error)
    if kernel.size > 1 or kernel.stride > 1 or kernel.before:
        rules.convolutions[name] = module
    return ""


@dataclass(frozen=True)
class _Rule:
    name: str
    module: Any
    cut: Cut


@dataclass(frozen=True)
class _Convolution(_Rule):
    entry: bool = False

    def __call__(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x, *args, **kwargs)
        if self.entry and forward.halo_in_input:
            return _enter(forward, self.module, x)
        return _convolve(forward, self.name, self.module, x, layers.kernel_of(self.module))


def _enter(forward: Pass, module: Any, x: Tensor) -> Tensor:
    """The first convolution: the input came with the rows it needs of the neighbours."""
    kernel = layers.kernel_of(module)
    strips = forward.strips
    own = strips.own(forward.rank)
    y = layers.convolve(module, x, max(0, kernel.needs(own)[0]), strips.rows, kernel, own)
    forward.note(strips, y.shape[-1])
    return y


def _convolve(forward: Pass, name: str, module: Any, x: Tensor, kernel: Kernel) -> Tensor:
    strips = forward.level(x.shape[-2])
    output = strips.strided(kernel.stride, kernel.output(strips.rows))
    produces = output.own(forward.rank)
    needs = [kernel.needs(output.own(rank)) for rank in range(strips.ranks)]
    forward.note(strips, x.shape[-1])
    x, first = forward.extend(name, "convolution", x, -2, strips, needs)
    y = layers.convolve(module, x, first, strips.rows, kernel, produces)
    forward.note(output, y.shape[-1])
    return y


class _Normalization(_Rule):
    def __call__(self, inner: Any, x: Tensor) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x)
        if x.dim() == 3:  # [B, C, S]
            strips, width = forward.tokens(x.shape[-1])
            values = x.shape[1] // self.module.num_groups * width
        else:
            strips = forward.level(x.shape[-2])
            forward.note(strips, x.shape[-1])
            values = x[0].numel() // self.module.num_groups // x.shape[-2]
        own = layers.statistics(x, self.module.num_groups)
        parts = forward.share(self.name, "normalization", own, layers.follow)
        mean, variance = layers.merge(parts, [values * rows for rows in strips.heights])
        return layers.normalize(x, mean, variance, self.module)


class _Pool(_Rule):
    def __call__(self, inner: Any, x: Tensor) -> Tensor:
        forward = self.cut.now
        y = inner(x)
        if forward is not None:
            kernel = layers.kernel_of(self.module)
            strips = forward.level(x.shape[-2])
            forward.note(strips.strided(kernel.stride, kernel.output(strips.rows)), y.shape[-1])
        return y


class _PaddedDownsample(_Rule):
    """diffusers' Downsample2D that pads one row below and one column to the right before its convolution."""

    def __call__(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x, *args, **kwargs)
        if self.module.norm is not None:
            x = self.module.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        forward.note(forward.level(x.shape[-2]), x.shape[-1])
        geometry = layers.kernel_of(self.module.conv)
        wide = nn.functional.pad(x, (0, 1))
        return _convolve(forward, self.name, self.module.conv, wide, Kernel(geometry.size, geometry.stride, 0, 1))


class _Attention(_Rule):
    """Self-attention: queries of one's own strip, keys and values of all (or of the window around it).

    The module's own processor runs, with `to_k` and `to_v` answering for the whole picture while it does; so masks,
    adapters, prompts and added keys stay what the processor makes of them. Keys and values travel in one operation.
    """

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        forward = self.cut.now
        if forward is None:
            return inner(*args, **kwargs)
        module = self.module
        query, key, value = module.to_q.forward, module.to_k.forward, module.to_v.forward
        places: list[Tensor] = []
        values: list[Tensor] = []

        def queries(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            places.append(x)
            return query(x, *rest, **options)

        def keys(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            # keys made of what queries are made of are keys of the picture; those of a prompt are whole already
            if not places or x is not places[-1]:
                return key(x, *rest, **options)
            k, v = key(x, *rest, **options), value(x, *rest, **options)
            k, v = self._extended(forward, k, v)
            values.append(v)
            return k

        def values_of(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            return values.pop() if values else value(x, *rest, **options)

        with _answering(module, to_q=queries, to_k=keys, to_v=values_of):
            return inner(*args, **kwargs)

    def _extended(self, forward: Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        strips, width = forward.tokens(k.shape[1])
        everything = [(0, strips.rows)] * strips.ranks
        narrow = forward.portion is not None and not forward.fresh
        needs = strips.windows(reach(forward.portion or 0, strips)) if narrow else everything
        scale = lambda ranges: [(low * width, high * width) for low, high in ranges]  # noqa: E731
        both, _ = forward.extend(
            self.name, "attention", torch.cat((k, v), dim=-1), 1, strips.scaled(width), scale(needs), scale(everything)
        )  # [B, S of all or of the window, C of k and v]
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


def reach(portion: float, strips: Strips) -> int:
    """Rows of a neighbouring strip that attention sees: `portion` of an equal share, rounded, at least one if any."""
    rows = portion * strips.rows / strips.ranks
    return max(1, int(rows + 0.5)) if portion > 0 else 0


class _PatchEmbedding(_Rule):
    """Tokens and their positions are made of the whole input, which every rank holds; each keeps its own."""

    def __call__(self, inner: Any, x: Tensor) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x)
        if forward.whole is None or forward.whole.shape[:2] != x.shape[:2]:
            raise Unsupported(f"{self.name} is not fed the model's input, so its positions are unknown in a strip")
        tokens = inner(forward.whole)  # [B, S, C]
        patch = self.module.patch_size
        strips = Strips(tuple(edge // patch for edge in forward.strips.bounds))
        width = forward.whole.shape[-1] // patch
        forward.note(strips, width)
        low, high = strips.own(forward.rank)
        return tokens[:, low * width : high * width]


@contextmanager
def _answering(module: Any, **answers: Any) -> Iterator[None]:
    """Let submodules answer with other functions inside the block; whatever adapter wraps them takes part."""
    parts = {name: getattr(module, name) for name in answers}
    before = {name: part.__dict__.get("forward") for name, part in parts.items()}
    try:
        for name, answer in answers.items():
            parts[name].__dict__["forward"] = answer
        yield
    finally:
        for name, part in parts.items():
            if before[name] is None:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = before[name]
