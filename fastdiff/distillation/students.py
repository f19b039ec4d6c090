"""What a distillation leaves: a LoRA file (adapters, or a denoiser), how to sample from it, and a card."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.anatomy import anatomy
from fastdiff.distillation import adapters, shelf
from fastdiff.distillation.continuous import ContinuousConsistency
from fastdiff.distillation.diffusers_networks import LORA_FILE
from fastdiff.distillation.networks import Levels
from fastdiff.distillation.objective import Objective
from fastdiff.distillation.phased import Phased
from fastdiff.sampling import schedule

CARD = """---
license: apache-2.0
library_name: diffusers
---

# A student of {teacher}

Distilled with `{objective}` and `{settings}`. {how}
"""


SECOND_ANGLE = 1.3
"""TrigFlow's angle of the second of two steps, as SANA-Sprint samples (https://arxiv.org/abs/2503.09641)."""


def levels_of(objective: Objective, levels: Levels) -> dict[str, list[int]]:
    """The levels a student is called at, noisy to clean, for each number of steps it takes; empty where any will do."""
    if isinstance(objective, ContinuousConsistency):
        second = round(float(levels.level_of(torch.tensor([math.tan(SECOND_ANGLE)]))))
        return {"1": [levels.last], "2": [levels.last, second]}
    if not isinstance(objective, Phased):
        return {}
    if not objective.also:
        return {str(len(objective.edges) - 1): list(reversed(objective.edges[1:]))}
    places = sorted({*objective.edges[1:], *objective.also}, reverse=True)
    return {str(count): places[:count] for count in range(1, len(places) + 1)}


def write(
    folder: Path, student: nn.Module, teacher: Any, objective: Objective, settings: Any, lineage: Sequence[str] = ()
) -> None:
    """Write a trained student (a LoRA file, adapters, or a denoiser's folder), ``student.json`` and a card.

    Args:
        lineage: what the card says of the students that this one began as or learned from, a sentence each.
    """
    part: Any = student
    denoiser = anatomy(teacher).denoiser
    name = next(key for key, value in teacher.components.items() if value is denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(student, adapters.Guided):
        adapters.save(folder, student.adapters)
    elif hasattr(part, "peft_config"):
        from peft import get_peft_model_state_dict

        # peft's own names: in those that diffusers' scripts write, its loader does not find the attention layers of
        # a LoRA that also has convolutions
        layers = get_peft_model_state_dict(part, adapter_name="student")
        layers = {key: value.to(torch.float16).contiguous() for key, value in layers.items()}
        teacher.save_lora_weights(str(folder), **{f"{name}_lora_layers": layers})
    else:
        part.save_pretrained(folder / name)
    hops = isinstance(objective, Phased) and not objective.also
    sampling: dict[str, Any] = {"teacher": shelf.fingerprint(denoiser)}
    if not isinstance(student, adapters.Guided):
        levels = levels_of(objective, Levels.of(teacher.scheduler))
        sampling |= {"sampler": "phased" if hops else "consistency", "levels": levels}
        sampling["guidance_scale"] = 1.0
    (folder / "student.json").write_text(json.dumps(sampling, indent=2) + "\n")
    how = "Sample it as `student.json` says: guidance is in the weights, so the scale is 1 and a step is one call."
    if isinstance(student, adapters.Guided):
        how = "Adapters for `fastdiff.distillation.adapters.GuidanceAdapter`, over the denoiser as it is."
    how = " ".join([*lineage, how])
    text = CARD.format(teacher=type(teacher).__name__, objective=objective, settings=settings, how=how)
    (folder / "README.md").write_text(text)


def lora_of(folder: Path) -> dict[str, Tensor]:
    """The layers of a student's LoRA by peft's names within the denoiser."""
    from safetensors.torch import load_file

    return {name.split(".", 1)[1]: value for name, value in load_file(folder / LORA_FILE).items()}


def sampling_of(folder: Path) -> dict[str, Any]:
    """How to sample from a student: sampler, levels, guidance_scale.

    Raises:
        FileNotFoundError: the folder holds no student.
    """
    path = Path(folder) / "student.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no student: it has no student.json")
    return json.loads(path.read_text())


def course_of(folder: Path) -> tuple[int, float]:
    """Steps and guidance scale of a call that names none.

    Raises:
        FileNotFoundError: the folder holds no student.
    """
    sampling = sampling_of(folder)
    return max(map(int, sampling["levels"]), default=4), sampling["guidance_scale"]


def scheduler_of(folder: Path, config: Any) -> Any:
    """diffusers' scheduler for a student of a model with the scheduler configuration ``config``.

    Phased students take deterministic steps (Euler for a flow; TCD, whose gamma must be 0, otherwise), the others
    go to the clean sample and add noise again (LCM).

    Raises:
        FileNotFoundError: the folder holds no student.
    """
    import diffusers

    sampling = sampling_of(folder)
    hops = sampling["sampler"] == "phased"
    if schedule.is_flow(config):
        kind = diffusers.FlowMatchEulerDiscreteScheduler if hops else diffusers.FlowMatchLCMScheduler
        return kind(num_train_timesteps=config["num_train_timesteps"], shift=1.0)
    kept = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas"}
    kind: Any = diffusers.TCDScheduler if hops else diffusers.LCMScheduler
    # the grid these schedulers warn of leaving is the student's own
    grid: dict[str, Any] = {"original_inference_steps": max(map(int, sampling["levels"]))} if sampling["levels"] else {}
    return kind(**{name: config[name] for name in kept if name in config}, **grid)


def steps_of(folder: Path, config: Any, steps: int | None, takes: Container[str]) -> dict[str, Any]:
    """What to hand to a call of the pipeline: ``timesteps`` or ``sigmas``, or the number where any will do.

    Args:
        steps: how many; None takes the most the student was trained for.
        takes: names the pipeline's call knows.

    Raises:
        ValueError: the student was not trained for that many steps.
    """
    known = sampling_of(folder)["levels"]
    if not known:
        count = steps or 4
        even = {"sigmas": [1 - place / count for place in range(count)]}  # a flow's own two steps end next to 0
        return {"num_inference_steps": count} | (even if schedule.is_flow(config) else {})
    wanted = max(known, key=int) if steps is None else str(steps)
    if wanted not in known:
        raise ValueError(f"this student takes {' or '.join(sorted(known, key=int))} steps, not {steps}")
    levels = known[wanted]
    given: dict[str, Any] = {"num_inference_steps": len(levels)}
    if schedule.is_flow(config):
        return given | {"sigmas": [level / config["num_train_timesteps"] for level in levels]}
    given |= {"timesteps": [level - 1 for level in levels]}
    return given | ({"eta": 0.0} if "eta" in takes else {})
