"""Linear layers whose weights and kernels are torchao's. Imported nowhere until a plan asks for one."""

from importlib.util import find_spec
from typing import Any

import torch

from fastdiff.acceleration import Unsupported

REMEDY = "pip install 'torchao>=0.15'"
# config class of torchao.quantization, what it needs, in words a verdict can use
KINDS = {
    "torchao-int8": ("Int8DynamicActivationInt8WeightConfig", ""),
    "torchao-int8-weight": ("Int8WeightOnlyConfig", ""),
    "torchao-fp8": ("Float8DynamicActivationFloat8WeightConfig", "a GPU of compute capability 8.9 or higher"),
    "torchao-fp8-weight": ("Float8WeightOnlyConfig", ""),
    "torchao-int4": ("Int4WeightOnlyConfig", "a GPU of compute capability 8.0 or higher"),
}
"""Schemes torchao computes, by the name that plans use."""


def missing(kind: str, device: str) -> str:
    """Why a scheme cannot run on a kind of device here; empty when it can."""
    if find_spec("torchao") is None:
        return f"{kind} needs torchao, which is not installed: {REMEDY}"
    needs = KINDS[kind][1]
    if not needs:
        return ""
    least = (8, 9) if "8.9" in needs else (8, 0)
    if device != "cuda" or torch.cuda.get_device_capability() < least:
        return f"{kind} needs {needs}; use torchao-int8 or w8a8"
    return ""


def torchao_linear(linear: torch.nn.Linear, kind: str) -> torch.nn.Module:
    """A linear layer like `linear`, which is left as it is, with its weight in a scheme of torchao.

    Raises:
        Unsupported: torchao is not there, or refuses this layer; the message has its reason.
    """
    reason = missing(kind, linear.weight.device.type)
    if reason:
        raise Unsupported(reason)
    import torchao.quantization as torchao  # type: ignore[import-not-found]

    copied = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    copied.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    copied.bias = linear.bias
    holder = torch.nn.Sequential(copied)
    config: Any = getattr(torchao, KINDS[kind][0])
    settings = {"granularity": torchao.PerRow()} if kind == "torchao-fp8" else {}
    try:
        torchao.quantize_(holder, config(**settings))
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        shape = f"{linear.in_features} x {linear.out_features}"
        raise Unsupported(f"torchao refuses {kind} for a layer of {shape} ({error}); use another scheme") from error
    return holder[0]
