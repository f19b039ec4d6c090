"""Apply a plan to a pipeline, report what it does, take it off again."""

import threading
from dataclasses import dataclass, field
from typing import Any

from fastdiff.acceleration import Acceleration, NotEngaged, Unsupported
from fastdiff.hooks import Hooks, RemovalOrder, Request, Requests, check_on_top
from fastdiff.plan import Plan, PlanError


@dataclass(frozen=True)
class Row:
    """One acceleration in a report.

    Attributes:
        name, settings, stage, exact, bound: from the acceleration.
        state: "active", or "skipped" when a preset left it out (the reason is in `notes`).
        seen: calls it saw; accelerated: calls it made faster; bytes_held: memory it holds now.
        misses: what should have engaged and did not.
        notes: what else is worth knowing.
    """

    name: str
    settings: str
    stage: str
    exact: bool
    bound: str
    state: str
    seen: int = 0
    accelerated: int = 0
    bytes_held: int = 0
    misses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a plan has done so far. `str()` gives a table."""

    rows: tuple[Row, ...]
    requests: int

    @property
    def misses(self) -> tuple[str, ...]:
        """Everything that should have engaged and did not, each beginning with the acceleration's name."""
        return tuple(f"{row.name} {miss}" for row in self.rows for miss in row.misses)

    def __str__(self) -> str:
        lines = [f"{'acceleration':<16}{'label':<14}{'state':<9}{'calls':>8}{'faster':>8}{'MiB held':>10}"]
        for row in self.rows:
            label = "exact" if row.exact else f"lossy ({row.bound})"
            held = f"{row.bytes_held / 2**20:.1f}"
            lines.append(f"{row.name:<16}{label:<14}{row.state:<9}{row.seen:>8}{row.accelerated:>8}{held:>10}")
            lines += [f"  did not engage: {row.name} {miss}" for miss in row.misses]
            lines += [f"  {note}" for note in row.notes]
        lines.append(f"requests finished: {self.requests}")
        return "\n".join(lines)


@dataclass
class Handle:
    """An accelerated pipeline. Use as a context manager, or call `remove()`.

    Attributes:
        pipe: the pipeline, which stays the object it was.
        plan: what was asked for.
        strict: raise `NotEngaged` at the end of a request in which something that should have engaged did not.
    """

    pipe: Any
    plan: Plan
    strict: bool = False
    _layers: list[tuple[Acceleration, Hooks]] = field(default_factory=list, repr=False)
    _skipped: list[tuple[Acceleration, str]] = field(default_factory=list, repr=False)
    _finished: int = field(default=0, repr=False)

    def __post_init__(self):
        self._requests = Requests(self._finish)
        self._class = type(self.pipe)
        self._private: type | None = None
        self._encoding = threading.RLock()

    def request(self, keep: bool = False) -> Request:
        """Open a request for whoever calls the denoiser without calling the pipeline.

        `with handle.request():` holds state for the block; `keep=True` gives a request that may be entered many times
        and is dropped by `close()`. Calls of the pipeline open and close their own.
        """
        return self._requests.open(keep=keep)

    def report(self) -> Report:
        """Say what each acceleration saw and did so far."""
        rows = {}
        for one, hooks in self._layers:
            counter = hooks.counter
            counts = (counter.seen, counter.accelerated, counter.held())
            notes = tuple(filter(None, (*counter.notes, counter.describe())))
            rows[one] = Row(*_head(one), "active", *counts, tuple(counter.misses), notes)
        for one, reason in self._skipped:
            rows[one] = Row(*_head(one), "skipped", notes=(reason,))
        return Report(tuple(rows[one] for one in self.plan if one in rows), self._finished)

    def remove(self) -> None:
        """Put the pipeline back, bit for bit. A second call does nothing.

        Raises:
            RemovalOrder: something was installed on top since; nothing is changed.
        """
        if self._private is None:
            return
        if type(self.pipe) is not self._private:
            raise RemovalOrder("the pipeline's class was changed after it was accelerated; undo that first")
        check_on_top([hooks for _, hooks in self._layers])
        for _, hooks in reversed(self._layers):
            hooks.undo()
        self.pipe.__class__ = self._class
        self._private = None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.remove()

    def _install(self) -> None:
        # a class of this one object: `__call__` is looked up on the class, and nobody else's class is touched
        names = {"__module__": self._class.__module__, "__qualname__": self._class.__qualname__}
        self._private = type(self._class.__name__, (self._class,), {**names, "_fastdiff_handle": self})
        self.pipe.__class__ = self._private
        entry = Hooks("fastdiff", self._requests)
        entry.override(self.pipe, "__call__", self._call)
        if callable(getattr(self.pipe, "encode_prompt", None)):
            entry.override(self.pipe, "encode_prompt", self._encode_prompt)
        try:
            for one in self.plan:
                self._apply(one)
        except BaseException:
            self.remove()
            raise

    def _apply(self, one: Acceleration) -> None:
        name = type(one).__name__
        verdict = one.supports(self.pipe)
        reason = verdict.reason
        if verdict:
            hooks = Hooks(name, self._requests)
            self._layers.append((one, hooks))
            if reason:
                hooks.counter.note(reason)
            try:
                one.apply(self.pipe, hooks)
                return
            except Unsupported as error:
                if not self.plan.name:
                    raise
                hooks.undo()
                self._layers.pop()
                reason = str(error)
        if not self.plan.name:
            raise Unsupported(f"{name} cannot act on this {self._class.__name__}: {reason}")
        self._skipped.append((one, reason))

    def _call(self, inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        with self._requests.open_call(pipe) as request:
            if request.pipe is pipe:
                return inner(*args, **kwargs)
            return self._class.__call__(request.pipe, *args, **kwargs)

    def _encode_prompt(self, inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        # overlapping requests share the tokenizers, and those written in Rust refuse to be used by two threads at once
        with self._encoding:
            return inner(*args, **kwargs)

    def _finish(self, request: Request, failed: bool) -> None:
        if failed:
            return
        self._finished += 1
        for _, hooks in self._layers:
            hooks.counter.finish(request)
        if self.strict and request.misses:
            raise NotEngaged("; ".join(request.misses) + " (strict=True; use strict=False to have this in the report)")


def accelerate(pipe: Any, plan: Any, strict: bool = False) -> Handle:
    """Apply a plan to this pipeline object.

    Args:
        pipe: a diffusers pipeline. Only this object and its own components are changed.
        plan: a `Plan`, the name of a preset ("exact", "balanced", "fast"), an acceleration, or several in order.
        strict: raise `NotEngaged` when something that should have engaged in a request did not.

    Returns:
        A handle: `report()`, `remove()`, and a context manager that removes.

    Raises:
        Unsupported: a member of the plan cannot act here; nothing is changed. A preset leaves it out instead.
        fastdiff.plan.PlanError: the plan is not one.
    """
    plan = Plan.of(plan)
    if hasattr(type(pipe), "_fastdiff_handle"):
        raise Unsupported("this pipeline is already accelerated; remove that handle first, or put both in one plan")
    if not hasattr(pipe, "components"):
        raise TypeError(f"accelerate needs a diffusers pipeline; this is a {type(pipe).__name__}")
    try:
        notes = plan.tuned.check(pipe) if plan.tuned else ()
    except ValueError as error:
        raise PlanError(str(error)) from error
    handle = Handle(pipe, plan, strict)
    handle._install()
    for _, hooks in handle._layers[:1]:
        for note in notes:
            hooks.counter.note(note)
    return handle


def _head(one: Acceleration) -> tuple[str, str, str, bool, str]:
    return type(one).__name__, repr(one), one.stage, one.exact, one.bound
