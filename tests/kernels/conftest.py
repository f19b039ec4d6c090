"""Memory that nobody wrote to shows, in outputs and between launches: NaN, or the largest integer."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    # torch fills what it allocates only where algorithms are asked to be deterministic
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.set_deterministic_debug_mode(before)
