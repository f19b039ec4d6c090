"""Where students lie, and whether one was made for the weights at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.acceleration import Verdict
from fastdiff.anatomy import anatomy

EMBEDDED = Path(__file__).parents[1] / "miniature" / "weights" / "students"
_LARGEST = 4
_TOLERANCE = 0.05


def fingerprint(denoiser: nn.Module) -> list[float]:
    """Four numbers that tell one set of weights from another in any precision: random projections of the largest."""
    found = []
    largest = sorted(denoiser.named_parameters(), key=lambda item: (-item[1].numel(), item[0]))[:_LARGEST]
    for _, value in largest:
        flat = value.detach().double().flatten().cpu()
        signs = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(flat.numel()), dtype=torch.float64)
        found.append(round(float(flat @ signs / flat.norm().clamp(min=1e-30)), 4))
    return found


def find(source: str, name: str, pipe: Any) -> Path:
    """The folder of a student.

    Args:
        source: a folder, or "embedded" for the student called ``name`` that ships with the embedded model ``pipe`` is.
    """
    model = "mini-dit" if "Transformer" in type(anatomy(pipe).denoiser).__name__ else "mini-sd"
    return kept(source, name, model)


def kept(source: str, name: str, model: str) -> Path:
    """`find` for an embedded model that is known by its name."""
    return EMBEDDED / model / name if source == "embedded" else Path(source).expanduser()


def fits(source: str, name: str, file: str, pipe: Any) -> Verdict:
    """Whether the student is there and was made for the pipeline's weights."""
    folder = find(source, name, pipe)
    if not (folder / "student.json").is_file() or not (folder / file).is_file():
        where = "no student of this kind ships for it" if source == "embedded" else f"{folder} holds none"
        return Verdict(False, f"{where} ({file} and student.json are needed); make one with `fastdiff distill`")
    made_for = json.loads((folder / "student.json").read_text()).get("teacher", [])
    mine = fingerprint(anatomy(pipe).denoiser)
    if len(made_for) != len(mine) or any(abs(a - b) > _TOLERANCE for a, b in zip(made_for, mine, strict=True)):
        return Verdict(False, f"the student {folder.name} was made for other weights; distil one from this model")
    return Verdict(True)
