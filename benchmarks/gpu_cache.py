"""Two suites of `bench gpu`: what leaving a call out costs, and how fast 8-bit linear layers are.

`skips`: rows `<model> <size>px <way> <call>`, the milliseconds of single denoiser calls within a run of the pipeline.
Ways: `plain`, `forecast`, and both again under `Compile` (`compiled`) and with CUDA graphs (`graphed`); calls:
`computed` and `left out`. `of_step` is a call's time as a share of the plain computed one of its kind, `in_graph` the
share of computed calls that ran compiled.

`linears`: rows `<layer> <way>`; `ratio` is to bfloat16, `tflops` counts products, `of_peak` is their share of the
device's dense peak for the way's number format (8 bits: twice that of bfloat16), `output_error` the relative error.
Ways: `bf16`, `int8-product` and `fp8-product` (torch's products alone, activations rounded beforehand),
`fastdiff-w8a8`, and `torchao-int8`, `torchao-fp8` compiled, where torchao is installed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import fastdiff
from benchmarks.full_size import build
from benchmarks.record import Row, could_not_run
from fastdiff.acceleration import Acceleration
from fastdiff.caching.forecast import Forecast
from fastdiff.quality import Interval
from fastdiff.quantization.torchao_layers import torchao_linear
from fastdiff.quantization.w8a8 import W8A8Linear
from fastdiff.runtime.compile import Compile
from fastdiff_kernels.w8a8 import quantise_rows, quantise_weight

if TYPE_CHECKING:
    from benchmarks.gpu import Place

STEPS = 12
# the first is computed, the last is computed, nine of ten between are left out
FORECAST = Forecast(interval=10, warm_up=1, tail=1, order=1, quantity="output")
WAYS: dict[str, tuple[Compile, ...]] = {
    "": (),
    "compiled ": (Compile(),),
    "graphed ": (Compile(mode="reduce-overhead"),),
}
# tokens, inputs, outputs: SDXL at 1,024 pixels with both branches of guidance, FLUX at 1,024 pixels
LAYERS = {
    "sdxl-attention-640": (8192, 640, 640),
    "sdxl-attention-1280": (2048, 1280, 1280),
    "sdxl-feed-in-1280": (2048, 1280, 10240),
    "sdxl-feed-out-1280": (2048, 5120, 1280),
    "flux-attention": (4608, 3072, 3072),
    "flux-feed-in": (4608, 3072, 12288),
    "flux-feed-out": (4608, 12288, 3072),
    "flux-single-out": (4608, 15360, 3072),
}
Work = Callable[[], Any]
SMALL_LAYERS = {"small": (64, 32, 48)}


def skip_suite(place: "Place") -> Iterator[Row]:
    """Rows of every architecture and way."""
    for architecture in place.architectures:
        pipe = build(architecture, place.device, place.dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        for way, members in WAYS.items():
            name = f"{architecture.name} {architecture.size}px {way}"
            if perf_counter() > place.until:
                yield could_not_run(f"{name}plain", "left out: the suite's time was used up")
                continue
            try:
                yield from skips(place, pipe, architecture.size, name, members)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                yield could_not_run(f"{name}plain", error)
        pipe = None


def skips(place: "Place", pipe: Any, size: int, name: str, members: tuple[Compile, ...]) -> Iterator[Row]:
    """Rows of one pipeline under `Compile` or not: its calls as it is, and computed and left out under a forecast."""
    base, _ = _calls(place, pipe, size, members)
    step = median(base["computed"])
    yield Row.timed(f"{name}plain computed", base["computed"], nfe=1, quality={"of_step": Interval.exact(1.0)})
    found, share = _calls(place, pipe, size, (FORECAST, *members))
    for kind in ("computed", "left out"):
        row = Row.timed(f"{name}forecast {kind}", found[kind], nfe=int(kind == "computed"))
        row.ratio = step / median(found[kind])
        row.quality["of_step"] = Interval.exact(median(found[kind]) / step, len(found[kind]))
        if members and kind == "computed":
            row.quality["in_graph"] = Interval.exact(share)
        yield row


def _calls(
    place: "Place", pipe: Any, size: int, members: tuple[Acceleration, ...]
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of each denoiser call of a warmed-up run, by kind, and the share of computed ones in a graph."""
    times: dict[str, list[float]] = {"computed": [], "left out": []}
    with fastdiff.accelerate(pipe, fastdiff.Plan(members)) as handle:
        _run(pipe, size, place)
        counters = {row.name: row for row in handle.report().rows}
        before = counters["Forecast"].accelerated if "Forecast" in counters else 0
        forward = pipe.unet.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal before
            place.wait()
            start = perf_counter()
            output = forward(*args, **kwargs)
            place.wait()
            taken = (perf_counter() - start) * 1000
            rows = {row.name: row for row in handle.report().rows}
            now = rows["Forecast"].accelerated if "Forecast" in rows else 0
            times["left out" if now > before else "computed"].append(taken)
            before = now
            return output

        covered = pipe.unet.__dict__.get("forward")
        pipe.unet.forward = timed
        try:
            for _ in range(max(1, place.frames // STEPS)):
                _run(pipe, size, place)
        finally:
            # what was changed later is undone first
            if covered is None:
                del pipe.unet.forward
            else:
                pipe.unet.forward = covered
        rows = {row.name: row for row in handle.report().rows}
    share = rows["Compile"].accelerated / max(rows["Compile"].seen, 1) if "Compile" in rows else 0.0
    return times, share


def _run(pipe: Any, size: int, place: "Place") -> None:
    picture = torch.zeros(place.pictures, 3, size, size, device=place.device, dtype=place.dtype)
    given: dict[str, Any] = dict(image=picture, strength=1.0, num_inference_steps=STEPS, guidance_scale=1.0)
    words = ["a red circle"] * place.pictures
    pipe(prompt=words, generator=torch.Generator().manual_seed(0), output_type="latent", **given)


@dataclass
class _Layer:
    """One layer with Gaussian weights and inputs."""

    x: Tensor
    plain: torch.nn.Linear

    @classmethod
    def drawn(cls, place: "Place", tokens: int, inputs: int, outputs: int) -> "_Layer":
        torch.manual_seed(0)
        x = torch.randn(tokens, inputs, device=place.device, dtype=torch.bfloat16)
        plain = torch.nn.Linear(inputs, outputs, device=place.device, dtype=torch.bfloat16).requires_grad_(False)
        return cls(x, plain)

    def ways(self) -> dict[str, Callable[[], Work]]:
        """What makes each way ready; its work is called again and again."""
        return {
            "bf16": lambda: lambda: self.plain(self.x),
            "int8-product": self._int8,
            "fp8-product": self._fp8,
            "fastdiff-w8a8": lambda: self._layer(W8A8Linear(self.plain)),
            "torchao-int8": lambda: self._layer(torch.compile(torchao_linear(self.plain, "torchao-int8"))),
            "torchao-fp8": lambda: self._layer(torch.compile(torchao_linear(self.plain, "torchao-fp8"))),
        }

    def _layer(self, module: Any) -> Work:
        return lambda: module(self.x)

    def _int8(self) -> Work:
        weight, scale = quantise_weight(self.plain.weight)
        whole, token = quantise_rows(self.x)
        product: Any = torch._int_mm
        both = token * scale
        # scaled when it is compared, not while it is timed
        return lambda: _Scaled(product(whole, weight.t()), both)

    def _fp8(self) -> Work:
        most = torch.finfo(torch.float8_e4m3fn).max
        (x, token), (weight, scale) = (_eight(one, most) for one in (self.x, self.plain.weight))
        product: Any = torch._scaled_mm
        return lambda: product(x, weight.t(), scale_a=token, scale_b=scale.t(), out_dtype=torch.bfloat16)


class _Scaled:
    """An integer product with what it has to be multiplied by; `float()` gives the layer's output without bias."""

    def __init__(self, product: Tensor, scale: Tensor):
        self.product, self.scale = product, scale

    def float(self) -> Tensor:
        return self.product.float() * self.scale


def _eight(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Rows in float8 and their float32 scales [n, 1]."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def linear_suite(place: "Place") -> Iterator[Row]:
    """Rows of every layer and way."""
    for name, (tokens, inputs, outputs) in (LAYERS if place.device.type == "cuda" else SMALL_LAYERS).items():
        layer = _Layer.drawn(place, tokens, inputs, outputs)
        base = None
        for way, prepare in layer.ways().items():
            if perf_counter() > place.until:
                yield could_not_run(f"{name} {way}", "left out: the suite's time was used up")
                continue
            try:
                work = prepare()
                error = _error(work(), layer, bias="product" not in way)
                times = _timed(place, work)
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as failed:
                yield could_not_run(f"{name} {way}", failed)
                continue
            row = Row.timed(f"{name} {way}", times)
            base = base or median(times)
            row.ratio = base / median(times)
            operations = 2 * tokens * inputs * outputs / median(times) * 1000
            row.quality = {
                "tflops": Interval.exact(operations / 1e12),
                "output_error": Interval.exact(error),
            }
            if place.peak:
                row.quality["of_peak"] = Interval.exact(operations / place.peak / (1 if way == "bf16" else 2))
            yield row


def _error(found: Any, layer: _Layer, bias: bool) -> float:
    weight = layer.plain.weight.float()
    truth = layer.x.float() @ weight.mT + (layer.plain.bias.float() if bias else 0.0)
    return float((found.float() - truth).norm() / truth.norm())


def _timed(place: "Place", work: Callable[[], Any]) -> list[float]:
    for _ in range(3):
        work()
    times = []
    for _ in range(max(place.frames, 3)):
        place.wait()
        start = perf_counter()
        work()
        place.wait()
        times.append((perf_counter() - start) * 1000)
    return times
