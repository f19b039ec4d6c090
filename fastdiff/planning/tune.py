"""The planner: within a budget, the fastest plan that beats uniform caching and fewer steps on unseen prompts.

1. Run some prompts unaccelerated and remember every denoiser call (1 full generation for each prompt).
2. Probe at a few steps how much of an error there arrives in the picture (3 to 4 generations, since a probe runs only
   what comes after it).
3. Errors of leaving any step out after any other come from memory, without a call; dynamic programming gives the best
   schedule for every number of computed steps (one sweep, the whole Pareto front).
4. Proxies mislead, so neighbours and rules of thumb are run as well, on the same prompts, until the calls allowed are
   spent; among them what makes a call cheaper (fewer bits, sparse attention, masked units, one branch left out), whose
   gain is measured and spent on computing more steps.
5. The best few, uniform repetition and fewer steps at the same latency meet on other prompts. Whoever wins there is
   the answer, be it the control.

Related: LeMiCa's outcome-aware edges (https://arxiv.org/abs/2511.00090), CacheQuant's schedules by dynamic programming
(https://arxiv.org/abs/2503.01323).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.acceleration import Acceleration, Unsupported
from fastdiff.caching.forecast import Forecast
from fastdiff.plan import Plan
from fastdiff.planning import provenance
from fastdiff.planning.budget import Budget
from fastdiff.planning.candidates import LONGEST, Candidate, candidates, controls, forecast_of
from fastdiff.planning.cheaper import WORTH_IT, at_once, cheaper, in_order
from fastdiff.planning.measure import Study, Workload, bracket, log_mse, outcome_weights, study
from fastdiff.planning.search import best_schedules, segment_costs, segment_errors
from fastdiff.quality import Interval, equal_latency, mean_interval, median_interval, paired_median_difference
from fastdiff.quality import psnr as psnr_of
from fastdiff.quality import ssim as ssim_of
from fastdiff.quality.control import TOLERANCE
from fastdiff.sampling.steps import StepBudget

Score = Callable[[Tensor], Tensor]
"""Pictures [n, 3, H, W] in 0..1 of the held-out prompts, in order, to right (1) or wrong (0): [n] or [n, k]."""

FINALISTS = 2
# candidates that are tried before cheaper calls are
FIRST = 3
# steps of the run that shows what a cheaper call gains
PACE_STEPS = 4


@dataclass(frozen=True)
class Result:
    """One contender on held-out prompts.

    Attributes:
        name: of the candidate, or "uniform", "fewer-steps". computed: denoiser calls of each branch.
        seconds: for one picture. psnr: of each prompt against the unaccelerated picture, in dB.
        quality: metric to figure with its 95 % interval.
    """

    name: str
    computed: int
    seconds: float
    psnr: Tensor
    quality: Mapping[str, Interval]
    candidate: Candidate


@dataclass
class Tuned:
    """What `tune` found.

    Attributes:
        plan: to be saved and applied. Where fewer steps are better, that is what it says (`StepBudget`).
        steps: of the run the plan is for.
        results: the winner first, then everybody it met, on held-out prompts.
        front: (computed steps, expected seconds, expected PSNR in dB) for every number of computed steps.
        spent, heldout: denoiser work of the search and of the proof, in full generations for each prompt of theirs.
        baseline: seconds for one picture without a plan.
        met: whether the winner keeps to the budget on held-out prompts; None without one.
    """

    plan: Plan
    steps: int
    results: list[Result]
    front: list[tuple[int, float, float]]
    spent: float
    heldout: float
    baseline: float
    met: bool | None = None
    tried: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def best(self) -> Result:
        """The winner."""
        return self.results[0]


@dataclass
class Planner:
    """A model, measured once, from which plans for several budgets can be made.

    Args:
        pipe: an unaccelerated pipeline with one denoiser and a deterministic sampler.
        calibration: prompts the search sees; heldout: others, on which it is judged.
        score: for the budget `attribute_drop`, which needs known truth; see `Score`.
        most: full generations for each calibration prompt that the search may spend on one budget.
    """

    pipe: Any
    calibration: Workload
    heldout: Workload
    score: Score | None = None
    most: float = 10.0
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self):
        if set(self.calibration.prompts) & set(self.heldout.prompts) and self.calibration.seed == self.heldout.seed:
            raise ValueError("calibration and held-out prompts overlap; a plan is proved on prompts it has not seen")
        if self.calibration.steps != self.heldout.steps:
            raise ValueError("calibration and held-out runs take different numbers of steps")
        self.say(f"{len(self.calibration.prompts)} prompts unaccelerated")
        self.study: Study = study(self.pipe, self.calibration)
        self.say("how much of an error arrives in the picture")
        self.weights = outcome_weights(self.pipe, self.study)
        self.errors = segment_errors(self.study.trajectories, LONGEST)
        costs = segment_costs(self.errors, self.weights, LONGEST)
        self.schedules = best_schedules(costs, LONGEST)
        self._base = self.study.spent
        self._proof: Study | None = None
        self._paces: dict[str, tuple[Any, float]] | None = None

    def tune(self, budget: Budget | None = None, latency: float | None = None) -> Tuned:
        """Find a plan.

        Args:
            budget: the bound to keep; None takes the best quality within `latency`.
            latency: most seconds for one picture; negative: times faster than without a plan.

        Raises:
            ValueError: neither is given, the budget needs a score that there is none for, or nothing is that fast.
        """
        if budget is None and latency is None:
            raise ValueError("give a budget, a latency, or both")
        if budget is not None and budget.metric == "attribute_drop" and self.score is None:
            raise ValueError("attribute_drop needs known truth, which only the embedded model has; use psnr or ssim")
        self.study.spent = self._base
        found = self.study
        bracket(self.pipe, found, self.say)
        self._base = found.spent
        baseline = found.latency(self.calibration.steps)
        target = None if latency is None else (latency if latency > 0 else baseline / -latency)
        counts = [count for count in sorted(self.schedules) if target is None or found.latency(count) <= target]
        counts = [count for count in counts if count < self.calibration.steps]
        if not counts:
            fastest = 1000 * found.latency(min(self.schedules))
            raise ValueError(f"nothing is that fast: the fastest schedule takes about {fastest:.0f} ms a picture")
        computed = max(counts)
        tried: list[tuple[str, int, float]] = []
        if budget is not None and budget.metric == "psnr":
            computed = self._least(budget, counts, tried)
        while True:
            chosen = self._search(computed, tried)
            result = self._prove(chosen, computed, baseline, tried)
            if budget is None:
                return result
            figure = result.best.quality[budget.metric]
            result.met = budget.met(figure.low, figure.high)
            larger = [count for count in counts if count > computed]
            if result.met or not larger or found.spent >= self.most:
                return result
            computed = larger[min(len(larger) - 1, max(0, len(larger) // 3))]

    def _least(self, budget: Budget, counts: list[int], tried: list[tuple[str, int, float]]) -> int:
        """The fewest computed steps expected to keep a PSNR, the expectation corrected by one run."""
        low = [count for count in counts if self.expected(count) >= budget.value]
        guess = min(low, default=max(counts))
        first = candidates(self.study.trajectories, self.errors, self.weights, guess)[0]
        off = self._calibrated(first, tried)[0] - self.expected(guess)
        return min((count for count in counts if self.expected(count) + off >= budget.value), default=max(counts))

    def expected(self, computed: int) -> float:
        """PSNR in dB that the search expects of the best schedule with so many computed steps."""
        return -10 * math.log10(max(self.schedules[computed][0], 1e-12))

    def _calibrated(self, candidate: Candidate, tried: list[tuple[str, int, float]]) -> tuple[float, float]:
        """Median PSNR of a candidate on the calibration prompts (-inf where a member does nothing), and its seconds."""
        pictures, taken, idle = self._run(candidate, self.calibration)
        seconds = median(self.calibration.each(taken))
        if candidate.plain:
            self.study.time(candidate.computed, taken)
        self.study.spent += candidate.computed / self.calibration.steps
        if idle:
            self.say(f"{candidate.name}: left out, {idle} has nothing to do in {candidate.computed} steps")
            return -math.inf, seconds
        found = float(-10 * log_mse(pictures, self.study.reference).median() / math.log(10))
        tried.append((candidate.name, candidate.computed, found))
        self.say(f"{candidate.computed} of {self.calibration.steps} steps, {candidate.name}: {found:.1f} dB")
        return found, seconds

    def _run(self, candidate: Candidate, workload: Workload) -> tuple[Tensor, list[float], str]:
        """Pictures, seconds, and the members that did nothing: a strict user would be refused such a plan."""
        with fastdiff.accelerate(self.pipe, candidate.members) as handle:
            pictures, taken = workload.run(self.pipe)
            idle = ", ".join(row.name for row in handle.report().rows if row.seen and not row.accelerated)
        return pictures, taken, idle

    def _search(self, computed: int, tried: list[tuple[str, int, float]]) -> list[Candidate]:
        """The finalists among candidates that take as long as so many computed steps, by runs on its own prompts."""
        ranked: list[tuple[float, int, Candidate]] = []
        known = candidates(self.study.trajectories, self.errors, self.weights, computed)
        for candidate in [*known[:FIRST], *self._cheaper(computed), *known[FIRST:]]:
            if ranked and not self._affordable(candidate):
                continue
            found, seconds = self._calibrated(candidate, tried)
            other = self._resized(candidate, seconds, computed)
            if other and math.isfinite(found) and self._affordable(other):
                candidate, found = other, self._calibrated(other, tried)[0]
            if math.isfinite(found) or not ranked:
                ranked.append((-found, len(ranked), candidate))
        return [candidate for _, _, candidate in sorted(ranked)[:FINALISTS]]

    def _affordable(self, candidate: Candidate) -> bool:
        return self.study.spent + candidate.computed / self.calibration.steps <= self.most

    def _cheaper(self, computed: int) -> list[Candidate]:
        """Schedules of cheaper calls, as many more as there is time for; the fastest first."""
        if self._paces is None:
            before = self.study.spent
            self._paces = dict(self._measured_paces())
            self._base += self.study.spent - before
        target, found = self.study.latency(computed), []
        for name, (one, pace) in sorted(self._paces.items(), key=lambda item: item[1][1]):
            counts = [count for count in self.schedules if pace * self.study.latency(count) <= target]
            count = max(counts, default=0)
            if pace > WORTH_IT or not computed < count < self.calibration.steps:
                continue
            found.append(self._bought(f"{name} fit-2", (one,), count))
        return found

    def _bought(self, name: str, members: tuple[Acceleration, ...], count: int) -> Candidate:
        """The best schedule of so many computed steps, whose calls are made cheaper by these members."""
        forecast = forecast_of(self.study.trajectories, self.schedules[count][1], 2)
        return Candidate(name, in_order((*members, forecast)), count, plain=False)

    def _resized(self, candidate: Candidate, seconds: float, computed: int) -> Candidate | None:
        """Where cheaper calls took another time than a few of them promised: as many as there is time for."""
        wanted = self.study.latency(computed)
        count = round(candidate.computed * wanted / seconds)
        if candidate.plain or abs(seconds / wanted - 1) <= TOLERANCE or count == candidate.computed:
            return None
        if not computed < count < self.calibration.steps or count not in self.schedules:
            return None
        kept = tuple(one for one in candidate.members if not isinstance(one, Forecast))
        return self._bought(candidate.name, kept, count)

    def _measured_paces(self) -> Iterator[tuple[str, tuple[Any, float]]]:
        """How long a call takes with each of what could make it cheaper, by a plain one's time."""
        steps = min(PACE_STEPS, self.calibration.steps)
        times: dict[str, float] = {}
        kinds = cheaper(self.pipe)
        for name in ("", *kinds) if kinds else ():
            if self.study.spent + steps / self.calibration.steps > self.most:
                return
            members = (at_once(kinds[name]),) if name else ()
            try:
                with fastdiff.accelerate(self.pipe, members) as handle:
                    taken = self.calibration.run(self.pipe, steps)[1]
                    idle = any(row.accelerated == 0 for row in handle.report().rows)
            except (Unsupported, RuntimeError) as error:
                self.say(f"{name} cannot run here: {error}")
                continue
            self.study.spent += steps / self.calibration.steps
            times[name] = sum(taken)
            if idle:
                self.say(f"{name}: nothing here that it could act on")
            elif name:
                self.say(f"{name}: a call takes {times[name] / times['']:.2f} times as long")
                yield name, (kinds[name], times[name] / times[""])

    def _prove(self, finalists: list[Candidate], computed: int, baseline: float, tried: list) -> Tuned:
        """Finalists and controls on held-out prompts; the best median wins."""
        proof, spent = self._reference(), 0.0
        self.say(f"{len(self.heldout.prompts)} held-out prompts")
        results = [self._judge(one, proof) for one in finalists]
        spent += sum(one.computed for one in finalists) / self.calibration.steps
        mine = min(result.seconds for result in results)
        # a cheaper call that turned out not to be is not let in at more than its rivals' latency
        results = [one for one in results if one.candidate.plain or one.seconds <= (1 + TOLERANCE) * mine]
        for control, seconds in self._controls(max(results, key=_median), computed, mine):
            result = self._judge(control, proof)
            spent += control.computed / self.calibration.steps
            again = min(max(2, round(control.computed * seconds / result.seconds)), self.calibration.steps - 1)
            if control.name == "fewer-steps" and abs(result.seconds / seconds - 1) > TOLERANCE:
                # the line through what was measured missed: once more with as many steps as there was time for
                result = self._judge(replace(control, members=(StepBudget(again),), computed=again), proof)
                spent += again / self.calibration.steps
            results.append(result)
        results.sort(key=_median, reverse=True)
        best = results[0]
        expected = tuple((name, one.value, one.low, one.high, one.n) for name, one in best.quality.items())
        ms = 1000 * best.seconds
        expected = (*expected, ("ms", ms, ms, ms, len(best.psnr)))
        origin = provenance.of(self.pipe, self.calibration.steps, self.calibration.guidance, expected)
        plan = Plan(best.candidate.members, tuned=origin)
        front = [(count, self.study.latency(count), self.expected(count)) for count in sorted(self.schedules)]
        steps = self.calibration.steps
        return Tuned(plan, steps, results, front, self.study.spent, 1 + spent, baseline, None, list(tried))

    def _controls(self, best: Result, computed: int, seconds: float) -> list[tuple[Candidate, float]]:
        """What the finalists have to beat, and what each should take; with the best one's cheaper calls as well."""
        found = self.study
        fewer = equal_latency(seconds, found.latency, self.calibration.steps - 1, least=2)
        plain = [(one, seconds) for one in controls(found.trajectories, computed, fewer.steps)]
        kept = tuple(one for one in best.candidate.members if not isinstance(one, Forecast))
        if not kept:
            return plain
        alike = controls(found.trajectories, best.computed, best.computed)
        return plain + [
            (replace(one, name=f"{one.name}, {best.name.split()[0]}", members=in_order((*kept, *one.members))), seconds)
            for one in alike
        ]

    def _reference(self) -> Study:
        if self._proof is None:
            pictures, taken = self.heldout.run(self.pipe)
            self._proof = Study(self.heldout, replace(self.study.tape, calls=[]), pictures)
            self._proof.time(self.heldout.steps, taken)
        return self._proof

    def _judge(self, candidate: Candidate, proof: Study) -> Result:
        pictures, taken, _ = self._run(candidate, self.heldout)
        decibels = psnr_of(pictures, proof.reference).clamp(max=100)
        quality = {"psnr": median_interval(decibels.numpy()), "ssim": _ssim(pictures, proof.reference)}
        if self.score is not None:
            quality["attribute_drop"] = attribute_drop(self.score, pictures, proof.reference)
        seconds = median(self.heldout.each(taken))
        self.say(f"  {candidate.name}: {quality['psnr'].value:.1f} dB")
        return Result(candidate.name, candidate.computed, seconds, decibels, quality, candidate)


def _median(result: Result) -> float:
    return result.quality["psnr"].value


def _ssim(pictures: Tensor, reference: Tensor) -> Interval:
    if min(pictures.shape[-2:]) < 11:
        return Interval(math.nan, math.nan, math.nan, 0)
    return mean_interval(ssim_of(pictures, reference).numpy())


def attribute_drop(score: Score, pictures: Tensor, reference: Tensor) -> Interval:
    """Paired drop of the share of attributes that are right, with its interval; below 0 where there are more."""
    before, after = (torch.as_tensor(score(some)).double() for some in (reference, pictures))
    rows = (before - after).flatten(1) if before.dim() > 1 else (before - after)[:, None]
    return mean_interval(rows.nanmean(1).numpy())


def tune(
    pipe: Any,
    calibration: Workload,
    heldout: Workload,
    budget: Budget | None = None,
    latency: float | None = None,
    score: Score | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """The fastest plan within a budget for this pipeline on this machine; see `Planner`.

    Raises:
        Unsupported: the pipeline is accelerated already, has several denoisers, or makes no pictures.
    """
    if hasattr(type(pipe), "_fastdiff_handle"):
        raise Unsupported("this pipeline is accelerated; remove that handle first, a plan is measured on the plain one")
    return Planner(pipe, calibration, heldout, score, say=say).tune(budget, latency)


def beats(results: list[Result]) -> dict[str, Interval]:
    """Median of the paired difference in PSNR between the winner and each other contender."""
    best = results[0]
    return {other.name: paired_median_difference(best.psnr.numpy(), other.psnr.numpy()) for other in results[1:]}
