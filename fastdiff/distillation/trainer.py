"""Trains a student of a diffusers pipeline with any of the losses; a killed run goes on where it stood.

All data and noise of a step are drawn from (seed, step, rank), so that a resumed run computes what the uninterrupted
one would have, bit for bit on a CPU. accelerate knows the devices: alone this runs in one process, under
`accelerate launch` gradients are averaged over all.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.acceleration import check_number
from fastdiff.anatomy import anatomy
from fastdiff.attention.folded import FoldedText, folded
from fastdiff.distillation import sheet, students
from fastdiff.distillation.adapters import Adapters, Guided, read
from fastdiff.distillation.diffusers_networks import as_network, averaged, encoder, student_of
from fastdiff.distillation.networks import Batch, Levels, Network, Networks
from fastdiff.distillation.objective import Objective
from fastdiff.miniature.source import WorldSource


class Source(Protocol):
    """Where clean latents and captions come from."""

    def take(self, step: int, rank: int, batch: int) -> tuple[Tensor, Sequence[str], torch.Generator]:
        """Latents ``[B, C, h, w]`` as the denoiser sees them, captions, and the step's own generator.

        The same arguments give the same again, in any process.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Args:
        steps: optimizer steps.
        batch: samples a step and process; ``accumulate`` of them add up to one optimizer step.
        learning_rate: of AdamW, after ``warmup`` steps and until the last fifth, in which it falls to zero.
        rank: of the student's LoRA; 0 trains the whole denoiser.
        adapter: width of guidance adapters to train in the place of a LoRA; 0 for none.
        average: decay of the moving average, which is what is kept.
        clip: norm to which gradients are clipped.
        seed: of everything random.
        save_every: steps between checkpoints.
        precision: "no", "bf16" or "fp16", as accelerate names them.
    """

    steps: int
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 50
    rank: int = 16
    adapter: int = 0
    average: float = 0.99
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            check_number("Settings", name, getattr(self, name), low=1, whole=True)
        for name in ("rank", "adapter", "warmup", "seed"):
            check_number("Settings", name, getattr(self, name), low=0, whole=True)
        check_number("Settings", "average", self.average, low=0, high=1)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        fall = max(1, self.steps // 5)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / fall)


def distil(
    pipe: Any,
    objective: Objective,
    source: Source,
    settings: Settings,
    folder: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    start: Path | None = None,
    teacher: Path | None = None,
    student: nn.Module | None = None,
) -> Path:
    """Train to the end and write the student into ``folder``: a LoRA file diffusers loads, or a whole denoiser.

    ``log.jsonl`` there has a line a step, and ``samples.png`` shows what the student drew at the last checkpoint.

    Args:
        pipe: the teacher, unchanged by this.
        folder: also holds the checkpoint; a run with other settings or another objective is refused there.
        on_step: called on the first process with the number of the step done and its loss.
        start: a student of ``pipe`` of the same rank, whose LoRA or adapters this one begins with.
        teacher: a student of ``pipe`` of the same rank, to learn from in its place.
        student: a denoiser to train as a whole, such as `compression.prune` makes, in the place of a copy or LoRA.

    Raises:
        ValueError: the folder holds another run's checkpoint, or ``start`` a student of another shape.
        RuntimeError: the loss is not finite; the last checkpoint is kept.
    """
    run = _Run(pipe, objective, source, settings, folder, start, teacher, student)
    first = run.restore()
    log = _Log(folder / "log.jsonl", first) if run.accelerator.is_main_process else None
    for step in range(first, settings.steps):
        loss = run.step(step)
        if log is not None:
            log.write(step, loss, settings.rate(step))
            on_step(step, loss)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            run.save(step + 1)
    if run.accelerator.is_main_process:
        run.student_with_average()
        lineage = [f"It began as the student {start.name}."] if start else []
        lineage += [f"It learned from the student {teacher.name}."] if teacher else []
        students.write(folder, run.student, pipe, objective, settings, lineage)
    run.accelerator.wait_for_everyone()
    return folder


class _Run:
    """One training run on this process."""

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        source: Source,
        settings: Settings,
        folder: Path,
        start: Path | None,
        teacher: Path | None,
        student: nn.Module | None,
    ):
        from accelerate import Accelerator

        self.objective, self.source, self.settings, self.folder = objective, source, settings, folder
        parts = anatomy(pipe)
        device = parts.denoiser.device
        self.accelerator = Accelerator(mixed_precision=settings.precision, cpu=device.type == "cpu")
        self.device = device
        levels = Levels.of(pipe.scheduler)
        folds = FoldedText().supports(pipe)
        denoiser = folded(parts.denoiser) if folds else parts.denoiser
        self.student: nn.Module
        if student is not None:
            self.student = (folded(student) if folds else copy.deepcopy(student)).requires_grad_(True).train()
        elif settings.adapter:
            own = copy.deepcopy(denoiser)
            self.student = Guided(own, _adapters(own, settings, start)).to(device)
        else:
            self.student = student_of(denoiser, settings.rank, settings.seed, start).train()
        taught: Any = denoiser if teacher is None else student_of(denoiser, settings.rank, 0, teacher).eval()
        self.trained = {name: value for name, value in self.student.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.trained.items()}
        self.networks = Networks(
            levels,
            as_network(self.student, levels),
            as_network(taught, levels),
            averaged(self.student, levels, self.average),
            lambda: self._fresh(taught, levels),
            (self.student, taught),
        )
        self.encode, self.pipe = encoder(pipe), pipe
        example = self._batch(0, 0)
        self.shape = example.clean.shape[1:]
        # the source's own captions where they are not of the embedded world
        own = [words for words in source.take(0, 0, settings.batch)[1] if words]
        self.captions = list(sheet.CAPTIONS if isinstance(source, WorldSource) or not own else own[:8])
        self.helpers = objective.helpers(self.networks, example)
        self.optimizers = [_adam(self.trained.values(), settings)]
        helping = [value for value in self.helpers.parameters() if value.requires_grad]
        if helping:
            self.optimizers.append(_adam(helping, settings))

    def _fresh(self, teacher: nn.Module, levels: Levels) -> tuple[nn.Module, Network]:
        made = student_of(teacher, self.settings.rank or 16, self.settings.seed + 1).to(self.device)
        return made, as_network(made, levels)

    def _batch(self, step: int, part: int) -> Batch:
        index = step * self.settings.accumulate + part
        latents, captions, generator = self.source.take(index, self.accelerator.process_index, self.settings.batch)
        empty = self.encode([""] * len(captions))
        return Batch(latents.to(self.device), self.encode(list(captions)), empty, generator, step)

    def step(self, step: int) -> float:
        """One optimizer step of the student, after one of the helpers where there are any; the student's mean loss."""
        batches = [self._batch(step, part) for part in range(self.settings.accumulate)]
        for _ in range(self.objective.helper_steps if self.helpers else 0):
            self._descend(step, 1, self.optimizers[1].param_groups[0]["params"], batches, self.objective.helper_loss)
        loss = self._descend(step, 0, list(self.trained.values()), batches, self.objective.loss)
        decay = min(self.settings.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self.trained.items():
                self.average[name].lerp_(value, 1 - decay)
        return loss

    def _descend(self, step: int, which: int, parameters: list, batches: list[Batch], loss: Callable) -> float:
        optimizer, total = self.optimizers[which], 0.0
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        for batch in batches:
            with self.accelerator.autocast():
                value = loss(self.networks, batch, self.helpers) / len(batches)
            total += float(value.detach())
            self.accelerator.backward(value)
        if not torch.isfinite(torch.tensor(total)):
            raise RuntimeError(f"the loss of step {step} is {total}; lower the learning rate, or clip harder")
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat: Any = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        optimizer.step()
        for one in self.optimizers:  # a loss of the student leaves gradients on helpers, and the other way round
            one.zero_grad(set_to_none=True)
        return total

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _about(self) -> str:
        return f"{self.objective!r} {self.settings!r}"

    def save(self, step: int) -> None:
        """Write everything a resumed run needs, atomically; the first process does."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "about": self._about,
            "step": step,
            "trained": {name: value.detach() for name, value in self.trained.items()},
            "average": self.average,
            "helpers": self.helpers.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)
        self._draw()

    def _draw(self) -> None:
        """The contact sheet of the student's moving average."""
        condition = dict(self.encode(self.captions))
        if isinstance(self.student, Guided):
            condition["guidance_scale"] = torch.full((len(self.captions),), 5.0, device=self.device)
        noise = torch.randn((len(self.captions), *self.shape), generator=torch.Generator().manual_seed(0))
        levels = self.networks.levels
        places, hops = sheet.places_of(self.objective, students.levels_of(self.objective, levels), levels)
        network = self.networks.average
        made = sheet.sample(network, levels, places, hops, noise.to(self.device), condition)
        sheet.draw(self.folder / "samples.png", self.pipe, made)

    @torch.no_grad()
    def restore(self) -> int:
        """The step to go on from; 0 where there is no checkpoint."""
        if not self._checkpoint.exists():
            return 0
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        if state["about"] != self._about:
            raise ValueError(f"{self.folder} holds the checkpoint of another run; choose another folder or delete it")
        for name, value in self.trained.items():
            value.copy_(state["trained"][name])
            self.average[name].copy_(state["average"][name])
        self.helpers.load_state_dict(state["helpers"])
        for one, kept in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(kept)
        return int(state["step"])

    @torch.no_grad()
    def student_with_average(self) -> nn.Module:
        """The student with its moving average in the place of its last weights."""
        for name, value in self.trained.items():
            value.copy_(self.average[name])
        return self.student


def _adapters(denoiser: nn.Module, settings: Settings, start: Path | None) -> Adapters:
    """New adapters, or those of another student, to train further."""
    made = Adapters.of(denoiser, settings.adapter, seed=settings.seed)
    if start is None:
        return made
    kept = read(start)
    if kept.config != made.config:
        raise ValueError(f"{start} cannot be gone on from: its adapters are {kept.config}, not {made.config}")
    made.load_state_dict(kept.state_dict())
    return made


def _adam(parameters: Any, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


class _Log:
    """A line of JSON a step; a resumed run takes back the lines that its checkpoint does not know."""

    def __init__(self, path: Path, first: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text("utf-8").splitlines(keepends=True)[:first] if path.exists() else []
        path.write_text("".join(kept), "utf-8")

    def write(self, step: int, loss: float, rate: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": rate}) + "\n")


class Clock:
    """Prints a line of progress every few seconds; an `on_step` for `distil`."""

    def __init__(self, steps: int, every_s: float = 10.0, show: Callable[[str], Any] = print):
        self.steps, self.every_s, self.show = steps, every_s, show
        self.began = self.last = monotonic()
        self.done, self.mean = 0, 0.0

    def __call__(self, step: int, loss: float) -> None:
        self.done += 1
        self.mean = loss if self.done == 1 else 0.98 * self.mean + 0.02 * loss
        now = monotonic()
        if now - self.last >= self.every_s or step + 1 == self.steps:
            self.last = now
            self.show(f"step {step + 1} of {self.steps}, loss {self.mean:.4f}, {self.done / (now - self.began):.2f}/s")
