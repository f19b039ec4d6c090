"""Threads that wait must not spin for long; see `fastdiff_app`."""

import os
import subprocess
import sys

import pytest

CODE = "import sys, os, fastdiff_app; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_programs_say_it_before_torch_is_there_and_leave_the_users_word(own: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    given = {name: value for name, value in os.environ.items() if name not in names} | own
    made = subprocess.run([sys.executable, "-c", CODE], env=given, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == expected
