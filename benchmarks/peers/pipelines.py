"""A peer that accelerates a whole diffusers pipeline, in a process of its own, with the same weights, words, noise."""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.child import Child

WORKER = Path(__file__).with_name("pipeline_worker.py")


class PeerFailed(RuntimeError):
    """The peer cannot do what was asked; the message is its own."""


class PipelinePeer:
    """deepcache or cache-dit on a copy of a pipeline; a context manager.

    Raises:
        FileNotFoundError: its environment is not made; the message says how.
        ChildProcessError: its process ended; the message ends with what it said.
    """

    def __init__(self, name: str, pipe: Any):
        self._child = Child(name, WORKER)
        folder = self._child.folder
        pipe.save_pretrained(folder / "pipeline")
        self._child.start(str(folder), name, str(torch.get_num_threads()))
        self._child.line()

    def draw(
        self, prompts: list[str], seeds: list[int], steps: int, guidance: float, settings: dict[str, Any] | None
    ) -> tuple[Tensor, float]:
        """Pictures float32 [n, 3, H, W] in 0..1, and the milliseconds its own call took.

        Raises:
            PeerFailed: it raised.
        """
        asked = dict(prompts=prompts, seeds=seeds, steps=steps, guidance=guidance, settings=settings)
        self._child.ask(json.dumps(asked).encode() + b"\n")
        answer = json.loads(self._child.line())
        if "error" in answer:
            raise PeerFailed(answer["error"])
        pictures = np.load(answer["file"])
        Path(answer["file"]).unlink()
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), answer["ms"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.__exit__(*error)
