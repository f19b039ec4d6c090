"""Exact dense attention goes to the fastest implementation that is right, and only to that."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.attention import attention, dense


def _true(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale=scale, path="gather")


def _wrong(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = _true(q, k, v, scale)
    return output + 0.1, lse


def _shifted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = _true(q, k, v, scale)
    return output, lse + 0.1


def _absent(*args: Any) -> tuple[Tensor, Tensor]:
    raise ImportError("no such package")


def _clock(seconds: dict[str, float], asked: list[str]) -> Iterator[float]:
    """Times at which calls begin and end, when they are made in the order of `asked`."""
    now = 0.0
    for name in asked:
        for _ in range(dense.TURNS):
            yield now
            now += seconds[name]
            yield now


def test_the_fastest_that_is_right_is_taken(caplog: pytest.LogCaptureFixture):
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    known = {"ours": _true, "wrong": _wrong, "absent": _absent, "shifted": _shifted, "quick": _true, "slow": _true}
    ticks = _clock({"ours": 2.0, "quick": 1.0, "slow": 3.0}, ["ours", "quick", "slow"])
    assert dense.fastest(known, q, k, v, 0.25, lambda: None, lambda: next(ticks)) == "quick"
    assert "by wrong gives another result" in caplog.text
    assert "by shifted gives another result" in caplog.text
    ticks = _clock({"ours": 1.0, "slow": 3.0}, ["ours", "slow"])
    known = {"ours": _true, "slow": _true}
    assert dense.fastest(known, q, k, v, 0.25, lambda: None, lambda: next(ticks)) == "ours"


def test_a_tie_keeps_our_own():
    q, k, v = torch.randn(3, 1, 1, 8, 16)
    ticks = _clock({"ours": 1.0, "other": 1.0}, ["ours", "other"])
    known = {"ours": _true, "other": _true}
    assert dense.fastest(known, q, k, v, 0.25, lambda: None, lambda: next(ticks)) == "ours"


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_the_route_equals_our_kernel(groups: int):
    q = torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4 // groups, 300, 64, device="cuda", dtype=torch.bfloat16)
    for found, expected in zip(attention(q, k, v), attention(q, k, v, path="triton"), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.02)
