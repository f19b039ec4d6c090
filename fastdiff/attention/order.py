"""Tokens in tiles instead of rows, once per denoiser call.

Attention does not mind the order of its tokens and everything else in a transformer block works on each alone, so
tokens and their positions may be put in any order before the first block and back after the last. In tiles, a block of
consecutive tokens is a small square of the picture, or a cube of the video, which is what sparse selections want.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, block_metadata, blocks, denoiser_arguments, forward_names
from fastdiff.attention.grid import Grid, latent_grid, orders, raster, tiled, token_grid
from fastdiff.hooks import Hooks

# what is added between blocks, or leaves some out, knows nothing of another order
_BETWEEN = ("controlnet", "skip_layer", "residual", "first_frame_num_tokens")
_POSITIONS = ("rotary", "freqs")


@dataclass(frozen=True)
class TokenOrder(Acceleration):
    """Order image tokens by square tiles, for UNets and for DiTs whose blocks diffusers knows. Exact.

    Gains nothing alone: put it after `SparseAttention`, whose blocks then are squares or cubes.

    Args:
        tile: tokens along one side of a tile.
        frames: frames in a tile.
    """

    stage: ClassVar[str] = "attention"
    tile: int = 8
    frames: int = 1

    def __post_init__(self):
        check_number("TokenOrder", "tile", self.tile, low=2, whole=True)
        check_number("TokenOrder", "frames", self.frames, low=1, whole=True)

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Refused where blocks do more than attend and work on single tokens, or diffusers knows nothing of them."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if _takes_ids(denoiser):
                continue
            stacks = block_stacks(denoiser)
            if not stacks:
                return Verdict(False, f"the {name} has no transformer blocks that diffusers knows the arguments of")
            reasons = [reason for _, some in stacks for block in some if (reason := _unfit(block))]
            if reasons:
                return Verdict(False, f"the {name}'s {reasons[0]}, so its tokens cannot be reordered")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser, and around the blocks of those that make their tokens themselves."""
        for denoiser in anatomy(pipe).denoisers.values():
            if _takes_ids(denoiser):
                hooks.wrap(denoiser, "forward", _Door(self, hooks, denoiser).around)
                continue
            channels = getattr(denoiser.config, "in_channels", None)
            stacks = [_Stack(self, hooks, *stack, channels) for stack in block_stacks(denoiser)]
            for stack in stacks:
                stack.wrap()
            # last, so that a request is open when the first stack is entered
            hooks.wrap(denoiser, "forward", _Counted(hooks, denoiser, stacks).around)


def block_stacks(denoiser: Any) -> list[tuple[Any, list[Any]]]:
    """Runs of transformer blocks, each as (the module that makes their tokens, blocks in order of execution).

    A DiT has one, which is its own; a UNet has one in each of its transformers. Only blocks whose arguments diffusers'
    registry knows are given.
    """
    own = [block for _, block in blocks(denoiser)]
    if own:
        return [(denoiser, own)] if all(map(block_metadata, own)) else []
    parts = [(module, [block for _, block in blocks(module)]) for module in denoiser.modules()]
    return [(module, found) for module, found in parts if found and all(map(block_metadata, found))]


def _takes_ids(denoiser: Any) -> bool:
    return {"hidden_states", "img_ids"} <= set(forward_names(denoiser))


def _unfit(block: Any) -> str:
    """Why a block's tokens cannot be reordered; empty when they can."""
    kind = type(block).__name__
    if getattr(block, "pos_embed", None) is not None:
        return f"{kind} adds positions itself"
    mixing = [part for part in block.modules() if isinstance(part, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))]
    if any(max(part.kernel_size) > 1 for part in mixing):
        return f"{kind} convolves over neighbours"
    return ""


def _between(arguments: dict[str, Any]) -> str:
    """The first argument that counts on tokens in rows; empty when there is none."""
    names = [name for name, value in arguments.items() if value is not None and any(one in name for one in _BETWEEN)]
    for name, value in arguments.items():
        if name.endswith("kwargs") and isinstance(value, dict):
            names += [f"{name}[{key!r}]" for key in value if "mask" in key]
    return names[0] if names else ""


class _Door:
    """Reorders what goes into one denoiser that takes tokens with their positions, and what comes out."""

    def __init__(self, settings: TokenOrder, hooks: Hooks, denoiser: Any):
        self.settings = settings
        self.hooks = hooks
        self.denoiser = denoiser

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser with its tokens in tiles."""
        given = denoiser_arguments(self.denoiser, args, kwargs)
        tokens, ids = given.get("hidden_states"), given.get("img_ids")
        other = _between(given)
        fits = isinstance(tokens, Tensor) and isinstance(ids, Tensor) and ids.shape[-2] == tokens.shape[1]
        if other or not fits:
            self.hooks.counter.miss(f"left the order alone: {other or 'img_ids'} does not go with the tokens")
            self.hooks.counter.count(False)
            return inner(*args, **kwargs)
        assert isinstance(tokens, Tensor) and isinstance(ids, Tensor)
        order = tiled(ids.reshape(-1, *ids.shape[-2:])[0], self.settings.tile, self.settings.frames)
        moved = {**given, "hidden_states": tokens[:, order], "img_ids": ids.index_select(-2, order)}
        output = inner(**moved)
        back = order.argsort()
        self.hooks.counter.count(True)
        if isinstance(output, tuple):
            return (output[0][:, back], *output[1:])
        return type(output)(sample=output.sample[:, back])


class _Counted:
    """Counts the calls of one denoiser, reordered or not, and sees to it that a request is open."""

    def __init__(self, hooks: Hooks, denoiser: Any, stacks: list["_Stack"]):
        self.hooks = hooks
        self.denoiser = denoiser
        self.stacks = stacks

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser and count."""
        request = self.hooks.requests.current()
        if request is None:
            with self.hooks.requests.open(stray=True):
                return self.around(inner, *args, **kwargs)
        other = _between(denoiser_arguments(self.denoiser, args, kwargs))
        state = request.state((self, "call"), dict)
        state.update(reason=f"{other} does not go with the tokens" if other else "", moved=False)
        for stack in self.stacks:
            stack.outer = (self, "call")
        output = inner(*args, **kwargs)
        if not state["moved"]:
            self.hooks.counter.miss(f"left the order alone: {state['reason'] or 'no tokens lie in rows'}")
        self.hooks.counter.count(state["moved"])
        return output


class _Stack:
    """Consecutive transformer blocks, and the module that makes tokens for them.

    Attributes:
        outer: key of what the denoiser call keeps in the request.
    """

    def __init__(self, settings: TokenOrder, hooks: Hooks, container: Any, blocks: list[Any], channels: int | None):
        self.settings = settings
        self.hooks = hooks
        self.container = container
        self.blocks = blocks
        self.channels = channels
        self.outer: Any = None

    def wrap(self) -> None:
        """Stand around the module and its blocks."""
        self.hooks.wrap(self.container, "forward", self.enter)
        for place, block in enumerate(self.blocks):
            self.hooks.wrap(block, "forward", _Block(self, place).around)

    def now(self) -> dict[str, Any]:
        """What is known of the call being served."""
        request = self.hooks.requests.current()
        assert request is not None
        return request.state((self, "now"), dict)

    def enter(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Note the shape that tokens will be made of."""
        arguments = denoiser_arguments(self.container, args, kwargs)
        now = self.now()
        now.clear()
        now["latents"] = latent_grid(arguments, self.channels)
        now["reason"] = _between(arguments)
        return inner(*args, **kwargs)

    def order(self, tokens: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """The order of this call's tokens [B, S, C]; None, with the reason noted, where they stay as they are."""
        now, request = self.now(), self.hooks.requests.current()
        assert request is not None
        call = request.state(self.outer, dict)
        grid = token_grid(now["latents"], tokens.shape[1]) if now.get("latents") else None
        reason = call["reason"] or now.get("reason", "") or _between(arguments)
        if not reason and grid is None:
            reason = f"{tokens.shape[1]} tokens match no level of the latents"
        for name, value in arguments.items():
            if not reason and any(part in name for part in _POSITIONS):
                reason = "" if _all_fit(value, tokens.shape[1]) else f"{name} is not laid out by tokens"
        if reason or grid is None:
            call["reason"] = reason
            return None
        call["moved"] = True
        order = now["order"] = self._known(grid, tokens.device)
        orders(request)[grid] = order
        now["grid"] = grid
        return order

    def _known(self, grid: Grid, device: torch.device) -> Tensor:
        return tiled(raster(grid), self.settings.tile, self.settings.frames).to(device)

    def leave(self) -> None:
        """The order no longer holds."""
        now, request = self.now(), self.hooks.requests.current()
        if request is not None and "grid" in now:
            orders(request).pop(now["grid"], None)
        now.clear()


class _Block:
    """One block of a stack: the first reorders tokens, the last puts them back, all get positions in their order."""

    def __init__(self, stack: _Stack, place: int):
        self.stack = stack
        self.place = place

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the block with tokens in tiles."""
        if torch.compiler.is_compiling():
            raise Unsupported("TokenOrder decides between blocks; compile by Compile(scope='regional')")
        stack, block = self.stack, self.stack.blocks[self.place]
        given = denoiser_arguments(block, args, kwargs)
        tokens = given["hidden_states"]
        order = stack.order(tokens, given) if self.place == 0 else stack.now().get("order")
        if order is None:
            return inner(*args, **kwargs)
        if self.place == 0:
            given["hidden_states"] = tokens[:, order]
        for name, value in given.items():
            if any(part in name for part in _POSITIONS):
                given[name] = _moved(value, order)
        output = inner(**given)
        if self.place < len(stack.blocks) - 1:
            return output
        stack.leave()
        back = order.argsort()
        if not isinstance(output, tuple):
            return output[:, back]
        at = block_metadata(block).return_hidden_states_index
        return tuple(part[:, back] if place == at else part for place, part in enumerate(output))


def _all_fit(value: Any, tokens: int) -> bool:
    """True when every tensor has exactly one side of this length."""
    if isinstance(value, (tuple, list)):
        return all(_all_fit(part, tokens) for part in value)
    return value is None or (isinstance(value, Tensor) and list(value.shape).count(tokens) == 1)


def _moved(value: Any, order: Tensor) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, order) for part in value)
    return value if value is None else value.index_select(list(value.shape).index(len(order)), order.to(value.device))
