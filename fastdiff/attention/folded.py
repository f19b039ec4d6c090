"""Many text tokens that are all alike, attended to as one: exact, and a fraction of the work.

Stable Diffusion 3 without its T5 is told 256 tokens of zeros behind the words. They are alike in every block, since
text tokens carry no positions, so one of them says what all do when the logarithm of their number is added to its
score. The embedded `mini-dit` has 64 patches and 24 words: there it is 89 tokens in the place of 344.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.acceleration import Acceleration, Verdict
from fastdiff.anatomy import anatomy, denoiser_arguments, forward_names
from fastdiff.hooks import Hooks

ZEROS = 256
"""Text tokens of zeros that diffusers' Stable Diffusion 3 pipeline appends where there is no T5."""
_TEXT, _KWARGS = "encoder_hidden_states", "joint_attention_kwargs"


class FoldedAttention:
    """Joint attention in which the last text token may stand for many that are all alike; no masks.

    Args:
        last: how many tokens it stands for where a call does not say.
        dtype: of the attention itself; None for that of the projections.
    """

    def __init__(self, last: int = 1, dtype: torch.dtype | None = None) -> None:
        self.last = last
        self.dtype = dtype

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        last: int | None = None,
    ) -> Any:
        """``[B, N, C]`` and ``[B, S, C]`` to the same; without text, plain attention of the first to itself."""

        def heads(x: Tensor, norm: Any) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return (x if norm is None else norm(x)).to(self.dtype or x.dtype)

        count = hidden_states.shape[1]
        query = [heads(attn.to_q(hidden_states), attn.norm_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k)]
        value = [heads(attn.to_v(hidden_states), None)]
        many, bias = last or self.last, None
        if encoder_hidden_states is not None:
            query.append(heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q))
            key.append(heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k))
            value.append(heads(attn.add_v_proj(encoder_hidden_states), None))
            if many > 1:
                total = count + encoder_hidden_states.shape[1]
                bias = functional.pad(query[0].new_full((1, 1, 1, 1), math.log(many)), (total - 1, 0))
        q, k, v = (torch.cat(part, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = attn.to_out[0](mixed[:, :count])
        if encoder_hidden_states is None:
            return out
        return out, None if attn.context_pre_only else attn.to_add_out(mixed[:, count:])


@dataclass(frozen=True)
class FoldedText(Acceleration):
    """Attend once to text tokens that are all alike. Exact.

    For Stable Diffusion 3 without its T5, whose prompts end in 256 tokens of zeros. A call whose prompt does not end
    in zeros is left as it is.
    """

    stage: ClassVar[str] = "attention"

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Needs joint attention as Stable Diffusion 3 has it, by diffusers' own processors, and no T5."""
        denoiser = anatomy(pipe).denoiser
        if not _is_joint(denoiser):
            return Verdict(False, f"{type(denoiser).__name__} has no joint attention by diffusers' own processors")
        if getattr(pipe, "text_encoder_3", None) is not None:
            return Verdict(False, "a T5 fills the tokens that would be alike; load without it: text_encoder_3=None")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Other processors, and a shorter text around every call."""
        denoiser = anatomy(pipe).denoiser
        for module in _joint(denoiser):
            hooks.set(module, "processor", FoldedAttention())

        def around(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            given = denoiser_arguments(denoiser, args, kwargs)
            # looked at every time: whoever calls may write other words into the same tensor
            last = alike(given[_TEXT])
            hooks.counter.count(last > 1)
            return inner(**shortened(given, last))

        hooks.wrap(denoiser, "forward", around)


def alike(text: Tensor) -> int:
    """How many of the last tokens of ``[B, S, E]`` are zeros in every row of the batch."""
    told = text.ne(0).any(-1).any(0)
    return int((told.flip(0).cumsum(0) == 0).sum())


def shortened(given: dict[str, Any], last: int) -> dict[str, Any]:
    """A denoiser call's arguments with one token for the ``last`` of its text, and word of it for the processors."""
    if last < 2:
        return given
    told = {**(given.get(_KWARGS) or {}), "last": last}
    return {**given, _TEXT: given[_TEXT][:, : 1 - last], _KWARGS: told}


def folded(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser with joint attention that folds by itself, as do copies of it; to be called by name.

    It has the parameters' names and values of the original; distillation trains on it.
    """
    made: Any = copy.deepcopy(denoiser)
    for module in _joint(made):
        module.processor = FoldedAttention()
    # a hook, not another forward, which would call the one it was copied from
    made.register_forward_pre_hook(_shorten, with_kwargs=True)
    return made


def _shorten(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, shortened(kwargs, alike(kwargs[_TEXT]))


def _joint(denoiser: nn.Module) -> list[Any]:
    return [module for module in denoiser.modules() if hasattr(module, "processor") and hasattr(module, "to_q")]


def _is_joint(denoiser: nn.Module) -> bool:
    names = {type(module.processor).__name__ for module in _joint(denoiser)}
    return names == {"JointAttnProcessor2_0"} and {_TEXT, _KWARGS} <= set(forward_names(denoiser))
