"""What makes each denoiser call cheaper, for the planner to weigh against leaving calls out."""

from dataclasses import fields, replace
from typing import Any

from fastdiff.acceleration import STAGES, Acceleration
from fastdiff.attention.sparse import SparseAttention
from fastdiff.caching.deep import DeepFeatures
from fastdiff.caching.guidance import GuidanceReuse
from fastdiff.caching.units import UnitMask
from fastdiff.runtime.precision import Precision

# times a call with one must take less than a plain one, or it is not worth a run
WORTH_IT = 0.95


def cheaper(pipe: Any) -> dict[str, Acceleration]:
    """By name, what could make a call of this pipeline's denoiser cheaper: bits, sparsity, units, branches.

    Each is what can act here by its own word; whether it is faster, and worth its error, is for measurement to say.
    """
    found: dict[str, Acceleration] = {
        "8-bit": _eight_bits(),
        "sparse": SparseAttention(density=0.5, warm_up=2),
        "units": UnitMask((("self-attention", "*", 0.0, 1.0), ("cross-attention", "*", 0.0, 1.0)), warm_up=2),
        "deep": DeepFeatures(branch=1, interval=2, warm_up=2),
        "guidance": GuidanceReuse(warm_up=2),
    }
    if _in_float32(pipe):
        found = {"16-bit": Precision("bfloat16", "contiguous", ("denoiser",)), **found}
    return {name: one for name, one in found.items() if one.supports(pipe)}


def _eight_bits() -> Acceleration:
    from fastdiff.quantization.w8a8 import W8A8

    return W8A8()


def _in_float32(pipe: Any) -> bool:
    import torch

    from fastdiff.anatomy import anatomy

    return next(anatomy(pipe).denoiser.parameters()).dtype == torch.float32


def at_once(one: Acceleration) -> Acceleration:
    """The same without the steps it leaves alone at both ends, so that a short run shows what a long one gains."""
    known = {field.name for field in fields(one)}
    return replace(one, **{name: value for name, value in (("warm_up", 1), ("tail", 0)) if name in known})


def in_order(members: tuple[Acceleration, ...]) -> tuple[Acceleration, ...]:
    """The members as a plan wants them: by stage, and within one as they stand."""
    return tuple(sorted(members, key=lambda one: STAGES.index(one.stage)))
