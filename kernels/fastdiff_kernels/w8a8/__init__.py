"""Linear layers in 8 bits: y = (Q(x) Wᵀ) · token scale · channel scale + bias, summed in 32-bit integers.

Activations are rounded per token while the layer runs, weights once, per output channel. One signature for every
path: "reference" (float64, obvious), "eager" (torch's integer product, unfused), "compiled" (the same with rounding
and scaling fused by inductor, what is fast on a CPU), "triton" (two kernels). A CPU gains by dot products of bytes
(AVX512-VNNI and later); `fast_on_cpu` says whether this one has them.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST", "PATHS", "best_path", "fast_on_cpu", "linear", "quantise_rows", "quantise_weight"]

PATHS = ("reference", "eager", "compiled", "triton")
MOST = 127
_RECOMPILE_LIMIT = 64


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """A linear layer of 8-bit weights on x rounded to 8 bits per token.

    Args:
        x: [..., K] float16, bfloat16 or float32 (the reference also float64).
        weight: int8 [N, K]; scale: float32 [N], as `quantise_weight` makes them.
        bias: [N] of any float dtype.
        smooth: float32 [K], multiplied into x before it is rounded.
        path: one of `PATHS`; None takes `best_path` of x's device.

    Returns:
        [..., N] in x's dtype. A NaN or infinity reaches every channel of its token and no other token.

    Raises:
        ValueError: shapes, dtypes or names that do not fit, or an x that wants a gradient, which rounding has not.
    """
    _check(x, weight, scale, bias, smooth)
    rows = x.reshape(-1, x.shape[-1])
    path = path or best_path(x.device.type)
    if path not in PATHS:
        raise ValueError(f"path {path!r} is not known; use one of {', '.join(PATHS)}")
    if 0 in (*rows.shape, len(weight)):
        product = rows.new_zeros(len(rows), len(weight))
        return (product if bias is None else product + bias.to(x.dtype)).unflatten(0, x.shape[:-1])
    with torch.no_grad():
        product = _path(path)(rows, weight, scale, bias, smooth)
    return product.view(*x.shape[:-1], len(weight))


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 scale [N] of a weight [N, K], symmetric per output channel."""
    whole, scale = quantise_rows(weight)
    return whole, scale[:, 0]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] in -127..127, half rounded away from zero, and float32 scale [M, 1] of x [M, K]; zeros scale by 1."""
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / MOST)
    ratio = torch.nan_to_num(wide / scale)
    whole = torch.where(ratio >= 0, torch.floor(ratio + 0.5), torch.ceil(ratio - 0.5)).clamp(-MOST, MOST)
    return whole.to(torch.int8), scale


def best_path(device: str) -> str:
    """The fastest path for a kind of device: Triton on CUDA, else fused where there is a C++ compiler."""
    if device == "cuda":
        return "triton"
    # whoever traces has a compiler, and a look for one would break the graph
    return "compiled" if torch.compiler.is_compiling() or has_compiler() else "eager"


@functools.cache
def has_compiler() -> bool:
    """True when inductor will find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))


@functools.cache
def fast_on_cpu() -> bool:
    """True when this CPU multiplies bytes faster than bfloat16 (AVX512-VNNI, AVX-VNNI or AMX)."""
    cpu: Any = torch.cpu
    return bool(cpu._is_vnni_supported() or cpu._is_amx_tile_supported())


def product_eager(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None) -> Tensor:
    """[M, N] of x [M, K]; see `linear`."""
    whole, token = quantise_rows(rows if smooth is None else rows.float() * smooth)
    scaled = _integer_product(whole, weight).float() * token * scale
    return (scaled if bias is None else scaled + bias.float()).to(rows.dtype)


def _integer_product(whole: Tensor, weight: Tensor) -> Tensor:
    if whole.is_cuda and (len(whole) <= 16 or whole.shape[1] % 8 or len(weight) % 8):
        # cuBLAS takes neither few rows nor odd sizes
        return (whole.double() @ weight.double().mT).int()
    return torch._int_mm(whole, weight.t())


@functools.cache
def _fused() -> Callable[..., Tensor]:
    # one dynamic graph serves every size; dtypes, bias and smoothing each make another
    options: Any = {"dynamic": True, "fullgraph": True, "recompile_limit": _RECOMPILE_LIMIT}
    try:
        return torch.compile(product_eager, **options)
    except TypeError:  # before torch 2.13 the limit is not an argument
        del options["recompile_limit"]
        return torch.compile(product_eager, **options)


def _path(path: str) -> Callable[..., Tensor]:
    if path == "triton":
        from . import triton as fast

        return fast.product
    if path == "reference":
        from .reference import product_reference

        return product_reference
    # inside somebody else's graph the plain operations are fused there
    return _fused() if path == "compiled" and not torch.compiler.is_compiling() else product_eager


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be int8 [N, K]")
    outputs, inputs = weight.shape
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; the weight takes floats [..., {inputs}]")
    for name, tensor, size in (("scale", scale, outputs), ("bias", bias, outputs), ("smooth", smooth, inputs)):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be [{size}]")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("an 8-bit linear layer has no gradient; run it under torch.no_grad()")
