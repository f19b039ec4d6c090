"""The attention suite of `bench gpu`: our kernels on shapes of full-size models, beside everything else there is.

Every row is `<shape> <way>`; `ratio` is to torch's SDPA of the same shape as torch routes it. `tflops` counts what
dense attention would compute, `of_dense` is the time as a share of our exact dense kernel, `bit_stable` is 1 where five
runs gave the same bits, `relative_l1` the error against SDPA of what is not sparse. `launches` counts the kernels of
one call. Ways: `sdpa`, `cudnn` and `flash` (SDPA with that backend alone), `routed` (what `attention` takes by itself),
`exact`, `int8`, `int8_fp8` (ours), `sageattention` (the published package, where it is installed), `pre-pass`
(quantisation alone), `mass` (exact block masses), `<precision>-sparse-<percent>`, `flex-sparse-<percent>` (compiled
FlexAttention with the same blocks), and `sla-90` with `sla-90-backward`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import Row, could_not_run
from fastdiff.quality import Interval
from fastdiff_kernels.attention import PRECISIONS, Selection, attention
from fastdiff_kernels.quantise import quantise
from fastdiff_kernels.selection import block_mass, count_of, pooled_scores, top_k
from fastdiff_kernels.sparse_linear import sparse_linear

if TYPE_CHECKING:
    from benchmarks.gpu import Place

# tokens, heads and head size of one attention call of full-size models
SHAPES = {
    "sdxl-1024": (4096, 10, 64),
    "flux-1024": (4608, 24, 128),
    "wan-480p": (32760, 12, 128),
    "wan-720p": (75600, 40, 128),
}
SMALL_SHAPES = {"small": (200, 2, 32)}
PERCENTS = (50, 75, 90)
BLOCKS = (128, 64)
Work = Callable[[], Tensor]


@dataclass
class Inputs:
    """q, k and v [1, N, S, D] of one shape."""

    q: Tensor
    k: Tensor
    v: Tensor

    def chosen(self, percent: int) -> Selection:
        """The best key blocks by their means, this share left out."""
        scores, _ = pooled_scores(self.q, self.k, *BLOCKS)
        return top_k(scores, count_of(1 - percent / 100, self.k.shape[2], BLOCKS[1]), *BLOCKS)


@torch.no_grad()
def kernel_suite(place: "Place") -> Iterator[Row]:
    """Rows of every way on every shape, until the suite's time is used up."""
    for name, (tokens, heads, head) in (SHAPES if place.device.type == "cuda" else SMALL_SHAPES).items():
        q, k, v = (torch.randn(1, heads, tokens, head, device=place.device, dtype=place.dtype) for _ in "qkv")
        inputs = Inputs(q, k, v)
        base = dense = None
        for way, prepare in ways_of(inputs).items():
            if perf_counter() > place.until:
                yield could_not_run(f"{name} {way}", "left out: the suite's time was used up")
                continue
            try:
                work = prepare()
                first = work()
                times = _timed(place, work, place.frames)
                stable = all(torch.equal(first, work()) for _ in range(4))
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
                yield could_not_run(f"{name} {way}", error)
                continue
            row = Row.timed(f"{name} {way}", times)
            milliseconds = median(times)
            base = base or milliseconds
            dense = milliseconds if way == "exact" else dense
            row.ratio = base / milliseconds
            row.quality["bit_stable"] = Interval.exact(float(stable), 5)
            if way not in ("pre-pass", "mass"):
                row.quality["tflops"] = Interval.exact(4 * tokens**2 * heads * head / milliseconds / 1e9)
            if way in (*PRECISIONS, "sageattention", "cudnn", "flash", "routed"):
                row.quality["relative_l1"] = Interval.exact(_error(first, inputs))
            if dense is not None:
                row.quality["of_dense"] = Interval.exact(milliseconds / dense)
            if place.device.type == "cuda":
                row.quality["launches"] = Interval.exact(_launches(work))
            yield row


def ways_of(inputs: Inputs) -> dict[str, Callable[[], Work]]:
    """What makes each way ready; its work is called again and again."""
    q, k, v = inputs.q, inputs.k, inputs.v
    ways: dict[str, Callable[[], Work]] = {"sdpa": lambda: lambda: functional.scaled_dot_product_attention(q, k, v)}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        ways[name] = lambda backend=backend: lambda: _by_backend(inputs, backend)
    ways["routed"] = lambda: lambda: attention(q, k, v)[0]
    for precision in PRECISIONS:
        ways[precision] = lambda precision=precision: lambda: ours(inputs, precision)
    ways["sageattention"] = lambda: _published(inputs)
    ways["pre-pass"] = lambda: lambda: quantise(q, k, v, fp8=True, path="triton").q
    ways["mass"] = lambda: _mass(inputs)
    for percent in PERCENTS:
        for precision in ("exact", "int8_fp8"):
            ways[f"{precision}-sparse-{percent}"] = lambda percent=percent, precision=precision: _sparse(
                inputs, percent, precision
            )
        ways[f"flex-sparse-{percent}"] = lambda percent=percent: _flex(inputs, percent)
    ways["sla-90"] = lambda: _sla(inputs, backward=False)
    ways["sla-90-backward"] = lambda: _sla(inputs, backward=True)
    return ways


def ours(inputs: Inputs, precision: str, selection: Selection | None = None) -> Tensor:
    """Our kernel; interpreted where there is no GPU."""
    return attention(inputs.q, inputs.k, inputs.v, precision=precision, selection=selection, path="triton")[0]


def _by_backend(inputs: Inputs, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)


def _sparse(inputs: Inputs, percent: int, precision: str) -> Work:
    chosen = inputs.chosen(percent)
    return lambda: ours(inputs, precision, chosen)


def _mass(inputs: Inputs) -> Work:
    _, lse = attention(inputs.q, inputs.k, inputs.v, path="triton")
    return lambda: block_mass(inputs.q, inputs.k, lse, *BLOCKS, path="triton")


def _flex(inputs: Inputs, percent: int) -> Work:
    from fastdiff_kernels.attention.cpu import flex

    # FlexAttention's blocks are squares on GPUs
    scores, _ = pooled_scores(inputs.q, inputs.k, 128, 128)
    chosen = top_k(scores, count_of(1 - percent / 100, inputs.k.shape[2], 128), 128, 128)
    scale = inputs.q.shape[-1] ** -0.5
    return lambda: flex(inputs.q, inputs.k, inputs.v, scale, chosen)


def _sla(inputs: Inputs, backward: bool) -> Work:
    chosen = inputs.chosen(90)
    heads, head = inputs.q.shape[1], inputs.q.shape[3]
    projection = torch.zeros(heads, head, head, device=inputs.q.device)
    if not backward:
        return lambda: sparse_linear(inputs.q, inputs.k, inputs.v, projection, selection=chosen, path="triton")

    def work() -> Tensor:
        with torch.enable_grad():
            q, k, v = (one.detach().requires_grad_() for one in (inputs.q, inputs.k, inputs.v))
            output = sparse_linear(q, k, v, projection, selection=chosen, path="triton")
            return torch.autograd.grad(output.sum(), (q, k, v))[1]

    return work


def _published(inputs: Inputs) -> Work:
    from sageattention import sageattn  # type: ignore[import-not-found]

    return lambda: sageattn(inputs.q, inputs.k, inputs.v, tensor_layout="HND", is_causal=False)


def _error(found: Tensor, inputs: Inputs) -> float:
    expected = functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v).float()
    return float((found.float() - expected).abs().sum() / expected.abs().sum())


def _launches(work: Work) -> float:
    """Kernels that one call starts on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return float(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events() or ()))


def _timed(place: "Place", work: Work, turns: int) -> list[float]:
    """Milliseconds of each turn, the device waited for."""
    times = []
    for _ in range(turns):
        place.wait()
        start = perf_counter()
        work()
        place.wait()
        times.append((perf_counter() - start) * 1000)
    return times
