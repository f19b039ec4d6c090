"""Running a pipeline to learn from it: reference trajectories, runs that begin part-way, and what each call costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import linear_regression, median
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.caching.boundary import Boundary, Call, read, rebuild
from fastdiff.hooks import Hooks
from fastdiff.planning.search import Trajectories
from fastdiff.quality.control import TOLERANCE

# where in a run errors are probed: denser at both ends, where what becomes of them changes fastest
PROBES = (0.02, 0.06, 0.14, 0.4, 0.7, 0.85, 0.94, 0.97)


@dataclass(frozen=True)
class Workload:
    """What is tuned for: these prompts, each with its own noise, drawn with these settings.

    Args:
        prompts: captions; the noise of the one at place i comes from seed `seed` + i.
        steps, guidance, height, width: of the run to be made faster; None leaves a size to the pipeline.
        batch: pictures in one call.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 50
    guidance: float = 5.0
    height: int | None = None
    width: int | None = None
    batch: int = 16

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("a workload needs prompts")
        check_number("workload", "steps", self.steps, low=3, whole=True)
        check_number("workload", "batch", self.batch, low=1, whole=True)
        check_number("workload", "guidance", self.guidance, low=0)

    def each(self, taken: Sequence[float]) -> list[float]:
        """Seconds for a picture of every full batch, from the seconds of all; of the only one where none is full."""
        whole = len(self.prompts) // self.batch
        if not whole:
            return [taken[0] / len(self.prompts)]
        return [one / self.batch for one in taken[:whole]]

    def run(self, pipe: Any, steps: int | None = None, device: str = "cpu") -> tuple[Tensor, list[float]]:
        """Pictures float32 [n, 3, H, W] in 0..1 on the CPU, and the seconds each batch took."""
        known = {"height": self.height, "width": self.width}
        sizes = {name: value for name, value in known.items() if value is not None}
        pictures, seconds = [], []
        for start in range(0, len(self.prompts), self.batch):
            some = list(self.prompts[start : start + self.batch])
            generators = [torch.Generator(device).manual_seed(self.seed + start + place) for place in range(len(some))]
            begun = perf_counter()
            output = pipe(
                some,
                num_inference_steps=steps or self.steps,
                guidance_scale=self.guidance,
                generator=generators,
                output_type="pt",
                **sizes,
            )
            if not hasattr(output, "images"):
                raise Unsupported(f"tuning compares pictures; {type(pipe).__name__} makes none")
            pictures.append(output.images.float().cpu())
            seconds.append(perf_counter() - begun)
        return torch.cat(pictures), seconds


@dataclass
class Tape:
    """Every denoiser call of a run: per call of the pipeline, per step, per guidance branch (input, raw output)."""

    calls: list[list[dict[int, tuple[Tensor, Tensor]]]] = field(default_factory=list)
    levels: tuple[float, ...] = ()
    rows: int = 0

    def trajectories(self, guidance: float) -> Trajectories:
        """The recorded runs with guidance applied to the outputs."""
        steps = range(len(self.levels))
        guided = [[_guided(call[step], guidance) for call in self.calls] for step in steps]
        inputs = tuple(torch.cat([part[0] for part in parts]) for parts in guided)
        outputs = tuple(torch.cat([part[1] for part in parts]) for parts in guided)
        return Trajectories(self.levels, inputs, outputs)


def _guided(branches: dict[int, tuple[Tensor, Tensor]], guidance: float) -> tuple[Tensor, Tensor]:
    """Input and guided output of one step, float32, from one call with both branches in it or from two calls."""
    sample, output = (part.float() for part in branches[0])
    if len(branches) > 1:
        return sample, branches[1][1].float() + guidance * (output - branches[1][1].float())
    half = len(sample) // 2
    if guidance != 1 and len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:]):
        return sample[:half], output[:half] + guidance * (output[half:] - output[:half])
    return sample, output


@dataclass(frozen=True)
class Recorder(Acceleration):
    """Writes every denoiser call to a tape, or answers the first ones from one.

    Args:
        tape: written to when `before` is 0.
        before: steps answered from the tape without calling the denoiser; a run then costs the others alone.
        repeat: a step answered with the output of the step before it; -1 for none.
    """

    stage: ClassVar[str] = "blocks"
    tape: Tape = field(repr=False, compare=False)
    before: int = 0
    repeat: int = -1

    @property
    def exact(self) -> bool:
        """True unless a step is repeated."""
        return self.repeat < 0

    def supports(self, pipe: Any) -> Verdict:
        """One denoiser only: experts that take turns have a plan of their own each, which is not made here."""
        count = len(anatomy(pipe).denoisers)
        return Verdict(count == 1, "" if count == 1 else f"the pipeline has {count} denoisers; tuning knows one")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around the denoiser."""
        hooks.counter.expects = "nothing"
        state: dict[str, Any] = {"call": -1, "request": None}
        boundary: list[Boundary] = []

        def act(call: Call) -> Any:
            if state["request"] is not call.request:
                state["request"], state["call"] = call.request, state["call"] + 1
                if not self.before:
                    self.tape.calls.append([{} for _ in call.run.levels] if call.run else [])
            assert call.run is not None and isinstance(call.request.branch, int)
            step, branch = call.position, call.request.branch
            told = self.tape.calls[state["call"]]
            if step < self.before or step == self.repeat:
                self_or_before = step if step != self.repeat else step - 1
                return state["template"](told[self_or_before][branch][1].clone())
            output = call.compute()
            value = read(output)
            if value is None:
                raise Unsupported("the denoiser answers with more than one tensor, which tuning cannot record")
            hooks.counter.count(accelerated=False)
            self.tape.rows += len(value)
            if not self.before:
                self.tape.levels = call.run.levels
                told[step][branch] = (call.sample.clone(), value.clone())
            return output

        # an output of the right kind, for steps answered before any was seen
        state["template"] = _template(pipe)
        boundary.append(Boundary(hooks, pipe, anatomy(pipe).denoiser, act))


def _template(pipe: Any) -> Callable[[Tensor], Any]:
    """Makes outputs of the kind this pipeline asks its denoiser for."""
    from fastdiff.anatomy import capture, default_size

    denoiser, args, kwargs = capture(pipe, *default_size(pipe))
    with torch.no_grad():
        return rebuild(denoiser(*args, **kwargs))


@dataclass
class Study:
    """What has been measured of a workload on this machine; the search works on it and adds to it.

    Attributes:
        reference: pictures [n, 3, H, W] of the unaccelerated run.
        spent: denoiser rows computed so far, in full generations for each prompt.
        seconds: per number of computed steps, seconds for each picture of every batch run so.
    """

    workload: Workload
    tape: Tape
    reference: Tensor
    spent: float = 0.0
    seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def trajectories(self) -> Trajectories:
        """The reference runs with guidance applied."""
        return self.tape.trajectories(self.workload.guidance)

    def time(self, computed: int, taken: Sequence[float]) -> None:
        """Add the seconds of batches that computed so many steps."""
        self.seconds.setdefault(computed, []).extend(self.workload.each(taken))

    def latency(self, computed: int) -> float:
        """Seconds for one picture with so many computed steps: a line through the medians of what was measured."""
        points = [(count, median(taken)) for count, taken in self.seconds.items()]
        return line(points, computed)


def line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Least-squares line through points, at a place; through the origin when there is one point, or it would end below.

    More steps never take less: noise that says so is answered by the line through the origin and the points.
    """
    if len(points) > 1:
        slope, start = linear_regression(*zip(*points, strict=True))
        if start >= 0 and slope >= 0:
            return start + slope * at
    return at * sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def study(pipe: Any, workload: Workload) -> Study:
    """Run a workload unaccelerated and remember every denoiser call of it."""
    tape = Tape()
    with fastdiff.accelerate(pipe, Recorder(tape)):
        pictures, taken = workload.run(pipe)
    found = Study(workload, tape, pictures, spent=1.0)
    found.time(workload.steps, taken)
    return found


def bracket(pipe: Any, found: Study, say: Callable[[str], None]) -> None:
    """Times runs of fewer steps, so that latency is a line through three points and not a guess.

    A run of few steps shows what a picture takes beside them; one of a third of the steps lies where plans do. What
    else is at work on a machine only ever adds: a figure above the line through the other two is measured once more,
    and the smaller one is kept.
    """
    if len(found.seconds) > 1:
        return
    steps = found.workload.steps
    for count in sorted({max(2, steps // 8), max(2, steps // 3)} - {steps}):
        found.seconds[count] = [_timed(pipe, found, count)]
    for count in sorted(found.seconds):
        others = [(other, median(taken)) for other, taken in found.seconds.items() if other != count]
        here = median(found.seconds[count])
        if here > (1 + 2 * TOLERANCE) * line(others, count):
            say(f"{count} steps took longer than they should, as if something else was at work; once more")
            found.seconds[count] = [min(here, _timed(pipe, found, count))]


def _timed(pipe: Any, found: Study, count: int) -> float:
    """Seconds of a picture in a plain run of so many steps, which is work spent."""
    _, taken = found.workload.run(pipe, count)
    found.spent += count / found.workload.steps
    return median(found.workload.each(taken))


def log_mse(pictures: Tensor, reference: Tensor) -> Tensor:
    """Natural logarithm of each picture's mean squared error, [n]; equal pictures count as 100 dB."""
    return (pictures - reference).double().square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log()


def outcome_weights(pipe: Any, found: Study, shares: Sequence[float] = PROBES) -> list[float]:
    """Per step: energy of the change of the picture for each unit of energy of an error of the output there.

    Measured at a few steps, by repeating one step's output and running on from there, and interpolated in logarithms.
    The steps before it are answered from the tape, so a probe costs the steps after it only.
    """
    steps, trajectories = found.workload.steps, found.trajectories
    probes = {}
    for share in shares:
        step = min(max(1, round(share * steps)), steps - 2)
        if step in probes:
            continue
        error = (trajectories.outputs[step - 1] - trajectories.outputs[step]).double().flatten(1).square().mean(1)
        tape = Tape(found.tape.calls, found.tape.levels)
        with fastdiff.accelerate(pipe, Recorder(tape, before=step, repeat=step)):
            pictures, _ = found.workload.run(pipe)
        found.spent += (steps - step - 1) / steps
        probes[step] = float((log_mse(pictures, found.reference) - error.clamp(min=1e-20).log()).mean())
    return np.exp(np.interp(range(steps), sorted(probes), [probes[step] for step in sorted(probes)])).tolist()
