"""Many text tokens that are all alike, attended to as one: exact, and a fraction of the work.

Stable Diffusion 3 without its T5 is told 256 tokens of zeros behind the words. They are alike in every block, since
text tokens carry no positions, so one of them says what all do when the logarithm of their number is added to its
score. The miniature has 64 patches and 24 words: there it is 89 tokens in the place of 344.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ZEROS = 256
"""Text tokens of zeros that diffusers' Stable Diffusion 3 pipeline appends where there is no T5."""


class FoldedAttention:
    """Joint attention in which the last text token stands for ``last`` tokens that are all alike; no masks.

    Args:
        last: how many tokens the last one stands for.
        dtype: of the attention itself; None for that of the projections.
    """

    def __init__(self, last: int = 1, dtype: torch.dtype | None = None) -> None:
        self.bias = math.log(last)
        self.dtype = dtype

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Any:
        """``[B, N, C]`` and ``[B, S, C]`` to the same; without text, plain attention of the first to itself."""

        def heads(x: Tensor, norm: Any) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return (x if norm is None else norm(x)).to(self.dtype or x.dtype)

        count = hidden_states.shape[1]
        query = [heads(attn.to_q(hidden_states), attn.norm_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k)]
        value = [heads(attn.to_v(hidden_states), None)]
        bias = None
        if encoder_hidden_states is not None:
            query.append(heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q))
            key.append(heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k))
            value.append(heads(attn.add_v_proj(encoder_hidden_states), None))
            total = count + encoder_hidden_states.shape[1]
            bias = functional.pad(query[0].new_full((1, 1, 1, 1), self.bias), (total - 1, 0))
        q, k, v = (torch.cat(part, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = attn.to_out[0](mixed[:, :count])
        if encoder_hidden_states is None:
            return out
        return out, None if attn.context_pre_only else attn.to_add_out(mixed[:, count:])


def folds(pipe: Any) -> bool:
    """Whether prompts of the pipeline end in `ZEROS` tokens of zeros that its transformer may fold."""
    if type(pipe).__name__ != "StableDiffusion3Pipeline" or pipe.text_encoder_3 is not None:
        return False
    return all(type(one).__name__ == "JointAttnProcessor2_0" for one in pipe.transformer.attn_processors.values())


def folded(denoiser: nn.Module) -> nn.Module:
    """A copy of a Stable Diffusion 3 transformer that folds the zeros of prompts without T5.

    The copy has the parameters' names and values of the original and takes the same arguments, by name.
    """
    made: Any = copy.deepcopy(denoiser)
    made.set_attn_processor(FoldedAttention(ZEROS))
    # a hook, not another forward: copies of the copy fold too
    made.register_forward_pre_hook(_shorten, with_kwargs=True)
    return made


def _shorten(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    text = kwargs["encoder_hidden_states"]
    if text[:, -ZEROS:].any():
        raise ValueError(f"the last {ZEROS} text tokens of a prompt without T5 must be zeros")
    return args, kwargs | {"encoder_hidden_states": text[:, : 1 - ZEROS]}
