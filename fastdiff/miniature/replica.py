"""A bfloat16 replica of a denoiser for training on a CPU: 1.6 times faster than float32; autocast gains nothing here.

Master weights, optimizer and gradients stay float32. Attention itself is computed in float32, because the CPU's fused
backward in bfloat16 takes several times as long.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class Float32Attention:
    """Attention processor: projections in the module's dtype, the attention in float32. No masks, no norms."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused
    ) -> Tensor:
        """[B, S, C] to [B, S, C]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:  # [B, S, C] -> [B, N, S, D]
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()

        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None
        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed.to(hidden_states.dtype))


class Replica:
    """Runs `master`'s forward and backward in bfloat16; gradients arrive at the master's float32 parameters.

    Args:
        master: a UNet or transformer of diffusers; parameters without gradients stay without.
        processor: its attention processor; Float32Attention where None.
    """

    def __init__(self, master: Any, processor: Any = None) -> None:
        self.net = copy.deepcopy(master).to(torch.bfloat16)
        self.net.set_attn_processor(processor or Float32Attention())
        self.masters = list(master.parameters())
        self.copies = list(self.net.parameters())
        for original, duplicate in zip(self.masters, self.copies, strict=True):
            if original.requires_grad:
                duplicate.register_post_accumulate_grad_hook(self._deliver_to(original))

    @staticmethod
    def _deliver_to(original: nn.Parameter):
        def deliver(duplicate: Tensor) -> None:
            assert duplicate.grad is not None
            gradient = duplicate.grad.float()
            original.grad = gradient if original.grad is None else original.grad + gradient
            duplicate.grad = None

        return deliver

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """[B, C, h, w], [B] and the net's own conditions to float32 [B, C, h, w], with the master's present weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.masters)  # type: ignore[call-overload]
        half = torch.bfloat16
        conditions = {name: value.to(half) for name, value in conditions.items()}
        return self.net(x.to(half), timestep=timestep, **conditions, return_dict=False)[0].float()
