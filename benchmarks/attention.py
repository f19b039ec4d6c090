"""`bench attention`: how fast sparse attention is beside SDPA, and what it costs in quality on a trained model.

Rows:
    sdpa-<tokens>-<dtype>: torch's attention, 8 heads of 64.
    sparse-<percent>-<tokens>-<dtype>: with this share of key blocks left out, choosing them included; `ratio` is to the
        SDPA row of the same size, the median of ratios measured turn by turn. Computed by batched gather.
    dense-quality: the embedded model at 128 px, 1,024 tokens, whose pictures the others are compared with.
    <method>-quality-<percent>: the same pictures with attention in blocks of 16 tokens. All methods compute the same
        steps in full (the first two and every fourth after) but `sparsed`, which measures once and keeps its pattern.
        `relative_l1` and `psnr` are of the final latents, `attribute` the share of attributes the detector reads
        right, `density` the share of block pairs computed, full steps counted. `far-merge` and `fastdiff` are both
        ours: the far field merged by its log-sum-exp, and the same following the centroids of now.

Intervals are 95 % bootstraps over pictures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import fastdiff
from benchmarks.record import Record, Row, could_not_run
from fastdiff.attention.sparse import SparseAttention
from fastdiff.miniature import detector, world
from fastdiff.quality import Interval, mean_interval
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import to_bytes
from fastdiff_kernels.attention import PRECISIONS, attention
from fastdiff_kernels.quantise import quantise
from fastdiff_kernels.selection import count_of, pooled_scores, top_k

if TYPE_CHECKING:
    from benchmarks.gpu import Place

TOKENS = (1024, 2048, 4096, 8192)
PERCENTS = (50, 75, 90)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD = 8, 64
BLOCKS = (512, 128)
TURNS = 5
SIZE, STEPS, GUIDANCE, SEED = 128, 10, 5.0, 2_000_003

_BLOCKS = dict(query_block=16, key_block=16, minimum_tokens=128)

METHODS: dict[str, dict[str, Any]] = {
    "plain": dict(far="none"),
    "xattention": dict(select="antidiagonal", far="none"),
    "pooled": dict(select="pooled", far="none"),
    "re-ttention": dict(far="ratio"),
    "sparsed": dict(select="pattern", far="none", refresh=0),
    "fps": dict(select="tiles", far="none", precision="int8_fp8"),
    "far-merge": dict(far="merge"),
    "fastdiff": dict(far="tracked"),
}


def run(full: bool = False, prompts: int = 0, tokens: tuple[int, ...] = TOKENS, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many pictures.
        prompts: how many pictures; 0 chooses.
        tokens: lengths that are timed.
        pipe: the model whose quality is measured; the embedded one where None.
    """
    record = Record("attention")
    for size in tokens:
        for name, dtype in DTYPES.items():
            record.rows += speed(size, name, dtype)
    pipe = pipe or load_pipeline(None, "text-to-image")
    record.rows += quality(pipe, prompts or (32 if full else 8))
    return record.finish()


@torch.no_grad()
def speed(tokens: int, name: str, dtype: torch.dtype) -> list[Row]:
    """SDPA and sparse attention of one size, in turns, so that a busy moment meets all of them."""
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in "qkv")
    ways: dict[str, Any] = {f"sdpa-{tokens}-{name}": lambda: functional.scaled_dot_product_attention(q, k, v)}
    for percent in PERCENTS:
        ways[f"sparse-{percent}-{tokens}-{name}"] = lambda percent=percent: sparse(q, k, v, 1 - percent / 100)
    rows, taken = [], {way: [] for way in ways}
    failed: dict[str, Exception] = {}
    for way, work in ways.items():
        try:
            work()
        except (RuntimeError, ValueError) as error:
            failed[way] = error
    for _ in range(TURNS):
        for way, work in ways.items():
            if way not in failed:
                start = perf_counter()
                work()
                taken[way].append((perf_counter() - start) * 1000)
    dense = taken[next(iter(ways))]
    for way, times in taken.items():
        if way in failed:
            rows.append(could_not_run(way, failed[way]))
            continue
        ratio = median(base / time for base, time in zip(dense, times, strict=True))
        rows.append(Row.timed(way, times, ratio=ratio))
    return rows


def sparse(q: Tensor, k: Tensor, v: Tensor, density: float) -> Tensor:
    """Choose by block means and compute by batched gather."""
    query_block, key_block = BLOCKS
    scores, _ = pooled_scores(q, k, query_block, key_block)
    chosen = top_k(scores, count_of(density, k.shape[2], key_block), query_block, key_block)
    return attention(q, k, v, selection=chosen, path="gather")[0]


@dataclass
class Pictures:
    """What a method made: latents [B, C, h, w], pictures, and seconds taken."""

    latents: Tensor
    images: list[np.ndarray]
    seconds: float


def quality(pipe: Any, count: int) -> list[Row]:
    """Rows of every method at every density beside the exact model."""
    rng = np.random.default_rng(SEED)
    scenes = [world.object_scene(rng) for _ in range(count)]
    exact = _made(pipe, scenes)
    base = Row.timed("dense-quality", [exact.seconds * 1000 / count], ratio=1.0)
    base.quality["attribute"] = _attributes(exact, scenes)
    rows = [base]
    for percent in PERCENTS:
        for method, settings in METHODS.items():
            rows.append(_row(pipe, f"{method}-quality-{percent}", settings, percent, scenes, exact))
        rows.append(could_not_run(f"sla-quality-{percent}", "not trained here; untrained it is `pooled` top-k"))
    return rows


def _row(pipe: Any, name: str, settings: dict[str, Any], percent: int, scenes: list[Any], exact: Pictures) -> Row:
    given = {"warm_up": 2, "refresh": 4, **settings}
    one = SparseAttention(**{"density": 1 - percent / 100, **_BLOCKS, **given})
    with fastdiff.accelerate(pipe, one) as handle:
        made = _made(pipe, scenes)
        report = handle.report().rows[0]
    row = Row.timed(name, [made.seconds * 1000 / len(scenes)], note="; ".join(report.misses))
    row.ratio = exact.seconds / made.seconds
    change = (made.latents - exact.latents).double().flatten(1)
    truth = exact.latents.double().flatten(1)
    row.quality["relative_l1"] = mean_interval((change.abs().sum(1) / truth.abs().sum(1)).numpy())
    span = truth.amax(1) - truth.amin(1)
    row.quality["psnr"] = mean_interval((20 * span.log10() - 10 * change.square().mean(1).log10()).numpy())
    row.quality["attribute"] = _attributes(made, scenes)
    share = next(note for note in report.notes if "of all block pairs" in note)
    row.quality["density"] = Interval.exact(float(share.split()[0]))
    return row


@torch.no_grad()
def _made(pipe: Any, scenes: list[Any]) -> Pictures:
    noise = [torch.Generator().manual_seed(SEED + index) for index in range(len(scenes))]
    start = perf_counter()
    latents = pipe(
        [world.caption(scene) for scene in scenes],
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=noise,
        output_type="latent",
    ).images
    seconds = perf_counter() - start
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
    return Pictures(latents, [to_bytes(image) for image in images], seconds)


def _attributes(made: Pictures, scenes: list[Any]) -> Interval:
    found = detector.score(made.images, scenes)
    names = ("background", "colour", "position", "shape", "size")
    return mean_interval(np.mean([found[name] for name in names], axis=0))


# tokens, heads and head size of one attention call of full-size models
SHAPES = {
    "sdxl-1024": (4096, 10, 64),
    "flux-1024": (4608, 24, 128),
    "wan-480p": (32760, 12, 128),
    "wan-720p": (75600, 40, 128),
}
SMALL_SHAPES = {"small": (200, 2, 32)}


@torch.no_grad()
def kernel_suite(place: "Place") -> Iterator[Row]:
    """Our kernels on shapes of full-size models; `ratio` is to torch's SDPA of the same shape.

    `tflops` counts what dense attention would compute, `of_dense` is the time as a share of our exact dense kernel, and
    `bit_stable` is 1 where five runs gave the same bits. `pre-pass` is quantisation alone.
    """
    for name, (tokens, heads, head) in (SHAPES if place.device.type == "cuda" else SMALL_SHAPES).items():
        q, k, v = (torch.randn(1, heads, tokens, head, device=place.device, dtype=place.dtype) for _ in "qkv")
        base = dense = None
        for way, work in _kernel_ways(q, k, v).items():
            if perf_counter() > place.until:
                yield could_not_run(f"{name} {way}", "left out: the suite's time was used up")
                continue
            try:
                first = work()
                times = _timed(place, work, place.frames)
                stable = all(torch.equal(first, work()) for _ in range(4))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                yield could_not_run(f"{name} {way}", error)
                continue
            row = Row.timed(f"{name} {way}", times)
            milliseconds = median(times)
            base = base or milliseconds
            dense = milliseconds if way == "exact" else dense
            row.ratio = base / milliseconds
            row.quality["bit_stable"] = Interval.exact(float(stable), 5)
            if way != "pre-pass":
                row.quality["tflops"] = Interval.exact(4 * tokens**2 * heads * head / milliseconds / 1e9)
            if dense is not None:
                row.quality["of_dense"] = Interval.exact(milliseconds / dense)
            yield row


def _kernel_ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    def sparse_of(percent: int, precision: str) -> Callable[[], Tensor]:
        scores, _ = pooled_scores(q, k, 128, 64)
        chosen = top_k(scores, count_of(1 - percent / 100, k.shape[2], 64), 128, 64)
        return lambda: attention(q, k, v, selection=chosen, precision=precision)[0]

    ways: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: functional.scaled_dot_product_attention(q, k, v)}
    for precision in PRECISIONS:
        ways[precision] = lambda precision=precision: attention(q, k, v, precision=precision)[0]
    ways["pre-pass"] = lambda: quantise(q, k, v, fp8=True).q
    for percent in PERCENTS:
        for precision in ("exact", "int8_fp8"):
            ways[f"{precision}-sparse-{percent}"] = sparse_of(percent, precision)
    return ways


def _timed(place: "Place", work: Callable[[], Tensor], turns: int) -> list[float]:
    """Milliseconds of each turn, the device waited for."""
    times = []
    for _ in range(turns):
        place.wait()
        start = perf_counter()
        work()
        place.wait()
        times.append((perf_counter() - start) * 1000)
    return times
