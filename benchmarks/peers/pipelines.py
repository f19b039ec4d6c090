"""A peer that accelerates a whole diffusers pipeline, in a process of its own, with the same weights, words, noise."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.environments import python_of

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
        python = python_of(name)
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="fastdiff-peer-")
        folder = Path(self._folder.name)
        pipe.save_pretrained(folder / "pipeline")
        self._errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        # -P: the worker's own folder must not hide the peer's modules
        self._process = subprocess.Popen(
            [str(python), "-P", str(WORKER), str(folder), name, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )
        self._answer()

    def draw(
        self, prompts: list[str], seeds: list[int], steps: int, guidance: float, settings: dict[str, Any] | None
    ) -> tuple[Tensor, float]:
        """Pictures float32 [n, 3, H, W] in 0..1, and the milliseconds its own call took.

        Raises:
            PeerFailed: it raised.
        """
        assert self._process.stdin is not None
        asked = dict(prompts=prompts, seeds=seeds, steps=steps, guidance=guidance, settings=settings)
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        answer = self._answer()
        if "error" in answer:
            raise PeerFailed(answer["error"])
        pictures = np.load(answer["file"])
        Path(answer["file"]).unlink()
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), answer["ms"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise ChildProcessError(f"{self._name} stopped: {said[-1] if said else self._process.returncode}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()
