"""diffusers' First Block Cache, deciding for each row of the batch by itself.

The first block always runs; a row whose first-block residual has hardly changed since it was last computed takes the
rest of the blocks from memory (https://github.com/chengzeyi/ParaAttention). diffusers decides once for the whole batch
from its mean, so that an image depends on what it is batched with; here each row has its own measure, its own memory
and its own run length, and rows are only skipped in fact when all of them may be.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.first_block_cache import FBCBlockHook, FBCHeadBlockHook, FBCSharedBlockState


class RowState(FBCSharedBlockState):
    """State of one request and branch.

    Attributes:
        wants: bool `[B]`, the rows that need computing now; None when all do.
        run: int64 `[B]`, how often in a row each has been taken from memory.
    """

    def __init__(self):
        super().__init__()
        self.wants: torch.Tensor | None = None
        self.run: torch.Tensor | None = None


class RowHead(FBCHeadBlockHook):
    """The hook of the first block."""

    def __init__(self, states: Any, threshold: float, max_run: int, forced: Callable[[], bool]):
        super().__init__(states, threshold)
        self.max_run = max_run
        self.forced = forced

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, decide, and keep the residuals of the rows that were not renewed."""
        state = self.state_manager.get_state()
        before = state.head_block_residual
        output = super().new_forward(module, *args, **kwargs)
        if state.should_compute and state.wants is not None:
            state.head_block_residual = _where(state.wants, state.head_block_residual, before)
        return output

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: torch.Tensor) -> bool:
        state = self.state_manager.get_state()
        before = state.head_block_residual  # [B, S, D]
        state.wants = None
        if before is None or before.shape != hidden_states_residual.shape or self.forced():
            state.run = torch.zeros(len(hidden_states_residual), dtype=torch.int64)
            return True
        change = (hidden_states_residual - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)
        # not (change > threshold), which a NaN would pass as "unchanged"
        wants = ~(change <= self.threshold).cpu() | (state.run >= self.max_run)
        state.run = torch.where(wants, 0, state.run + 1)
        if bool(wants.all()):
            return True
        state.wants = wants.to(hidden_states_residual.device)
        return bool(wants.any())


class RowTail(FBCBlockHook):
    """The hook of every other block; the last one keeps what the blocks added."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or pass its input on; at the tail give the rows that were not renewed what they had."""
        state: Any = self.state_manager.get_state()
        before = state.tail_block_residuals
        output = super().new_forward(module, *args, **kwargs)
        if not (self.is_tail and state.should_compute and state.wants is not None):
            return output
        after, head, wants = state.tail_block_residuals, state.head_block_output, state.wants
        if isinstance(output, torch.Tensor):
            state.tail_block_residuals = (_where(wants, after[0], before[0]), None)
            return _where(wants, output, head + before[0])
        state.tail_block_residuals = tuple(_where(wants, new, old) for new, old in zip(after, before, strict=True))
        known: Any = self._metadata
        rows: list[Any] = list(output)
        places = (known.return_hidden_states_index, known.return_encoder_hidden_states_index)
        for place, start, old in zip(places, head, before, strict=False):
            rows[place] = _where(wants, output[place], start + old)
        return tuple(rows)


def _where(rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)
