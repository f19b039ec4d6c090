"""Exact dense attention on GPUs, by whatever is fastest there and right.

cuDNN, FlashAttention-3 (where its package is installed), torch's FlashAttention-2 and our own kernel all give the
log-sum-exp. The first call of a kind (device, dtype, heads, head size, power of two of tokens) measures those that
agree with ours on random inputs of that kind; later calls take the fastest.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Exact = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
TURNS = 3
# relative L1 in bfloat16; a wrong kernel is off by far more
AGREEMENT = 0.02
LONGEST_TRIAL = 1 << 14


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, S, D] and natural log-sum-exp float32 [B, N, S] over all keys, on a GPU."""
    known = candidates()
    if torch.cuda.is_current_stream_capturing():
        return known["ours"](q, k, v, scale)
    tokens = min(LONGEST_TRIAL, 1 << max(q.shape[2], k.shape[2]).bit_length() - 1)
    name = _fastest_for(q.device, q.dtype, q.shape[1], k.shape[1], tokens, q.shape[3])
    return known[name](q, k, v, scale)


@functools.cache
def _fastest_for(device: torch.device, dtype: torch.dtype, heads: int, groups: int, tokens: int, head: int) -> str:
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, heads, tokens, head, dtype=dtype, device=device, generator=generator)
    k, v = torch.randn(2, 1, groups, tokens, head, dtype=dtype, device=device, generator=generator)
    name = fastest(candidates(), q, k, v, head**-0.5, lambda: torch.cuda.synchronize(device))
    log.info("exact attention of %d heads of %d over %d tokens by %s", heads, head, tokens, name)
    return name


def fastest(
    known: Mapping[str, Exact],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    wait: Callable[[], None],
    clock: Callable[[], float] = perf_counter,
) -> str:
    """The name of the fastest of `known` that agrees with "ours" in output and log-sum-exp.

    Those that do not run here, or give something else, are left out and logged.
    """
    expected, expected_lse = known["ours"](q, k, v, scale)
    times: dict[str, float] = {}
    for name, compute in known.items():
        try:
            output, lse = compute(q, k, v, scale)
            wait()
            difference = (output.float() - expected.float()).abs().sum() / expected.float().abs().sum()
            agrees = bool(difference <= AGREEMENT) and bool((lse - expected_lse).abs().amax() <= AGREEMENT)
            if not agrees:
                log.warning("attention by %s gives another result here and is not used", name)
                continue
            best = float("inf")
            for _ in range(TURNS):
                wait()
                start = clock()
                compute(q, k, v, scale)
                wait()
                best = min(best, clock() - start)
            times[name] = best
        except (RuntimeError, ImportError, ValueError, TypeError) as error:
            log.info("attention by %s does not run here: %s", name, error)
    return min(times, key=lambda name: times[name]) if times else "ours"


def candidates() -> dict[str, Exact]:
    """Every implementation by name."""
    return {"ours": _ours, "cudnn": _cudnn, "flash-3": _flash_3, "flash-2": _flash_2}


def _ours(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from . import triton

    return triton.attention(q, k, v, scale, None, None, None, None)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    operation: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, lse = operation(q, *_repeated(q, k, v), None, True, 0.0, False, False, scale=scale)[:2]
    return output, lse.reshape(q.shape[:3])


def _flash_2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    operation: Any = torch.ops.aten._scaled_dot_product_flash_attention
    output, lse = operation(q, *_repeated(q, k, v), 0.0, False, False, scale=scale)[:2]
    return output, lse[..., : q.shape[2]]


def _flash_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    rows = (one.transpose(1, 2) for one in (q, k, v))  # [B, S, N, D]
    output, lse = flash_attn_func(*rows, softmax_scale=scale, return_attn_probs=True)[:2]
    return output.transpose(1, 2), lse


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
