"""`fastdiff demo` as a program: it serves, it locks, it ends, and says in one line what it cannot do."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fastdiff_app.failures import ExitCode


@pytest.mark.slow
def test_it_serves_by_https_behind_a_password_and_leaves_nothing_when_it_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fastdiff_app.cli", "demo", "--model", "identity", "--size", "64", "--https",
             "--auth", "ann:s3cret", "--port", "0"]  # fmt: skip
    inside = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=inside)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[0]
        health = httpx.get(f"{address}/health", verify=False, timeout=120)
        assert health.json()["ready"]
        assert health.json()["model"] == "identity"
        assert httpx.get(f"{address}/", verify=False).status_code == 401
        page = httpx.get(f"{address}/", verify=False, auth=("ann", "s3cret"))
        assert page.status_code == 200
        assert "Secure" in page.headers["set-cookie"]
        assert "fastdiff" in page.text
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert address.startswith("https://127.0.0.1:")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--auth", "nobody"), "USER:PASSWORD"),
        (("--max-users", "0"), "--max-users"),
        (("--port", "99999"), "--port"),
        (("--target-ms", "0"), "--target-ms"),
        (("--model", "no/such-model"), "no/such-model"),
        (("--model", "identity", "--plan", "fastest"), "exact, balanced, fast"),
    ],
)
def test_what_cannot_be_served_is_one_line(program, words: tuple[str, ...], said: str) -> None:
    ran = program("demo", *words)
    assert ran.code != 0
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(program) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = program("demo", "--model", "identity", "--port", taken.getsockname()[1])
    assert ran.code == ExitCode.USAGE
    assert "choose another --port" in ran.err
