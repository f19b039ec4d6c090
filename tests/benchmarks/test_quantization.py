"""The quantisation benchmark end to end on small shapes."""

from functools import partial
from typing import Any

import pytest

from benchmarks import quantization
from benchmarks.peers import child
from fastdiff.miniature import untrained
from fastdiff.quantization.w8a8 import W8A8Linear


def _absent(peer: str) -> Any:
    raise FileNotFoundError(f"{peer} is not installed: make peers")


@pytest.mark.slow
def test_rows_have_their_figures_and_an_absent_peer_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "python_of", _absent)
    monkeypatch.setattr(quantization, "W8A8Linear", partial(W8A8Linear, path="eager"))
    monkeypatch.setattr(quantization, "GENERATION", {**quantization.GENERATION, "num_inference_steps": 1})
    names = ("int8", "int3", "w8a8-smooth-hadamard")
    monkeypatch.setattr(quantization, "STORED", {name: quantization.STORED[name] for name in names})
    record = quantization.run(prompts=1, pipe=untrained(0), layers={"-small": (16, 64, 48)})
    timed = ["bf16-small", "torchao-int8-small", "fastdiff-w8a8-small", "fastdiff-w8a8-hadamard-small"]
    assert [row.method for row in record.rows] == [
        *timed,
        "stored-not-at-all",
        *(f"stored-{name}" for name in names),
    ]
    assert record.row("bf16-small").ratio == 1.0
    assert "make peers" in record.row("torchao-int8-small").note
    assert record.row("fastdiff-w8a8-small").quality["output_error"].value < 0.02
    stored = [record.row(f"stored-{name}").quality for name in ("int8", "int3")]
    for name in ("weight_error", "output_error"):
        assert 0 < stored[0][name].value < stored[1][name].value
    assert stored[0]["psnr"].value > stored[1]["psnr"].value
    plain = record.row("stored-not-at-all").quality["bytes"].value
    assert stored[1]["bytes"].value < stored[0]["bytes"].value < 0.3 * plain
