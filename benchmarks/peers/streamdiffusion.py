"""The published streamdiffusion 0.1.1 on our weights, frames and noise, in a process of its own.

What crosses over is plain data: configs and weights as JSON and safetensors, the prompt's embeddings, frames and
results as raw bytes. The worker (`streamdiffusion_worker.py`) times each call itself, so the pipe between the two
processes costs it nothing.
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.peers.child import Child

WORKER = Path(__file__).with_name("streamdiffusion_worker.py")


class StreamDiffusionPeer:
    """A `fastdiff_app.methods.Method` whose work is done by streamdiffusion; a context manager.

    Its first results are for frames that were never given (its buffer starts empty); they are dropped here, and the
    last frames are pushed out by repeating the last one, since it has no flush.

    Args:
        pipe: the pipeline whose networks it runs.
        timesteps: one per step, from noisy to clean; each must lie on LCM's 50-step grid.
        noise: float [steps, C, h, w], the noise of each step.

    Raises:
        FileNotFoundError: the environment is not made; the message says how.
        ChildProcessError: the worker failed; the message ends with what it said.
    """

    def __init__(self, pipe: Any, timesteps: list[int], noise: np.ndarray, height: int, width: int):
        self._child = Child("streamdiffusion", WORKER)
        self._shape = (height, width, 3)
        self._steps = len(timesteps)
        self._last: np.ndarray | None = None
        self._waiting: list[int] = []
        self._junk = self._steps - 1
        self.milliseconds: list[float] = []
        folder = self._child.folder
        _export(pipe, folder)
        np.save(folder / "noise.npy", noise.astype(np.float32))
        about = {"timesteps": timesteps, "height": height, "width": width, "threads": _threads()}
        (folder / "job.json").write_text(json.dumps(about), "utf-8")
        self._child.start(str(folder))
        self._child.read(1)

    def prepare(self, embeddings: np.ndarray) -> None:
        """Starts a new stream for a prompt's embeddings, float [1, S, D]."""
        np.save(self._child.folder / "embeddings.npy", embeddings.astype(np.float32))
        self._child.ask(b"P")
        self._child.read(1)
        self._junk, self._waiting = self._steps - 1, []

    def push(self, frame: np.ndarray, frame_id: int) -> list[tuple[int, np.ndarray]]:
        """Gives it a uint8 [H, W, 3] frame; `milliseconds` gains what it took."""
        self._waiting.append(frame_id)
        self._last = frame
        taken, image = self._frame(frame)
        self.milliseconds.append(taken)
        if self._junk:
            self._junk -= 1
            return []
        return [(self._waiting.pop(0), image)]

    def flush(self) -> list[tuple[int, np.ndarray]]:
        """The frames still inside."""
        ready = []
        while self._waiting and self._last is not None:
            image = self._frame(self._last)[1]
            if self._junk:
                self._junk -= 1
            else:
                ready.append((self._waiting.pop(0), image))
        return ready

    def _frame(self, frame: np.ndarray) -> tuple[float, np.ndarray]:
        self._child.ask(b"F" + np.ascontiguousarray(frame).tobytes())
        (taken,) = np.frombuffer(self._child.read(8), np.float64)
        count = int(np.prod(self._shape))
        return float(taken), np.frombuffer(self._child.read(4 * count), np.float32).reshape(self._shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.__exit__(*error)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _export(pipe: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    for name in ("unet", "vae"):
        model = getattr(pipe, name)
        save_file(
            {key: value.float().contiguous() for key, value in model.state_dict().items()},
            folder / f"{name}.safetensors",
        )
        (folder / f"{name}.json").write_text(json.dumps(dict(model.config), default=str), "utf-8")
    (folder / "scheduler.json").write_text(json.dumps(dict(pipe.scheduler.config), default=str), "utf-8")
