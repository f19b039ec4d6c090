"""Trains the miniature models: one resumable command, the same on a CPU and a GPU.

    python -m fastdiff.miniature.train autoencoder --images 300000
    python -m fastdiff.miniature.train mini-sd --images 600000
    python -m fastdiff.miniature.train mini-dit --images 184000

Progress lives in an ignored folder and a killed run goes on where it stood: all data and noise are drawn from (seed,
step), so the resumed run computes what the uninterrupted one would have. Without that folder it starts from the shipped
weights. The learning rate is constant and falls over the last fifth, so the end can be moved later by a larger
`--images`. On a CPU two one-thread processes that average gradients beat one process of two threads.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from . import losses, optimizers, weights


@dataclass(frozen=True)
class Run:
    """Settings of one training run; `images` counts over all processes, `batch` is per step over all processes."""

    name: str
    images: int
    batch: int = 64
    learning_rate: float = 1.5e-3
    seed: int = 0
    folder: Path = Path(".training")
    processes: int = 2
    device: str = "cpu"
    scratch: bool = False
    save_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.batch % self.processes:
            raise ValueError(f"batch {self.batch} must be a multiple of {self.processes} processes")

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def rate(self, step: int) -> float:
        """Learning rate: 200 steps of warm-up, then constant, then linear to zero over the last fifth."""
        fall = max(1, self.steps // 5)
        return self.learning_rate * min(1.0, (step + 1) / 200, max(0.02, (self.steps - step) / fall))


class Average:
    """Exponential moving average of parameters, with a horizon that grows with the run up to 1 / (1 - decay) steps."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)


def _log(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= processes
    start = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def _checkpoint(run: Run) -> Path:
    return run.folder / f"{run.name}.pt"


def _save(run: Run, step: int, module: nn.Module, average: Average, optimizer: optimizers.Optimizers) -> None:
    path = _checkpoint(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "module": module.state_dict(),
        "average": average.values,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def _restore(run: Run, module: nn.Module, average: Average, optimizer: optimizers.Optimizers) -> int:
    """The step to go on from: the checkpoint's, or 0 from the shipped weights, or 0 from scratch."""
    path = _checkpoint(run)
    if path.exists() and not run.scratch:
        state = torch.load(path, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        return int(state["step"])
    if not run.scratch and weights.load_into(run.name, module):
        average.values = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return 0


def _loop(run: Run, rank: int, module: nn.Module, loss: Callable[[int, int, int], Tensor]) -> None:
    """`loss(step, rank, batch)` draws its own data; this only optimises, averages, logs and saves."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = optimizers.build(run.name, module, run.learning_rate)
    average = Average(module)
    first = _restore(run, module, average, optimizer)
    began = saved = time.monotonic()
    running = torch.zeros(())
    for step in range(first, run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(step, rank, run.batch // run.processes)
        value.backward()
        _average_gradients(parameters, run.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(module, step)
        running = value.detach().cpu() if step == first else running.lerp(value.detach().cpu(), 0.02)
        if rank == 0 and (step % 100 == 99 or step + 1 == run.steps):
            done = (step + 1) * run.batch
            speed = (step + 1 - first) * run.batch / (time.monotonic() - began)
            _log(f"{run.name}: {done} images, loss {running:.4f}, {speed:.0f} images/s")
        if rank == 0 and (time.monotonic() - saved >= run.save_seconds or step + 1 == run.steps):
            _save(run, step + 1, module, average, optimizer)
            saved = time.monotonic()


def _worker(rank: int, run: Run, rendezvous: str) -> None:
    torch.manual_seed(run.seed)
    if run.device == "cpu":
        torch.set_num_threads(1)
    if run.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=run.processes)
    module, loss = losses.BUILDERS[run.name](run)
    _loop(run, rank, module, loss)
    if run.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def train(run: Run) -> None:
    """Runs to the end, then exports the averaged weights to the package's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.processes == 1:
        _worker(0, run, "")
    else:
        rendezvous = run.folder / f"{run.name}.rendezvous"
        rendezvous.unlink(missing_ok=True)
        multiprocessing.spawn(_worker, args=(run, str(rendezvous.resolve())), nprocs=run.processes)
    export(run)


def export(run: Run) -> None:
    """Writes the checkpoint's averaged weights as the shipped model."""
    state = torch.load(_checkpoint(run), map_location="cpu", weights_only=True)
    weights.export(run.name, state["average"])
    _log(f"{run.name}: exported after {state['step'] * run.batch} images")


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the miniature models.")
    parser.add_argument("name", choices=sorted(losses.BUILDERS))
    parser.add_argument("--images", type=int, required=True, help="where to stop, counted from the very start")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path(".training"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", action="store_true", help="ignore checkpoint and shipped weights")
    parser.add_argument("--export", action="store_true", help="only export the checkpoint as it stands")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    only_export = given.pop("export")
    run = Run(**(losses.DEFAULTS[given["name"]] | given))
    if only_export:
        export(run)
    else:
        train(run)


if __name__ == "__main__":
    main()
