"""`bench gpu`: suites for a machine with an NVIDIA card, on full-size architectures with random weights.

Speed does not depend on what the weights say, so nothing is downloaded. A suite is a function in `SUITES` that yields
rows and takes less than 8 minutes; it takes shrunken shapes too, with which its tests run on a CPU.

    python -m benchmarks.gpu --only stream --json benchmarks/results/gpu-stream.json
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from diffusers.utils import logging
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from benchmarks.attention_kernels import kernel_suite
from benchmarks.full_size import FULL, SHRUNKEN, Architecture, build
from benchmarks.gpu_cache import linear_suite, skip_suite
from benchmarks.parallel import efficiency_suite
from benchmarks.record import Record, Row, could_not_run
from fastdiff.quality import Interval
from fastdiff.runtime.compile import Compile
from fastdiff_app.console import out, table
from fastdiff_pipelines import Stream

# dense bf16 matrix work in FLOP/s, from the makers' data sheets
BF16_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


SUITE_SECONDS = 8 * 60


@dataclass(frozen=True)
class Place:
    """Where a suite runs, and how much of it.

    Attributes:
        peak: bf16 FLOP/s of the device, None where not known.
        architectures: what to build, full size or shrunken.
        frames: frames timed per row.
        until: `perf_counter` time after which no further row is begun.
        pictures: drawn in one call, where single denoiser calls are timed.
    """

    device: torch.device
    dtype: torch.dtype
    peak: float | None
    architectures: tuple[Architecture, ...]
    frames: int
    until: float
    pictures: int = 1

    def wait(self) -> None:
        """Until the device has done everything it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# compiling an SDXL as one graph takes longer than a suite may
WAYS: dict[str, tuple[Compile, ...]] = {
    "eager": (),
    "compiled": (Compile(),),
    "graphed": (Compile(mode="reduce-overhead"),),
}
# (steps, frames that enter together), the ones asked about most first
LOADS = ((1, 1), (4, 1), (1, 8))


def stream_suite(place: Place) -> Iterator[Row]:
    """Image-to-image streams of 1 and 4 steps, one frame or eight a call; eager, compiled, CUDA-graphed.

    `ratio` is to the eager row of the same load, and `bf16_roofline` the share of the device's dense bf16 peak that the
    counted operations of a frame reach.
    """
    for architecture in place.architectures:
        pipe = build(architecture, place.device, place.dtype)
        for steps, buffer in LOADS:
            case = _Case(place, pipe, architecture, steps, buffer)
            eager = None
            for way, members in WAYS.items():
                name = f"{architecture.name} {architecture.size}px {steps}-step x{buffer} {way}"
                if perf_counter() > place.until:
                    yield could_not_run(name, "left out: the suite's time was used up")
                    continue
                try:
                    row = case.row(name, members)
                    eager = eager or row.ms_median
                    row.ratio = eager / row.ms_median if eager and row.ms_median else None
                    yield row
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    yield could_not_run(name, error)
        # the next one needs the memory
        pipe = case = None
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


class _Case:
    """One pipeline at one load; counts its operations once, eagerly."""

    def __init__(self, place: Place, pipe: Any, architecture: Architecture, steps: int, buffer: int):
        self.place, self.pipe, self.steps, self.buffer = place, pipe, steps, buffer
        self.size = architecture.size
        self.frames = torch.rand(buffer, 3, self.size, self.size, device=place.device) * 2 - 1
        stream = self._stream()
        self._fill(stream)
        with FlopCounterMode(display=False) as counter:
            self._push(stream)
        self.operations = counter.get_total_flops() / buffer

    def row(self, name: str, members: tuple[Compile, ...]) -> Row:
        """Times the pipeline with these accelerations applied."""
        cuda = self.place.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.place.device)
        with fastdiff.accelerate(self.pipe, fastdiff.Plan(members)) as handle:
            stream = self._stream()
            stream.warmup()
            self._fill(stream)
            taken = []
            for _ in range(max(1, self.place.frames // self.buffer)):
                start = perf_counter()
                self._push(stream)
                taken.append((perf_counter() - start) * 1000 / self.buffer)
            missed = handle.report().misses
        row = Row.timed(name, taken, nfe=self.steps, note="; ".join(missed))
        milliseconds = row.ms_median or float("nan")
        row.quality["fps"] = Interval.exact(1000 / milliseconds, len(taken))
        row.quality["tflop_per_frame"] = Interval.exact(self.operations / 1e12)
        if self.place.peak:
            row.quality["bf16_roofline"] = Interval.exact(self.operations / self.place.peak / milliseconds * 1000)
        if cuda:
            row.peak_bytes = torch.cuda.max_memory_allocated(self.place.device)
        return row

    def _stream(self) -> Stream:
        strength = 1.0 if self.steps > 1 else 0.5
        return Stream(
            self.pipe,
            "a red circle",
            steps=self.steps,
            strength=strength,
            height=self.size,
            width=self.size,
            frame_buffer=self.buffer,
        )

    def _push(self, stream: Stream) -> None:
        for frame in self.frames:
            stream.push(frame)
        self.place.wait()

    def _fill(self, stream: Stream) -> None:
        """Until as many frames are in flight as there are steps."""
        for _ in range(self.steps + 2):
            self._push(stream)


SUITES: dict[str, Callable[[Place], Iterator[Row]]] = {
    "stream": stream_suite,
    "parallel": efficiency_suite,
    "attention": kernel_suite,
    "skips": skip_suite,
    "linears": linear_suite,
}


def place(shrunken: bool = False) -> Place:
    """This machine's GPU with full-size shapes, or a CPU with shrunken ones.

    Raises:
        RuntimeError: there is no GPU that torch can use, and nothing shrunken was asked for.
    """
    if shrunken:
        device = torch.device("cpu")
        return Place(device, torch.float32, None, SHRUNKEN, 2, perf_counter() + SUITE_SECONDS)
    if not torch.cuda.is_available():
        raise RuntimeError("needs an NVIDIA GPU and a CUDA build of torch")
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in BF16_PEAKS.items() if part in name), None)
    return Place(torch.device("cuda"), torch.bfloat16, peak, FULL, 64, perf_counter() + SUITE_SECONDS * 7 / 8)


def run(full: bool = False, only: str | None = None, shrunken: bool = False) -> Record:
    """Runs every suite, or one; without a GPU each stands there as a row that says so.

    Raises:
        ValueError: no suite is called `only`.
    """
    if only is not None and only not in SUITES:
        raise ValueError(f"no suite is called {only!r}; there are {', '.join(SUITES)}")
    logging.set_verbosity_error()
    record = Record("gpu" if only is None else f"gpu-{only}")
    for name in [only] if only else list(SUITES):
        try:
            record.rows += SUITES[name](place(shrunken))
        except RuntimeError as error:
            record.rows.append(could_not_run(name, error))
    return record.finish()


def main() -> None:
    """The command line of this module, for a machine that has no fastdiff installed but this checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(SUITES), help="run one suite")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    chosen = parser.parse_args()
    record = run(only=chosen.only)
    out.print(table(record))
    if chosen.json:
        record.save(chosen.json)


if __name__ == "__main__":
    main()
