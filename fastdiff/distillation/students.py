"""What a distillation leaves: a LoRA file (or a denoiser) as diffusers loads it, how to sample from it, and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.anatomy import anatomy
from fastdiff.distillation.objective import Objective
from fastdiff.distillation.phased import Phased

CARD = """---
license: apache-2.0
library_name: diffusers
---

# A student of {teacher}

Distilled with `{objective}` and `{settings}`. {how}
"""


def timesteps_of(objective: Objective) -> dict[str, list[int]]:
    """The timesteps a student was trained to be called at, noisy to clean, for each number of steps."""
    if not isinstance(objective, Phased):
        return {}
    if not objective.also:
        return {str(len(objective.edges) - 1): [level - 1 for level in reversed(objective.edges[1:])]}
    places = sorted({*objective.edges[1:], *objective.also}, reverse=True)
    return {str(count): [level - 1 for level in places[:count]] for count in range(1, len(places) + 1)}


def write(folder: Path, student: nn.Module, teacher: Any, objective: Objective, settings: Any) -> None:
    """Write a trained student (a LoRA file, or a denoiser's folder), ``student.json`` and a card."""
    part: Any = student
    name = next(key for key, value in teacher.components.items() if value is anatomy(teacher).denoiser)
    if settings.rank:
        from peft import get_peft_model_state_dict

        # peft's own names: in those that diffusers' scripts write, its loader does not find the attention layers of
        # a LoRA that also has convolutions
        layers = get_peft_model_state_dict(part, adapter_name="student")
        layers = {key: value.to(torch.float16).contiguous() for key, value in layers.items()}
        teacher.save_lora_weights(str(folder), **{f"{name}_lora_layers": layers})
    else:
        part.save_pretrained(folder / name)
    sampler = "tcd" if isinstance(objective, Phased) and not objective.also else "lcm"
    sampling = {"sampler": sampler, "gamma": 0.0, "timesteps": timesteps_of(objective), "guidance_scale": 1.0}
    (folder / "student.json").write_text(json.dumps(sampling, indent=2) + "\n")
    how = "Sample it as `student.json` says: guidance is in the weights, so the scale is 1 and a step is one call."
    text = CARD.format(teacher=type(teacher).__name__, objective=objective, settings=settings, how=how)
    (folder / "README.md").write_text(text)


def sampling_of(folder: Path) -> dict[str, Any]:
    """How to sample from a student: sampler, gamma, timesteps, guidance_scale.

    Raises:
        FileNotFoundError: the folder holds no student.
    """
    path = Path(folder) / "student.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no student: it has no student.json")
    return json.loads(path.read_text())


def scheduler_of(folder: Path, config: Any, steps: int | None = None) -> tuple[Any, list[int]]:
    """diffusers' scheduler for a student of a model with scheduler ``config``, and the timesteps to hand to a call.

    Args:
        steps: how many; None takes the most it was trained for. Without timesteps of its own a student takes any.

    Raises:
        FileNotFoundError: the folder holds no student.
        ValueError: the student was not trained for that many steps.
    """
    from diffusers import LCMScheduler, TCDScheduler

    sampling = sampling_of(folder)
    known = sampling["timesteps"]
    wanted = str(steps) if steps is not None else max(known, key=int, default="")
    if known and wanted not in known:
        raise ValueError(f"this student takes {' or '.join(sorted(known, key=int))} steps, not {steps}")
    kind = TCDScheduler if sampling["sampler"] == "tcd" else LCMScheduler
    kept = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas"}
    return kind(**{name: config[name] for name in kept if name in config}), known.get(wanted, [])
