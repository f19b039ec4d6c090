"""Changing one pipeline object so that it can be changed back, and keeping state that belongs to a request.

Two ideas. `Hooks` writes down everything it does to an object and undoes it last in, first out; it touches instances
only, never a class that anybody else uses. `Request` holds whatever must not outlive one generation: a request begins
and ends around the pipeline's `__call__` (or a `with handle.request():` block) and drops its state when it ends,
however it ends. Which request is being served is a context variable, so threads and nested calls do not meet.
"""

import copy
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

MISSING = object()
_open_requests: ContextVar[tuple["Request", ...]] = ContextVar("fastdiff_open_requests", default=())


class RemovalOrder(RuntimeError):
    """Something else was installed on top of what is to be removed. Nothing was changed."""


class Request:
    """The state of one generation on one accelerated pipeline.

    Used as a context manager, it is the current request inside the block and drops its state at the end of it. With
    `keep=True` the state survives the block, and the request may be entered again (a stream enters it once per
    push), until `close()`.

    Attributes:
        pipe: the pipeline object that runs this request (a private copy when requests overlap), None if unknown.
        call: True when the request is a call of the pipeline, False when it was opened explicitly.
        stray: True for a denoiser call outside of any request, which has a request to itself and is not reported.
        branch: which guidance branch the denoiser is being called for, set by whoever knows.
        tally: per acceleration name, `[calls seen, calls accelerated]` of this request.
        misses: what should have engaged in this request and did not.
    """

    def __init__(
        self, requests: "Requests", pipe: Any = None, call: bool = False, keep: bool = False, stray: bool = False
    ):
        self.requests = requests
        self.stray = stray
        self.pipe = pipe
        self.call = call
        self.keep = keep
        self.number = next(requests.numbers)
        self.branch: Hashable = None
        self.tally: dict[str, list[int]] = {}
        self.misses: list[str] = []
        self.closed = False
        self._states: dict[Hashable, Any] = {}

    def state(self, key: Hashable, factory: Callable[[], Any]) -> Any:
        """Return this request's state under `key`, made by `factory` on first use.

        Include `request.branch` in the key where guidance branches must not meet.
        """
        if key not in self._states:
            self._states[key] = factory()
        return self._states[key]

    @property
    def bytes_held(self) -> int:
        """Bytes of the tensors in this request's states."""
        return _tensor_bytes(list(self._states.values()), depth=5)

    def __enter__(self) -> "Request":
        if self.closed:
            raise RuntimeError("this request is closed; open another one with handle.request()")
        _open_requests.set((*_open_requests.get(), self))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # not ContextVar.reset: a generator may be left in another context than it was entered in
        _open_requests.set(tuple(request for request in _open_requests.get() if request is not self))
        if not self.keep or error is not None:
            self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        """Drop the state. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self._states.clear()
        if not self.stray:
            self.requests.finished(self, failed)


def _tensor_bytes(value: Any, depth: int) -> int:
    """Bytes of the tensors in nested containers and plain objects, looked into `depth` levels deep."""
    if hasattr(value, "nbytes"):
        return value.nbytes
    if depth == 0:
        return 0
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = value
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return sum(_tensor_bytes(item, depth - 1) for item in inside)


def _twin(pipe: Any) -> Any:
    """Copy a pipeline shallowly, sharing the models and nothing that a call writes to."""
    twin = copy.copy(pipe)
    if getattr(pipe, "scheduler", None) is not None:
        twin.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    return twin


class Requests:
    """All requests of one accelerated pipeline: opens them and knows which one is current."""

    def __init__(self, finished: Callable[[Request, bool], None] = lambda request, failed: None):
        self.numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: list[Request] = []
        self._finished = finished
        self._open: weakref.WeakSet[Request] = weakref.WeakSet()

    def open(self, keep: bool = False, stray: bool = False) -> Request:
        """Open a request explicitly; enter it with `with`."""
        request = Request(self, keep=keep, stray=stray)
        self._open.add(request)
        return request

    @property
    def bytes_held(self) -> int:
        """Bytes that all open requests hold."""
        return sum(request.bytes_held for request in list(self._open))

    def open_call(self, pipe: Any) -> Request:
        """Open the request of one call of the pipeline.

        The first of several overlapping calls runs on `pipe` itself; the others get a copy with a scheduler of its
        own, since diffusers keeps the scheduler's position and the call's arguments on the pipeline object.
        """
        request = Request(self, pipe, call=True)
        with self._lock:
            if any(other.pipe is pipe for other in self._calls):
                request.pipe = _twin(pipe)
            self._calls.append(request)
        self._open.add(request)
        return request

    def finished(self, request: Request, failed: bool) -> None:
        """Called once when a request ends; `failed` when an exception ended it."""
        with self._lock:
            if request in self._calls:
                self._calls.remove(request)
        self._finished(request, failed)

    def current(self) -> Request | None:
        """The innermost open request of this pipeline in this thread or task, if any."""
        for request in reversed(_open_requests.get()):
            if request.requests is self:
                return request
        return None


class Counter:
    """What one acceleration did: calls seen, calls accelerated, and what should have engaged and did not."""

    def __init__(self, name: str, requests: Requests):
        self.name = name
        self.seen = 0
        self.accelerated = 0
        self.misses: list[str] = []
        self.notes: list[str] = []
        self.held: Callable[[], int] = lambda: 0
        self.describe: Callable[[], str] = lambda: ""
        # what a finished request must have shown: "engaged" (a call accelerated), "seen" (a call seen) or "nothing"
        self.expects = "engaged"
        self._requests = requests
        self._lock = threading.Lock()

    def count(self, accelerated: bool) -> None:
        """Note one call, made faster or not."""
        request = self._requests.current()
        with self._lock:
            self.seen += 1
            self.accelerated += accelerated
            if request is not None:
                tally = request.tally.setdefault(self.name, [0, 0])
                tally[0] += 1
                tally[1] += accelerated

    def miss(self, reason: str, request: Request | None = None) -> None:
        """Note that something which should have engaged, in `request` or the current one, did not."""
        request = request or self._requests.current()
        with self._lock:
            if reason not in self.misses:
                self.misses.append(reason)
            if request is not None:
                request.misses.append(f"{self.name} {reason}")

    def note(self, text: str) -> None:
        """Note something worth reading in the report."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def finish(self, request: Request) -> None:
        """Check a request that ended well against what was expected of it."""
        seen, accelerated = request.tally.get(self.name, (0, 0))
        if self.expects == "engaged" and not accelerated:
            self.miss(f"accelerated none of {seen} calls in a request", request)
        elif self.expects == "seen" and request.call and not seen:
            self.miss("was never reached during a call of the pipeline", request)


class Wrapped:
    """An instance attribute standing in for a method: `around(inner, *args, **kwargs)`.

    `inner` is what stood there before; it may be replaced (compilation does) without disturbing the chain.
    """

    def __init__(self, inner: Callable, around: Callable):
        # keeps inspect.signature, which diffusers consults, on the real method
        functools.update_wrapper(self, inner, updated=())
        self.inner = inner
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.inner, *args, **kwargs)


@dataclass
class _Change:
    """One attribute of one instance (or of a pipeline's private class) that was given another value."""

    owner: Any
    attribute: str
    value: Any
    before: Any

    @property
    def store(self) -> Any:
        store = self.owner.__dict__
        return store["_modules"] if self.attribute in store.get("_modules", ()) else store

    @property
    def place(self) -> tuple[int, str]:
        return id(self.owner), self.attribute

    def put(self, value: Any) -> None:
        if not isinstance(self.owner, type):
            if value is MISSING:
                self.store.pop(self.attribute, None)
            else:
                self.store[self.attribute] = value
        elif value is MISSING:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, value)


class Hooks:
    """Everything one acceleration does to one pipeline, undone last in, first out.

    Attributes:
        requests: the pipeline's requests; `requests.current()` is the one being served.
        counter: what this acceleration saw and did.
    """

    def __init__(self, name: str, requests: Requests):
        self.name = name
        self.requests = requests
        self.counter = Counter(name, requests)
        self._done: list[_Change | Callable[[], None]] = []

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an instance attribute (or a submodule of a `torch.nn.Module`) and remember what was there."""
        change = _Change(owner, attribute, value, MISSING)
        change.before = change.store.get(attribute, MISSING)
        change.put(value)
        self._done.append(change)

    def swap(self, pipe: Any, name: str, component: Any, also: tuple[str, ...] = ()) -> None:
        """Set a component the pipeline's own way, remembering it and the attributes `also` that this writes to."""
        changes = [_Change(pipe, attribute, None, pipe.__dict__.get(attribute, MISSING)) for attribute in (*also, name)]
        setattr(pipe, name, component)
        for change in changes:
            change.value = pipe.__dict__.get(change.attribute, MISSING)
        self._done += changes

    def adopt(self, owner: Any, attribute: str, before: Any) -> None:
        """Record an attribute that somebody else has set; `before` is what was there, `MISSING` if nothing."""
        self._done.append(_Change(owner, attribute, owner.__dict__.get(attribute, MISSING), before))

    def wrap(self, owner: Any, method: str, around: Callable) -> Wrapped:
        """Put `around(inner, *args, **kwargs)` in the place of `owner.method`, for this instance only."""
        wrapped = Wrapped(getattr(owner, method), around)
        self.set(owner, method, wrapped)
        return wrapped

    def override(self, pipe: Any, method: str, around: Callable) -> None:
        """Like `wrap` for a method of the pipeline, with `around(inner, pipe, *args, **kwargs)`.

        It lives on the pipeline's private class, so that a private copy of the pipeline (an overlapping request) gets
        it too, bound to the copy.
        """
        if method in pipe.__dict__:
            self.wrap(pipe, method, lambda inner, *args, **kwargs: around(inner, pipe, *args, **kwargs))
            return
        inherited = getattr(type(pipe), method)

        @functools.wraps(inherited)
        def overridden(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(functools.partial(inherited, self), self, *args, **kwargs)

        self.set(type(pipe), method, overridden)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Record how to undo something done by other means."""
        self._done.append(undo)

    def undo(self) -> None:
        """Undo everything, last in, first out. A second call does nothing."""
        while self._done:
            change = self._done.pop()
            if isinstance(change, _Change):
                change.put(change.before)
            else:
                change()


def check_on_top(layers: list[Hooks]) -> None:
    """Raise `RemovalOrder` unless undoing `layers`, last first, would uncover exactly what each of them covered."""
    now: dict[tuple[int, str], Any] = {}
    for layer in reversed(layers):
        for change in reversed(layer._done):
            if not isinstance(change, _Change):
                continue
            if now.get(change.place, change.store.get(change.attribute, MISSING)) is not change.value:
                raise RemovalOrder(
                    f"{type(change.owner).__name__}.{change.attribute} was changed again after {layer.name} had "
                    "changed it; undo the later change first, then remove this. Nothing was removed."
                )
            now[change.place] = change.before


def innermost(owner: Any, method: str) -> Wrapped | None:
    """Return the deepest `Wrapped` at `owner.method`, whose `inner` is the original; None when nothing wraps it."""
    wrapped = owner.__dict__.get(method)
    if not isinstance(wrapped, Wrapped):
        return None
    while isinstance(wrapped.inner, Wrapped):
        wrapped = wrapped.inner
    return wrapped
