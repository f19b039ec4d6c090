"""What benchmarks are tried on."""

from typing import Any

import pytest

from fastdiff.miniature import untrained


@pytest.fixture(scope="module")
def pipe() -> Any:
    made: Any = untrained(0)
    made.set_progress_bar_config(disable=True)
    return made
