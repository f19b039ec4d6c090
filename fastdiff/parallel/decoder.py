"""The autoencoder on several ranks: rows with exact halos, or diffusers' own overlapping tiles shared out.

By rows the result is the un-tiled one up to rounding; every rank ends up with the whole picture. By tiles it is bit for
bit what one device makes with tiling on.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks
from fastdiff.parallel import layers
from fastdiff.parallel.agreement import check_same_input, enter, guard_call, together
from fastdiff.parallel.communicator import Communicator, current
from fastdiff.parallel.exchange import Pass, output_sample, with_sample
from fastdiff.parallel.patch import granularity
from fastdiff.parallel.rules import Cut, Rules, find
from fastdiff.parallel.strips import Strips

MODES = ("rows", "tiles")


@dataclass(frozen=True)
class DecoderParallel(Acceleration):
    """Decode (and encode) on all ranks.

    Args:
        mode: "rows" (exact) or "tiles" (turns diffusers' tiling on, no traffic inside the network, seams blended as
            diffusers does).
        encode: cut the encoder into rows too; for image-to-image.
    """

    stage: ClassVar[str] = "devices"

    mode: str = "rows"
    encode: bool = False

    def __post_init__(self):
        check_choice(type(self).__name__, "mode", self.mode, MODES)
        if self.encode and self.mode == "tiles":
            raise ValueError("DecoderParallel: encode=True cuts the encoder into rows; use it with mode='rows'")

    @property
    def exact(self) -> bool:
        """By rows."""
        return self.mode == "rows"

    def supports(self, pipe: Any) -> Verdict:
        vae = anatomy(pipe).vae
        if vae is None or not hasattr(vae, "decoder"):
            return Verdict(False, "this pipeline has no autoencoder with a decoder of its own")
        if self.mode == "tiles":
            if not callable(getattr(vae, "tiled_decode", None)) or not hasattr(vae, "use_tiling"):
                return Verdict(False, f"{type(vae).__name__} cannot tile; use mode='rows'")
        else:
            for part in self._parts(vae):
                refused = find(part).refused
                if refused:
                    return Verdict(False, f"{type(part).__name__} cannot be cut into rows: {refused}; try mode='tiles'")
        return Verdict(True, "" if current().size > 1 else "one rank: nothing was installed; launch more with torchrun")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        communicator = current()
        if communicator.size == 1:
            hooks.counter.expects = "nothing"
            return
        # latents may be asked for instead of pictures
        hooks.counter.expects = "nothing"
        vae = anatomy(pipe).vae
        if self.mode == "tiles":
            hooks.set(vae, "use_tiling", True)
            hooks.wrap(vae, "tiled_decode", _Tiles(vae, communicator, hooks))
        else:
            for part in self._parts(vae):
                rules, cut = find(part), Cut()
                rules.install(hooks, cut)
                multiple = granularity(vae) if part is not vae.decoder else 1
                hooks.wrap(part, "forward", _Rows(part, rules, cut, communicator, hooks, multiple))
        guard_call(hooks, pipe, communicator)

    def _parts(self, vae: Any) -> list[Any]:
        return [vae.decoder, vae.encoder] if self.encode else [vae.decoder]


@dataclass
class _Rows:
    """Runs a decoder or encoder on this rank's rows."""

    part: Any
    rules: Rules
    cut: Cut
    communicator: Communicator
    hooks: Hooks
    multiple: int

    def __call__(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        enter(self.communicator)
        try:
            strips = Strips.share(x.shape[-2], [1.0] * self.communicator.size, self.multiple)
        except ValueError as error:
            self.hooks.counter.note(f"ran whole on every rank: {error}")
            self.hooks.counter.count(False)
            return inner(x, *args, **kwargs)
        check_same_input(self.communicator, x)
        forward = Pass(self.communicator, strips)
        forward.whole = x
        with together(self.communicator), self.cut.during(forward):
            low, high = strips.own(self.communicator.rank)
            if self.rules.entry:
                low, high = layers.kernel_of(self.part.conv_in).needs((low, high))
                low, high = max(0, low), min(strips.rows, high)
                forward.halo_in_input = True
            output = inner(x[..., low:high, :], *args, **kwargs)
            part = output_sample(output)
            levels = forward.level(part.shape[-2])
            shapes = [(*part.shape[:-2], rows, part.shape[-1]) for rows in levels.heights]
            parts = self.communicator.gather("output", part, shapes).wait()
        self.hooks.counter.count(True)
        return with_sample(output, torch.cat(list(parts.values()), dim=-2))


class _Tiles:
    """Runs diffusers' tiled decoding twice: once to decode this rank's tiles, once to blend everybody's.

    The first pass learns which tiles there are by answering with empty ones where another rank has the tile.
    """

    def __init__(self, vae: Any, communicator: Communicator, hooks: Hooks):
        self.vae = vae
        self.communicator = communicator
        self.hooks = hooks

    def __call__(self, inner: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        enter(self.communicator)
        check_same_input(self.communicator, z)
        decoder, ranks = self.vae.decoder, self.communicator.size
        forward = decoder.forward
        scale = granularity(self.vae)
        shapes: list[tuple[int, ...]] = []
        own: dict[int, Tensor] = {}

        def decode_own(tile: Tensor, *rest: Any, **options: Any) -> Tensor:
            if rest or options:
                raise Unsupported("this decoder carries state from tile to tile; use mode='rows'")
            number = len(shapes)
            shapes.append((tile.shape[0], self.vae.config.out_channels, tile.shape[-2] * scale, tile.shape[-1] * scale))
            if number % ranks != self.communicator.rank:
                return tile.new_zeros(shapes[-1])
            own[number] = forward(tile)
            return own[number].clone()

        with together(self.communicator):
            self._run(inner, decoder, decode_own, z, args, kwargs)
            tiles = iter(self._exchange(own, shapes, z))
            result = self._run(inner, decoder, lambda tile: next(tiles), z, args, kwargs)
        self.hooks.counter.count(True)
        return result

    def _run(self, inner: Any, decoder: Any, forward: Any, z: Tensor, args: tuple, kwargs: dict) -> Any:
        before = decoder.__dict__.get("forward")
        decoder.__dict__["forward"] = forward
        try:
            return inner(z, *args, **kwargs)
        finally:
            if before is None:
                del decoder.__dict__["forward"]
            else:
                decoder.__dict__["forward"] = before

    def _exchange(self, own: dict[int, Tensor], shapes: list[tuple[int, ...]], like: Tensor) -> list[Tensor]:
        """Every tile in order, each from the rank that decoded it, in one gather of flattened tiles."""
        ranks = self.communicator.size
        sizes = [torch.Size(shape).numel() for shape in shapes]
        per_rank = [(sum(sizes[rank::ranks]),) for rank in range(ranks)]
        # a rank may have no tile; one element keeps the operation simple
        padded = [(max(1, length),) for (length,) in per_rank]
        flat = torch.cat([own[number].flatten() for number in sorted(own)]) if own else like.new_zeros(1)
        parts = self.communicator.gather("tiles", flat, padded).wait()
        offsets = [0] * ranks
        tiles = []
        for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            rank = number % ranks
            tiles.append(parts[rank][offsets[rank] : offsets[rank] + size].view(shape).clone())
            offsets[rank] += size
        return tiles
