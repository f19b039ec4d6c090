"""Smaller students: blocks taken out of a denoiser, and what is left taught by the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.acceleration import Unsupported
from fastdiff.distillation.networks import Batch, Networks
from fastdiff.distillation.objective import Objective


def prune(denoiser: Any, layers: int = 0, keep: Sequence[int] = (), middle: bool = False) -> Any:
    """A smaller copy of a denoiser, weights of what stays as they were; it saves and loads as diffusers' own.

    Args:
        denoiser: a UNet with transformer layers, or a transformer with `transformer_blocks`.
        layers: of a UNet, transformer layers to keep in each attention block (KOALA, https://arxiv.org/abs/2312.04005,
            keeps the first ones); 0 for all.
        keep: of a transformer, the numbers of the blocks to keep. VDMini (https://arxiv.org/abs/2411.18375) takes the
            shallow ones out of a video model, which carry content, and keeps the deep ones, which carry motion.
        middle: of a UNet, take the middle block out too.

    Raises:
        Unsupported: there is nothing of the kind to take out.
        ValueError: `keep` names a block that is not there, or none.
    """
    # what was left at its default is marked as such, and a change of it would be dropped with the mark
    config = {name: value for name, value in denoiser.config.items() if name != "_use_default_values"}
    if hasattr(denoiser, "transformer_blocks"):
        total = len(denoiser.transformer_blocks)
        if not keep or sorted(set(keep)) != list(keep) or not 0 <= keep[0] <= keep[-1] < total:
            raise ValueError(f"keep={tuple(keep)} must be rising numbers of blocks from 0 to {total - 1}")
        config["num_layers"] = len(keep)
        names = {f"transformer_blocks.{new}.": f"transformer_blocks.{old}." for new, old in enumerate(keep)}
        if keep[-1] != total - 1 and getattr(denoiser.transformer_blocks[-1], "context_pre_only", False):
            raise ValueError(f"keep={tuple(keep)} must end with {total - 1}: only the last block drops its context")
    elif hasattr(denoiser, "down_blocks") and (layers or middle):
        names = {}
        if layers:
            config["transformer_layers_per_block"] = _fewer(config["transformer_layers_per_block"], layers)
            config["reverse_transformer_layers_per_block"] = None
        if middle:
            config["mid_block_type"] = None
    else:
        raise Unsupported(
            f"{type(denoiser).__name__}: say what to take out: layers or middle of a UNet, blocks of a DiT"
        )
    smaller = type(denoiser).from_config(config)
    state, ours = denoiser.state_dict(), smaller.state_dict()
    source = {name: _renamed(name, names) for name in ours}
    missing = [name for name, old in source.items() if old not in state or state[old].shape != ours[name].shape]
    if missing:
        raise Unsupported(f"{type(denoiser).__name__} has no counterpart of {missing[0]} to start from")
    smaller.load_state_dict({name: state[old] for name, old in source.items()})
    return smaller.to(denoiser.device, denoiser.dtype)


def _fewer(now: Any, layers: int) -> Any:
    return min(now, layers) if isinstance(now, int) else type(now)(_fewer(one, layers) for one in now)


def _renamed(name: str, names: dict[str, str]) -> str:
    return next((old + name.removeprefix(new) for new, old in names.items() if name.startswith(new)), name)


@dataclass(frozen=True)
class Compression(Objective):
    """KOALA's three losses: of the task, of outputs, and of self-attention, which carries most of what is lost.

    A self-attention of the student learns from the teacher's of the same name; where the student has fewer layers,
    its last one learns from the teacher's last.

    Args:
        task, output, attention: weights.
        scale: guidance of the teacher in `output`, as diffusers counts it; 1 is none.
    """

    task: float = 1.0
    output: float = 1.0
    attention: float = 1.0
    scale: float = 1.0

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        if networks.modules is None:
            raise ValueError("Compression looks inside the networks, and these have no modules")
        levels = networks.levels
        level = (1 + batch.uniform() * levels.last).long().clamp(1, levels.last)
        eps = batch.normal()
        x = levels.add(batch.clean, eps, level)
        pairs = self_attentions(*networks.modules) if self.attention else {}
        with Outputs(networks.modules[0], pairs) as ours, Outputs(networks.modules[1], pairs.values()) as theirs:
            made = networks.student(x, level, batch.condition)
            with torch.no_grad():
                told = networks.teacher(x, level, batch.condition)
        total = self.task * functional.mse_loss(made, levels.output(batch.clean, eps, level))
        total = total + self.output * functional.mse_loss(made, told)
        for mine, other in pairs.items():
            wanted = theirs.seen[other]
            # features of different layers have different sizes
            error = functional.mse_loss(ours.seen[mine], wanted) / wanted.square().mean().clamp(min=1e-6)
            total = total + self.attention / len(pairs) * error
        return total


def self_attentions(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """For each self-attention of the student the teacher's that it learns from, by path."""

    def found(module: nn.Module) -> list[str]:
        return [path for path, part in module.named_modules() if hasattr(part, "to_q") and _is_own(path)]

    ours, theirs = found(student), found(teacher)
    pairs: dict[str, str] = {}
    for place in dict.fromkeys(_group(path) for path in ours):
        mine = [path for path in ours if _group(path) == place]
        other = [path for path in theirs if _group(path) == place]
        # the last of the student's ends where the last of the teacher's does
        pairs |= dict(zip(mine[::-1], other[::-1], strict=False))
    return pairs


def _is_own(path: str) -> bool:
    return path.endswith((".attn1", ".attn"))


def _group(path: str) -> str:
    """The list of layers a self-attention stands in."""
    return path.rsplit(".", 2)[0]


class Outputs:
    """Keeps the outputs of some modules while the block runs."""

    def __init__(self, module: nn.Module, paths: Any):
        self.module, self.paths, self.seen = module, list(paths), {}

    def __enter__(self) -> Outputs:
        self._hooks = [self.module.get_submodule(path).register_forward_hook(self._keep(path)) for path in self.paths]
        return self

    def __exit__(self, *unused: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.seen[path] = output[0] if isinstance(output, tuple) else output

        return keep
