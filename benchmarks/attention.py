"""`bench attention`: how fast sparse attention is beside SDPA, and what it costs in quality on a trained model.

Rows:
    sdpa-<tokens>-<dtype>: torch's attention, 8 heads of 64.
    sparse-<percent>-<tokens>-<dtype>: with this share of key blocks left out, choosing them included; `ratio` is to the
        SDPA row of the same size, the median of ratios measured turn by turn. Computed by batched gather; the rows
        `flex-...` are compiled flex attention with the same blocks.
    dense-quality: the embedded model at 128 px, 1,024 tokens, whose pictures the others are compared with.
    <method>-quality-<percent>: the same pictures with attention in blocks of 16 tokens. Every method has its tokens in
        tiles and computes the same steps in full (the first two and every fourth after) but `sparsed`, which measures
        once and keeps its pattern, and `sla` and `top-k`, which compute none: `sla` is fine-tuned
        (`benchmarks.sparse_linear`, at 90 %), `top-k` what it is untrained. `far-merge`, `far-tracked` and `fastdiff`
        are ours: the far field of the last full step merged by its log-sum-exp, the same following the block means of
        now, and the block means alone, which is the default.
        `relative_l1` and `psnr` are of the final latents, `over_plain` the difference in PSNR picture by picture,
        `layer_l1` the relative L1 of attention outputs on the way of the exact model, `attribute` the share of
        attributes the detector reads right, `density` the share of block pairs computed, full steps counted.
    <method>-64px-quality-90: at the size the model was trained for, 256 tokens in blocks of 8, where accuracy means
        something: `dense`, `sla` and `top-k`.
    <method>-quality-<percent>-dit, ...-video: the embedded transformer and video model at the sizes they were trained
        for; one row that says why where a model is not there.

Intervals are 95 % bootstraps over pictures; those of `layer_l1` over the calls of one picture.
"""

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.attention_quality import PERCENTS, accuracy, mini_sd, other_rows, quality
from benchmarks.record import Record, Row, could_not_run
from fastdiff.quality import Interval
from fastdiff_kernels.attention import Selection, attention
from fastdiff_kernels.attention.cpu import flex
from fastdiff_kernels.selection import count_of, pooled_scores, top_k

TOKENS = (1024, 2048, 4096, 8192)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD = 8, 64
BLOCKS = (512, 128)
TURNS = 5
FLEX_TOKENS = 4096
OURS = ("fastdiff", "far-tracked", "far-merge")


def run(full: bool = False, prompts: int = 0, tokens: tuple[int, ...] = TOKENS, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many pictures.
        prompts: how many pictures; 0 chooses.
        tokens: lengths that are timed.
        pipe: the model whose quality is measured; where None the embedded one, and with it those that ship beside it.
    """
    record = Record("attention")
    for size in tokens:
        for name, dtype in DTYPES.items():
            record.rows += speed(size, name, dtype)
    count = prompts or (48 if full else 12)
    subject = mini_sd(pipe)
    record.rows += quality(subject, count)
    record.rows += accuracy(subject, 6 * count)
    if pipe is None:
        record.rows += other_rows(count)
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


def plot(record: Record, picture: Path) -> None:
    """Draws PSNR of every method against the share of blocks left out, and beside it how much faster a CPU gets."""
    from matplotlib import pyplot

    rows = [row for row in record.rows if "psnr" in row.quality and "px-" not in row.method]
    endings = list(dict.fromkeys(row.method.rsplit("-quality-", 1)[1].lstrip("0123456789") for row in rows)) or [""]
    figure, panels = pyplot.subplots(1, len(endings) + 1, figsize=(5.5 * len(endings) + 5.5, 5), layout="constrained")
    for panel, ending in zip(panels, endings, strict=False):
        _quality_panel(panel, {row.method: row.quality for row in rows}, ending)
    right = panels[-1]
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


def _quality_panel(panel: Any, found: dict[str, dict[str, Interval]], ending: str) -> None:
    """PSNR against the share of block pairs that was really left out, steps in full counted."""
    from matplotlib import pyplot

    methods = list(dict.fromkeys(name.rsplit("-quality-", 1)[0] for name in found))
    for place, method in enumerate(methods):
        points = [found.get(f"{method}-quality-{percent}{ending}") for percent in PERCENTS]
        known = [(100 * (1 - one["density"].value), one["psnr"].value) for one in points if one]
        panel.plot(
            [left for left, _ in known],
            [value for _, value in known],
            "o-" if method in OURS else "s--",
            label=method,
            color=pyplot.get_cmap("tab20")(place),
            markersize=4,
        )
    panel.set_title(f"mini-{ending[1:]}" if ending else "mini-sd, 128 px")
    panel.set_xlabel("% of block pairs left out, over all steps")
    panel.set_ylabel("PSNR of final latents, dB")
    panel.legend(fontsize=8, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
