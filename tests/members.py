"""Settings that make each acceleration act within a few steps of a tiny random model, for the contract suite."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from fastdiff.anatomy import anatomy, capture, denoiser_arguments
from fastdiff.attention.linear import FineTune, Linear, SparseLinear
from fastdiff.attention.order import TokenOrder
from fastdiff.attention.sparse import SparseAttention
from fastdiff.caching.block_residual import BlockResidual
from fastdiff.caching.cachequant import CacheQuant
from fastdiff.caching.deep import DeepFeatures
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.caching.forecast import Forecast
from fastdiff.caching.guidance import GuidanceReuse
from fastdiff.caching.units import UnitMask
from fastdiff.quantization.layer_precision import LayerPrecision
from fastdiff.quantization.stored import StoredWeights
from fastdiff.quantization.w8a8 import W8A8
from fastdiff.runtime.compile import Compile
from fastdiff.runtime.precision import Precision
from fastdiff.runtime.slicing import SlicedInference
from fastdiff.runtime.tiles import TiledInference
from fastdiff.runtime.tiny_decoder import TinyDecoder
from fastdiff.sampling.interval import GuidanceInterval
from fastdiff.sampling.noise_shift import NoiseShift
from fastdiff.sampling.steps import StepBudget

STEPS = 6
SIZE = 32


def _tiny_decoder(pipe: Any) -> TinyDecoder:
    torch.manual_seed(3)
    channels = anatomy(pipe).latent_channels
    assert channels is not None
    tiny = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    return TinyDecoder(tiny)


_trained: dict[str, Path] = {}


def _sparse_linear(pipe: Any) -> SparseLinear:
    """Fine-tuned for one step, once a family."""
    name = type(anatomy(pipe).denoiser).__name__ + type(pipe).__name__
    if name not in _trained:
        torch.manual_seed(5)
        denoiser, args, kwargs = capture(pipe, SIZE, SIZE)
        arguments = denoiser_arguments(denoiser, args, kwargs)
        settings = Linear(density=0.5, query_block=4, key_block=4, minimum_tokens=8)
        tuned = FineTune(denoiser, settings, arguments, steps=1)
        tuned.step(arguments)
        _trained[name] = Path(tempfile.mkdtemp()) / "sparse-linear.safetensors"
        tuned.save(_trained[name])
    return SparseLinear(str(_trained[name]))


_SMALL: dict[str, Any] = dict(density=0.5, query_block=4, key_block=4, warm_up=2, refresh=3, minimum_tokens=8)

# settings that make a member act within a few steps of a tiny random model; absent means its defaults
EXAMPLES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Precision": {
        "layout": lambda pipe: Precision("keep", "channels_last"),
        "bfloat16": lambda pipe: Precision("bfloat16", "contiguous"),
    },
    "TinyDecoder": {"given": _tiny_decoder},
    "W8A8": {"hadamard": lambda pipe: W8A8(rotate="hadamard", minimum_features=8, path="eager")},
    "StoredWeights": {"int4": lambda pipe: StoredWeights("int4", minimum_features=8)},
    "LayerPrecision": {
        "mixed": lambda pipe: LayerPrecision((("*attn*", "int8"), ("*ff*", "mxfp4")), minimum_features=8),
    },
    "SparseAttention": {
        "tracked": lambda pipe: SparseAttention(far="tracked", **_SMALL),
        "ratio": lambda pipe: SparseAttention(far="ratio", **_SMALL),
        "antidiagonal": lambda pipe: SparseAttention(select="antidiagonal", far="none", **_SMALL),
        "int8": lambda pipe: SparseAttention(density=1, precision="int8", minimum_tokens=8),
    },
    "SparseLinear": {"one step": _sparse_linear},
    "TokenOrder": {"tiles": lambda pipe: TokenOrder(2)},
    "Forecast": {
        "uniform": lambda pipe: Forecast(warm_up=2),
        "quadratic": lambda pipe: Forecast(order=2, quantity="output"),
        "adaptive": lambda pipe: Forecast("adaptive", threshold=0.5, warm_up=2, max_run=2, quantity="residual"),
    },
    "GuidanceReuse": {"repeat": lambda pipe: GuidanceReuse(warm_up=2)},
    "BlockResidual": {"none kept": lambda pipe: BlockResidual(keep=0, warm_up=2)},
    "DeepFeatures": {"two": lambda pipe: DeepFeatures(branch=1, warm_up=2)},
    "UnitMask": {"attention": lambda pipe: UnitMask((("self-attention", "*", 0.0, 1.0),), warm_up=2)},
    "SlicedInference": {"two": lambda pipe: SlicedInference(2)},
    "CacheQuant": {"some": lambda pipe: CacheQuant((1.0, 0.6, 0.3))},
    "DiffusersCache": {
        "first_block": lambda pipe: DiffusersCache(threshold=0.5, warm_up=2),
        "taylorseer": lambda pipe: DiffusersCache(method="taylorseer", warm_up=2),
        "pyramid": lambda pipe: DiffusersCache(method="pyramid_attention", warm_up=2),
        "mag": lambda pipe: DiffusersCache(method="mag", warm_up=2, ratios=(1.0,) * STEPS),
    },
    "TiledInference": {
        "moving": lambda pipe: TiledInference(4),
        "overlapping": lambda pipe: TiledInference(4, "overlapping"),
    },
    "NoiseShift": {"up": lambda pipe: NoiseShift(tuple((h, 8, (0, 999), (50, 999)) for h in (8, 16)))},
    "GuidanceInterval": {"early": lambda pipe: GuidanceInterval(0.5, 1.0)},
    "StepBudget": {"four": lambda pipe: StepBudget(4)},
    "Compile": {"traced": lambda pipe: Compile(backend="eager")},
}
