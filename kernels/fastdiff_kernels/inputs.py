"""What every operation asks of queries, keys and values before it begins."""

import torch
from torch import Tensor

HEADS = (1, 256)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_inputs(operation: str, q: Tensor, k: Tensor, v: Tensor | None = None, wide: bool = True) -> None:
    """Raise a `ValueError` unless q is [B, N, S, D] and k and v are [B, M, T, D] that go with it.

    Args:
        operation: its name, for the message.
        wide: whether float64 is taken too, as references do.
    """
    v = k if v is None else v
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"{operation} takes q [B, N, S, D] and k, v [B, M, T, D], not {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} differ in batch or head size, or q's heads are no multiple of k's"
        )
    allowed = (*KERNEL_DTYPES, torch.float64) if wide else KERNEL_DTYPES
    if q.dtype not in allowed or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v are of one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not HEADS[0] <= q.shape[3] <= HEADS[1]:
        raise ValueError(f"a head has {HEADS[0]} to {HEADS[1]} channels, not {q.shape[3]}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k and v lie on {q.device}, {k.device}, {v.device}; move them to one device")


def check_lengths(lengths: Tensor | None, q: Tensor) -> None:
    """Raise a `ValueError` unless these are int32 [B] beside q, or None."""
    if lengths is None:
        return
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths are int32 [{q.shape[0]}], not {lengths.dtype} {list(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"lengths lie on {lengths.device} and q on {q.device}; move them")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """Raise a `ValueError` unless the log-sum-exp is [B, N, S] beside q."""
    if lse.shape != q.shape[:3] or lse.device != q.device:
        raise ValueError(
            f"the log-sum-exp of q {list(q.shape)} is {list(q.shape[:3])} on {q.device}, "
            f"not {list(lse.shape)} on {lse.device}"
        )
