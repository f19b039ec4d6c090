"""`torch.compile` without graph breaks, region by region where the model repeats its blocks.

What is compiled is the innermost forward, beneath whatever other accelerations wrapped around it, so that their
decisions (which call to skip, which request this is) stay plain Python and the graph stays whole.
"""

import functools
import inspect
import threading
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice
from fastdiff.anatomy import COMPILED_CALL, anatomy, capture, compiled_regions, diffusers_hooks, original_forward
from fastdiff.hooks import Hooks

SCOPES = ("auto", "regional", "whole")
MARK = "_fastdiff_compiled"
"""Set on a denoiser while `Compile` acts on it, so that a stream knows to keep its calls at one shape."""
LEAVES_OUT = "_fastdiff_leaves_out"
"""Set on a module inside a denoiser that does not run at every step, and so cannot be part of a graph."""
_RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Compile(Acceleration):
    """Compile the denoiser. Exact up to the rounding of fused kernels.

    Args:
        scope: "regional" compiles each kind of repeated block once (diffusers' `compile_repeated_blocks` does the
            same), "whole" the denoiser in one graph, "auto" the former where the model names its blocks.
        backend: a torch.compile backend; "eager" only traces, for tests.
        mode: a torch.compile mode such as "reduce-overhead" or "max-autotune"; only with the inductor backend.
        shapes: declared (height, width) buckets in pixels, compiled when the plan is applied; another size compiles
            when first met, and is reported. Empty: any size, compiled when first met.
        dynamic: as in torch.compile; None lets torch generalise a size that keeps changing.
        on_cpu: False leaves CPUs alone (presets do, since compilation there takes long and gains less).
    """

    stage: ClassVar[str] = "compile"
    scope: str = "auto"
    backend: str = "inductor"
    mode: str | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    dynamic: bool | None = None
    on_cpu: bool = True

    def __post_init__(self):
        check_choice("Compile", "scope", self.scope, SCOPES)
        check_choice("Compile", "dynamic", self.dynamic, (None, True, False))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        for shape in self.shapes:
            if len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
                raise ValueError(f"Compile: shapes holds {shape!r}; each is (height, width) in whole pixels")
        if self.mode is not None and self.backend != "inductor":
            raise ValueError(f"Compile: mode {self.mode!r} belongs to the inductor backend; leave it out")

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Refused on CPUs unless asked for, for modules compiled already, and where hooks inside would break graphs."""
        import torch

        if self.backend not in torch._dynamo.list_backends(exclude_tags=()):
            return Verdict(False, f"torch knows no backend {self.backend!r}; use 'inductor'")
        for name, module in anatomy(pipe).denoisers.items():
            if not self.on_cpu and next(module.parameters()).device.type == "cpu":
                return Verdict(False, "compilation on a CPU is opt-in: add Compile() to the plan")
            if hasattr(module, "_orig_mod") or getattr(module, COMPILED_CALL, None) is not None:
                return Verdict(False, f"the {name} is compiled already; load it afresh")
            if self.scope == "regional" and not compiled_regions(module):
                return Verdict(False, f"the {name} names no repeated blocks; use scope='whole'")
            regions = self._regions(module)
            inside = {hook for region in regions for part, hook, _ in diffusers_hooks(region) if part is not region}
            if any(hasattr(part, LEAVES_OUT) for region in regions for part in region.modules() if part is not region):
                return Verdict(False, f"an acceleration leaves layers of the {name} out, which breaks graphs")
            if inside:
                return Verdict(
                    False, f"diffusers' {min(inside)} inside the {name}'s blocks breaks graphs; leave one out"
                )
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Put compiled forwards in place; declared shapes are compiled now, others when first met.

        Raises:
            Unsupported: a declared shape does not compile into one graph; the message has torch's reason.
        """
        graphs = _Graphs(self, hooks)
        hooks.counter.describe = graphs.describe
        for name, module in anatomy(pipe).denoisers.items():
            regions = self._regions(module)
            for region in regions:
                graphs.compile_innermost(region)
            hooks.wrap(module, "forward", graphs.around)
            hooks.set(module, MARK, True)
            hooks.counter.note(f"{name}: {len(regions)} region(s) compiled, each one graph")
        for height, width in self.shapes:
            module, args, kwargs = capture(pipe, height, width)
            graphs.declare(module, args, kwargs)

    def _regions(self, module: Any) -> list[Any]:
        """What is compiled: the repeated blocks where they are most of the model, else the whole."""
        regions = compiled_regions(module)
        most = 2 * sum(map(_size, regions)) > _size(module)
        return regions if self.scope == "regional" or (self.scope == "auto" and most) else [module]


def warmup(handle: Any, shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Run the denoiser of an accelerated pipeline once at each (height, width) in pixels; return the seconds taken."""
    import torch

    seconds = {}
    for height, width in shapes:
        module, args, kwargs = capture(handle.pipe, height, width)
        start = time.perf_counter()
        with handle.request(), torch.no_grad():
            module(*args, **kwargs)
        seconds[height, width] = time.perf_counter() - start
    return seconds


class _Graphs:
    """Compiles regions and counts the graphs that come out."""

    def __init__(self, settings: Compile, hooks: Hooks):
        import torch

        self.hooks = hooks
        self.dynamic = settings.dynamic
        self.compiled = 0
        self.declared = 0
        self.kinds: dict[type, Callable] = {}
        self._lock = threading.Lock()
        self._backend = (
            torch._TorchCompileInductorWrapper(settings.mode, None, settings.dynamic)
            if settings.backend == "inductor"
            else torch._dynamo.lookup_backend(settings.backend)
        )

    def compile_innermost(self, region: Any) -> None:
        """Replace the original forward of `region`, beneath our wrappers and diffusers' hooks."""
        import torch

        compiled = self.kinds.get(type(region))
        if compiled is None:
            # torch keeps compiled code, and counts recompilations, by code object: a copy keeps this kind of region
            # apart from the others and from anybody else's
            entry = types.FunctionType(_entry.__code__.replace(), _entry.__globals__, "region")
            options: Any = {"backend": self._count, "fullgraph": True, "dynamic": self.dynamic}
            if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13; eight before
                options["recompile_limit"] = _RECOMPILE_LIMIT
            compiled = self.kinds[type(region)] = torch.compile(entry, **options)
        owner, attribute = original_forward(region)
        inner = getattr(owner, attribute)
        function = getattr(inner, "__func__", None)
        if function is not None and inner.__self__ is region:
            # the module as an argument, not a constant: blocks of one kind then share one graph
            self.hooks.set(owner, attribute, functools.partial(compiled, function, region))
        else:
            self.hooks.set(owner, attribute, functools.partial(compiled, inner))

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stand around the denoiser's forward: count calls, and say plainly why one cannot be compiled."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            output = inner(*args, **kwargs)
        except TorchDynamoException as error:
            lines = (line.strip() for line in str(error).splitlines())
            reason = next((line for line in lines if line), type(error).__name__)
            raise Unsupported(
                f"Compile: the forward does not compile into one graph ({reason}); leave Compile out of the plan"
            ) from error
        self.hooks.counter.count(self.compiled > 0)
        if self.declared and self.compiled > self.declared:
            self.hooks.counter.miss("compiled again for a size that was not declared; add it to shapes")
        return output

    def declare(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compile for one shape; graphs made here are the declared ones."""
        import torch

        self.declared = 0
        with torch.no_grad():
            module(*args, **kwargs)
        self.declared = self.compiled

    def describe(self) -> str:
        """Say how many graphs there are and how many of them are recompilations."""
        again = max(self.compiled - max(len(self.kinds), self.declared), 0)
        return f"{self.compiled} graph(s) compiled, {again} of them again, 0 graph breaks"

    def _count(self, graph: Any, inputs: Any, **options: Any) -> Any:
        with self._lock:
            self.compiled += 1
        return self._backend(graph, inputs, **options)


def _entry(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
