"""`bench attention`: how fast sparse attention is beside SDPA, and what it costs in quality on a trained model.

Rows:
    sdpa-<tokens>-<dtype>: torch's attention, 8 heads of 64.
    sparse-<percent>-<tokens>-<dtype>: with this share of key blocks left out, choosing them included; `ratio` is to the
        SDPA row of the same size, the median of ratios measured turn by turn. Computed by batched gather; the rows
        `flex-...` are compiled flex attention with the same blocks.
    dense-quality: the embedded model at 128 px, 1,024 tokens, whose pictures the others are compared with.
    <method>-quality-<percent>: the same pictures with attention in blocks of 16 tokens. Methods compute the same steps
        in full (the first two and every fourth after) but `sparsed`, which measures once and keeps its pattern, and
        `sla` and `top-k`, which compute none: `sla` is fine-tuned (`benchmarks.sparse_linear`, at 90 %), `top-k` what
        it is untrained. `far-merge`, `far-tracked` and `fastdiff` are ours: the far field of the last full step merged
        by its log-sum-exp, the same following the block means of now, and the block means alone. `far-tracked`,
        `fastdiff` and `fps` order tokens in tiles.
        `relative_l1` and `psnr` are of the final latents, `over_plain` the difference in PSNR picture by picture,
        `layer_l1` the relative L1 of attention outputs on the way of the exact model, `attribute` the share of
        attributes the detector reads right, `density` the share of block pairs computed, full steps counted.
    <method>-64px-quality-90: at the size the model was trained for, 256 tokens in blocks of 8, where accuracy means
        something: `dense`, `sla` and `top-k`.

Intervals are 95 % bootstraps over pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import fastdiff
from benchmarks.record import Record, Row, could_not_run
from benchmarks.sparse_linear import SETTINGS, weights
from fastdiff.attention.budget import calibrate
from fastdiff.attention.linear import SparseLinear
from fastdiff.attention.order import TokenOrder
from fastdiff.attention.sparse import SparseAttention
from fastdiff.miniature import detector, world
from fastdiff.quality import Interval, mean_interval
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import to_bytes
from fastdiff_kernels.attention import Selection, attention
from fastdiff_kernels.attention.cpu import flex
from fastdiff_kernels.selection import count_of, pooled_scores, top_k

TOKENS = (1024, 2048, 4096, 8192)
PERCENTS = (50, 75, 90)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD = 8, 64
BLOCKS = (512, 128)
TURNS = 5
SIZE, TRAINED_SIZE, STEPS, GUIDANCE, SEED = 128, 64, 10, 5.0, 2_000_003
FLEX_TOKENS = 4096

_BLOCKS = dict(query_block=16, key_block=16, minimum_tokens=128)
_TILE = 4
ALWAYS = dict(select="pooled", far="none", warm_up=0, refresh=0)

METHODS: dict[str, dict[str, Any]] = {
    "plain": dict(far="none"),
    "xattention": dict(select="antidiagonal", far="none"),
    "pooled": dict(select="pooled", far="none"),
    "re-ttention": dict(far="ratio"),
    "sparsed": dict(select="pattern", far="none", refresh=0),
    "fps": dict(select="tiles", far="none", precision="int8_fp8"),
    "top-k": ALWAYS,
    "far-merge": dict(far="merge"),
    "far-tracked": dict(far="tracked"),
    "fastdiff": dict(far="centroid"),
}
IN_TILES = ("fps", "far-tracked", "fastdiff")


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
    count = prompts or (32 if full else 8)
    record.rows += quality(pipe, count)
    record.rows += accuracy(pipe, 6 * count)
    return record.finish()


@torch.no_grad()
def speed(tokens: int, name: str, dtype: torch.dtype) -> list[Row]:
    """SDPA and sparse attention of one size, in turns, so that a busy moment meets all of them."""
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in "qkv")
    ways: dict[str, Any] = {f"sdpa-{tokens}-{name}": lambda: functional.scaled_dot_product_attention(q, k, v)}
    for percent in PERCENTS:
        ways[f"sparse-{percent}-{tokens}-{name}"] = lambda percent=percent: sparse(q, k, v, 1 - percent / 100)
    if tokens == FLEX_TOKENS and name == "fp32":
        for percent in PERCENTS:
            chosen = chosen_blocks(q, k, 1 - percent / 100)
            ways[f"flex-{percent}-{tokens}-{name}"] = lambda chosen=chosen: flex(q, k, v, HEAD**-0.5, chosen)
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
    return attention(q, k, v, selection=chosen_blocks(q, k, density), path="gather")[0]


def chosen_blocks(q: Tensor, k: Tensor, density: float) -> Selection:
    """The key blocks whose means agree best with those of the query blocks."""
    query_block, key_block = BLOCKS
    scores, _ = pooled_scores(q, k, query_block, key_block)
    return top_k(scores, count_of(density, k.shape[2], key_block), query_block, key_block)


@dataclass
class Pictures:
    """What a method made: latents [B, C, h, w], pictures, and seconds taken."""

    latents: Tensor
    images: list[np.ndarray]
    seconds: float


def quality(pipe: Any, count: int) -> list[Row]:
    """Rows of every method at every density beside the exact model."""
    scenes = _scenes(count)
    exact = _made(pipe, scenes, SIZE)
    rows = [_dense("dense-quality", exact, scenes)]
    for percent in PERCENTS:
        plain = None
        for method in (*METHODS, "sla"):
            name = f"{method}-quality-{percent}"
            try:
                row, psnr = _row(pipe, name, plan_of(method, percent), scenes, exact, SIZE)
            except fastdiff.Unsupported as error:
                rows.append(could_not_run(name, error))
                continue
            plain = psnr if method == "plain" else plain
            if plain is not None:
                row.quality["over_plain"] = mean_interval((psnr - plain).numpy())
            if method in METHODS:
                row.quality["layer_l1"] = _layer_error(pipe, method, percent, scenes[:2])
            rows.append(row)
    return rows


def accuracy(pipe: Any, count: int) -> list[Row]:
    """Rows at the size the model was trained for: dense, and with a tenth of the blocks at every step."""
    scenes = _scenes(count)
    exact = _made(pipe, scenes, TRAINED_SIZE)
    rows = [_dense(f"dense-{TRAINED_SIZE}px-quality", exact, scenes)]
    settings = SETTINGS[TRAINED_SIZE]
    blocks = {name: getattr(settings, name) for name in ("query_block", "key_block", "minimum_tokens")}
    plans = {
        "top-k": SparseAttention(density=settings.density, **{**ALWAYS, **blocks}),
        "sla": SparseLinear(str(weights(TRAINED_SIZE))),
    }
    for method, plan in plans.items():
        name = f"{method}-{TRAINED_SIZE}px-quality-{100 - round(100 * settings.density)}"
        try:
            rows.append(_row(pipe, name, fastdiff.Plan([plan]), scenes, exact, TRAINED_SIZE)[0])
        except fastdiff.Unsupported as error:
            rows.append(could_not_run(name, error))
    return rows


def plan_of(method: str, percent: int) -> fastdiff.Plan:
    """What a method is, with this share of blocks left out."""
    if method == "sla":
        return fastdiff.Plan([SparseLinear(str(weights(SIZE)), density=1 - percent / 100)])
    one = SparseAttention(**{"density": 1 - percent / 100, "warm_up": 2, "refresh": 4, **_BLOCKS, **METHODS[method]})
    return fastdiff.Plan([one, TokenOrder(_TILE)] if method in IN_TILES else [one])


def _dense(name: str, exact: Pictures, scenes: list[Any]) -> Row:
    row = Row.timed(name, [exact.seconds * 1000 / len(scenes)], ratio=1.0)
    row.quality["attribute"] = _attributes(exact, scenes)
    return row


def _row(
    pipe: Any, name: str, plan: fastdiff.Plan, scenes: list[Any], exact: Pictures, size: int
) -> tuple[Row, Tensor]:
    """The row, and the PSNR of each picture."""
    with fastdiff.accelerate(pipe, plan) as handle:
        made = _made(pipe, scenes, size)
        reports = handle.report().rows
    missed = "; ".join(miss for report in reports for miss in report.misses)
    row = Row.timed(name, [made.seconds * 1000 / len(scenes)], note=missed)
    row.ratio = exact.seconds / made.seconds
    change = (made.latents - exact.latents).double().flatten(1)
    truth = exact.latents.double().flatten(1)
    row.quality["relative_l1"] = mean_interval((change.abs().sum(1) / truth.abs().sum(1)).numpy())
    span = truth.amax(1) - truth.amin(1)
    psnr = 20 * span.log10() - 10 * change.square().mean(1).log10()
    row.quality["psnr"] = mean_interval(psnr.numpy())
    row.quality["attribute"] = _attributes(made, scenes)
    share = next(note for note in reports[0].notes if "of all block pairs" in note or "of key blocks" in note)
    row.quality["density"] = Interval.exact(float(share.split()[0]))
    return row, psnr


def _layer_error(pipe: Any, method: str, percent: int, scenes: list[Any]) -> Interval:
    """Relative L1 of attention outputs over layers, steps mean, where the run itself stays exact."""
    settings, *beside = plan_of(method, percent).accelerations
    assert isinstance(settings, SparseAttention)
    candidate = (settings.density, settings.precision, settings.far)
    samples = calibrate(pipe, lambda: _made(pipe, scenes, SIZE), [candidate], settings, bins=1, beside=beside)
    return mean_interval(np.array([sample.error for sample in samples if sample.candidate == candidate]))


def _scenes(count: int) -> list[Any]:
    rng = np.random.default_rng(SEED)
    return [world.object_scene(rng) for _ in range(count)]


@torch.no_grad()
def _made(pipe: Any, scenes: list[Any], size: int) -> Pictures:
    noise = [torch.Generator().manual_seed(SEED + index) for index in range(len(scenes))]
    start = perf_counter()
    latents = pipe(
        [world.caption(scene) for scene in scenes],
        height=size,
        width=size,
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


def plot(record: Record, picture: Path) -> None:
    """Draws, against the share of blocks left out, PSNR of every method, and beside it how much faster a CPU gets."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), constrained_layout=True)
    methods = dict.fromkeys(row.method.rsplit("-quality-", 1)[0] for row in record.rows if "psnr" in row.quality)
    for place, method in enumerate(name for name in methods if "px" not in name):
        found = [(percent, f"{method}-quality-{percent}") for percent in PERCENTS]
        rows = {row.method: row for row in record.rows}
        points = [(percent, rows[name].quality["psnr"]) for percent, name in found if "psnr" in rows[name].quality]
        left.plot(
            [percent + 0.5 * (place - 5) for percent, _ in points],
            [figure.value for _, figure in points],
            "o-" if method in ("fastdiff", "far-tracked", "far-merge") else "s--",
            label=method,
            color=pyplot.get_cmap("tab20")(place),
            markersize=4,
        )
    left.set_xlabel("% of key blocks left out")
    left.set_ylabel("PSNR of final latents, dB")
    left.set_xticks(PERCENTS)
    left.legend(fontsize=8, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for name, style in (("fp32", "o-"), ("bf16", "s--")):
        for percent in PERCENTS:
            rows = [row for row in record.rows if row.method.startswith(f"sparse-{percent}-") and name in row.method]
            sizes = [int(row.method.split("-")[2]) for row in rows]
            right.plot(sizes, [row.ratio for row in rows], style, label=f"{percent} %, {name}", markersize=4)
    right.set_xscale("log", base=2)
    right.set_xlabel("tokens")
    right.set_ylabel("times faster than SDPA, choosing included")
    right.legend(fontsize=8)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
