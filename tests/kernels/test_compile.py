"""Every kernel compiles for Ampere to Hopper, without a GPU: registers, spills and the matrix instruction it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# in a process of its own: Triton decides at import whether kernels are interpreted
PROGRAM = Path(__file__).with_name("cross_compile.py")
# bytes of shared memory that a block of threads may have
LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448}


def compiled(architecture: int) -> dict[str, dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(architecture)], capture_output=True, text=True, env=environment, check=False
    )
    if ran.returncode:
        pytest.fail(ran.stderr[-3000:])
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
def test_kernels_compile(architecture: int):
    found = compiled(architecture)
    assert len(found) == {80: 15, 86: 15, 89: 16, 90: 19}[architecture]
    for name, row in found.items():
        assert row["spilled_bytes"] <= 64, (name, row)
        assert row["registers"] <= 255, (name, row)
        assert row["shared_bytes"] <= LIMITS[architecture], (name, row)
    if architecture == 90:
        assert "wgmma" in found["exact"]["instructions"]
        assert "wgmma.s8" in found["int8-sparse"]["instructions"]
        assert "wgmma.e4m3" in found["int8_fp8-sparse"]["instructions"]
        assert "wgmma.s8" in found["w8a8-product"]["instructions"]
    else:
        assert all("mma" in row["instructions"] for name, row in found.items() if "sparse" in name)
        assert "mma.s8" in found["w8a8-product"]["instructions"]
