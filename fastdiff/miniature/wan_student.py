"""The few-step student of `mini-wan`: a LoRA that makes a frame in four calls without guidance, from its own context.

Trained the way it is used (self-rollout, after Self-Forcing, https://arxiv.org/abs/2506.08009): the context of a frame
is what the student made before, up to twelve frames after none to four true ones, and the noisy frame is where its own
earlier calls led. What it should have said there is where the guided teacher's flow ends from that very point, with the
same last frames before it, so no discriminator and no third network are needed. In some rollouts the true frames show
another scene, as they do when the words have just changed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastdiff.video.causal import CausalWan

from . import wan_rollout, wan_weights
from .wan_training import Latents, TextToVideo, captions

DEFAULTS = {"batch": 32, "learning_rate": 1e-3}
STEPS = 4
RANK = 16
GUIDANCE = 2.5
_TEACHER_STEPS = 6  # Euler steps of the teacher from the noisiest level to the frame; fewer from lower ones
_OWN = 12  # frames the student makes before the one it learns from, at most
_SWITCHED = 0.25  # of the rollouts: the words change after the true frames
_FRAMES, _POOL, _PASSES = 33, 768, 4
_TARGETS = r".*attn[12]\.to_(q|k|v|out\.0)|.*ffn\.net\.(0\.proj|2)"


class Student(nn.Module):
    """A Wan transformer with a LoRA that learns; everything else of it stands still."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        from peft import LoraConfig

        self.transformer = copy.deepcopy(teacher).requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS))


def starts(batch: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """First true frame, number of true context frames and of the student's own frames, for one batch.

    A context from the middle of a clip holds at least two frames: one alone does not say where things go. Long rollouts
    are rarer than short ones, for they take longer.
    """
    own = int((_OWN + 1) * rng.random() ** 2)
    if rng.random() < 0.5:
        return 0, int(rng.integers(0, wan_rollout.CONTEXT + 1)), own
    true = int(rng.integers(2, wan_rollout.CONTEXT + 1))
    return int(rng.integers(1, 9 - true + 1)), true, own


def mini_wan_student(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """Mean squared error between the student's estimate and the end of the guided teacher's flow."""
    model = TextToVideo()
    if not wan_weights.load_into("mini-wan", model):
        raise FileNotFoundError("there is no teacher: train mini-wan first")
    model.to(run.device).requires_grad_(False)
    module = Student(model.transformer).to(run.device)
    teacher, student = CausalWan(model.transformer), CausalWan(module.transformer)
    levels = wan_rollout.sigmas(STEPS)
    pools: dict[int, Latents] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Latents(run, rank))
        latents, twins, scenes, rng = pool.take(step, batch, _FRAMES, _POOL, _PASSES)
        words, generator = captions(scenes, rng), torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.no_grad():
            prompts, nothing = model.embed(words, run.device), model.embed([""], run.device)
        first, true, own = starts(batch, rng)
        learner = wan_rollout.Rollout(student, prompts, generator)
        guide = wan_rollout.Rollout(teacher, prompts, generator, nothing, GUIDANCE)
        changed = torch.from_numpy(rng.random(batch) < _SWITCHED)
        past = torch.where(changed.view(-1, 1, 1, 1, 1), twins, latents)
        seen = [past[:, :, place : place + 1].to(run.device) for place in range(first, first + true)]
        for frame in seen:
            learner.keep(frame)
        for _ in range(own):
            seen.append(learner.frame(levels))
            learner.keep(seen[-1])
        for frame in seen[-wan_rollout.CONTEXT :]:  # to the teacher it is a window like those it learned from
            guide.keep(frame)
        return _step_loss(learner, guide, levels, int(rng.integers(STEPS)))

    return module, loss


def _step_loss(learner: wan_rollout.Rollout, guide: wan_rollout.Rollout, levels: list[float], stop: int) -> Tensor:
    """The loss of call ``stop`` of the student's own way through the noise levels."""
    x = learner.noise()
    with torch.no_grad():
        for level, after in itertools.pairwise(levels[: stop + 1]):
            x = (1 - after) * (x - level * learner.velocity(x, level)) + after * learner.noise()
        target = flow_end(guide, x, levels[stop])
    made = x - levels[stop] * learner.velocity(x, levels[stop])
    return functional.mse_loss(made, target)


def flow_end(guide: wan_rollout.Rollout, x: Tensor, level: float) -> Tensor:
    """Where the teacher's flow leads from ``x`` at a noise level, by Euler steps as even as the schedule's."""
    path = [value for value in wan_rollout.sigmas(_TEACHER_STEPS) if value < level - 1e-6]
    for now, after in zip([level, *path], [*path, 0.0], strict=True):
        x = x + (after - now) * guide.velocity(x, now)
    return x
