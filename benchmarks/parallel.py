"""`bench parallel`: what strips, staleness and portions cost in quality, and what they send.

Ranks are virtual and take turns on this machine, so pictures and bytes are exact and times would say nothing: only
`single` has one. Rows:
    single: pictures of one process, scored against their scenes by the detector.
    sync-N, stale-N, stale-N-resync5, partial-N-P: the same pictures by N ranks; `psnr` and `max_abs_difference` are to
        `single`, `bytes` is what a rank receives per denoiser call (mean over ranks and the last ten calls).
    partial-N-sdxl1024: `bytes_ratio` of portions of 0.3 to DistriFusion as released, over a whole forward of Stable
        Diffusion XL at 1024 x 1024 in half precision, counted by shapes; `released_ratio` is PCPP's as released.

`python -m benchmarks.parallel RECORD PICTURE` draws quality against bytes.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from benchmarks.full_size import SDXL_TURBO, build
from benchmarks.record import Record, Row, could_not_run
from fastdiff.anatomy import capture, denoiser_arguments
from fastdiff.miniature import detector, path, untrained, world
from fastdiff.parallel.communicator import Communicator, using
from fastdiff.parallel.inventory import take
from fastdiff.parallel.patch import PatchParallel
from fastdiff.parallel.simulator import Run, Simulator, replica
from fastdiff.parallel.strips import Strips
from fastdiff.quality import Interval, mean_interval, psnr

if TYPE_CHECKING:
    from benchmarks.gpu import Place

STEPS, GUIDANCE, SEED = 20, 5.0, 3_000_003
NAMES = ("background", "colour", "position", "shape", "size")


def plans(ranks: int) -> dict[str, PatchParallel]:
    """Row name to what is applied."""
    return {
        f"sync-{ranks}": PatchParallel(),
        f"stale-{ranks}": PatchParallel("stale"),
        f"stale-{ranks}-resync5": PatchParallel("stale", resync=5),
        f"partial-{ranks}-0.1": PatchParallel("partial", portion=0.1),
        f"partial-{ranks}-0.3": PatchParallel("partial", portion=0.3),
        f"partial-{ranks}-0.3-resync5": PatchParallel("partial", portion=0.3, resync=5),
    }


def run(full: bool = False, prompts: int = 0, steps: int = STEPS, pipe: Any = None, shapes: bool = True) -> Record:
    """Runs the benchmark.

    Args:
        full: more than twice as many prompts.
        prompts: how many; 0 chooses.
        steps: denoising steps, more than 8.
        pipe: the pipeline to measure; the embedded one where None, untrained where there is none yet.
        shapes: also count the traffic of full-size shapes.
    """
    record = Record("parallel")
    note = ""
    if pipe is None:
        try:
            path()
            pipe = fastdiff.load()
        except FileNotFoundError:
            pipe, note = (
                untrained(),
                "random weights: the embedded model is not trained here, so accuracy means nothing",
            )
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(SEED)
    scenes = [world.object_scene(rng) for _ in range(prompts or (64 if full else 24))]
    settings = {"prompt": [world.caption(scene) for scene in scenes], "num_inference_steps": steps}

    began = perf_counter()
    truth = _draw(pipe, settings)
    row = Row("single", (perf_counter() - began) * 1000 / len(scenes), nfe=2 * steps, quality=_accuracy(truth, scenes))
    row.note = note
    record.rows.append(row)
    for ranks in (2, 4):
        for name, plan in plans(ranks).items():
            try:
                record.rows.append(_measured(name, plan, ranks, pipe, settings, truth, scenes))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                record.rows.append(could_not_run(name, error))
    if shapes:
        record.rows += list(_full_size())
    return record.finish()


def _measured(
    name: str, plan: PatchParallel, ranks: int, pipe: Any, settings: dict, truth: Tensor, scenes: list
) -> Row:
    def one(communicator: Communicator) -> tuple[Tensor, list[int]]:
        twin = replica(pipe)
        received: list[int] = []
        with fastdiff.accelerate(twin, plan, strict=True):
            pictures = _draw(twin, settings, lambda: received.append(communicator.traffic.bytes))
        return pictures, received

    done: Run = Simulator(ranks).run(one)
    pictures, _ = done.results[0]
    if not all(torch.equal(other, pictures) for other, _ in done.results):
        raise RuntimeError("ranks finished with different pictures")
    # ten calls hold whole cycles of every policy here, and come after warm-up
    last = min(10, len(done.results[0][1]) - 1)
    steady = np.mean([received[-1] - received[-1 - last] for _, received in done.results]) / last
    difference = (pictures - truth).abs().flatten(1).amax(1).numpy()
    quality = {
        "max_abs_difference": Interval.exact(float(difference.max()), len(scenes)),
        "psnr": mean_interval(np.minimum(psnr(pictures, truth).numpy(), 120.0)),
        "bytes": Interval.exact(float(steady)),
        "bytes_in_all": Interval.exact(float(np.mean([traffic.bytes for traffic in done.traffic]))),
    }
    return Row(
        name, nfe=2 * settings["num_inference_steps"], quality=quality | _accuracy(pictures, scenes), note="virtual"
    )


def _draw(pipe: Any, settings: dict[str, Any], after_step: Any = None) -> Tensor:
    """Pictures float [B, 3, H, W] in 0..1; each with its own noise."""

    def callback(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if after_step is not None:
            after_step()
        return {}

    noise = [torch.Generator().manual_seed(SEED + index) for index in range(len(settings["prompt"]))]
    given = {"guidance_scale": GUIDANCE, "output_type": "pt", "callback_on_step_end": callback}
    return pipe(**settings, **given, generator=noise).images.float()


def _accuracy(pictures: Tensor, scenes: list) -> dict[str, Interval]:
    images = [np.asarray(picture) for picture in (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()]
    found = detector.score(images, scenes)
    return {name: mean_interval(found[name]) for name in NAMES}


def _full_size() -> Iterator[Row]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_TURBO.unet)
        arguments = {
            "sample": torch.empty(1, 4, 128, 128),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)},
        }
    inventory = take(unet, arguments, torch.float16)
    for ranks in (4, 8):
        strips = Strips.share(128, [1.0] * ranks, 4)
        theirs = inventory.distrifusion_bytes(ranks)
        ours = sum(inventory.forward_bytes(strips, rank, 0.3) for rank in range(ranks)) / ranks
        gathered = (ranks - 1) / ranks * inventory.keys_and_values * inventory.item
        quality = {
            "bytes": Interval.exact(ours),
            "bytes_ratio": Interval.exact(ours / theirs),
            "released_ratio": Interval.exact((theirs - gathered * (1 - 2 / ranks)) / theirs),
        }
        yield Row(f"partial-{ranks}-sdxl1024", quality=quality, note="counted by shapes")


class _Echo(Communicator):
    """A rank in the middle of a group whose others send nothing new: the real thing's shapes and work on one device."""

    def __init__(self, ranks: int, device: torch.device):
        super().__init__(ranks // 2, ranks)
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    def _begin(self, sends: dict[int, Tensor], received: dict[int, Tensor], everybody: bool) -> None:
        own = next(iter(sends.values()), None)
        for tensor in received.values():
            if everybody and own is not None and own.shape == tensor.shape:
                tensor.copy_(own)
            else:
                tensor.zero_()

    def _finish(self, work: Any) -> None:
        pass


def efficiency_suite(place: "Place") -> Iterator[Row]:
    """How efficiently one device computes a strip: time of 1 / n of the rows, times n, over the time of all rows.

    The hooks of a rank in the middle run with neighbours that send nothing new, so attention sees all keys. The figure
    `inefficiency` goes into `fastdiff.parallel.cost.Machine`.
    """
    for architecture in place.architectures:
        pipe = build(architecture, place.device, place.dtype)
        for scale in (1, 2):
            size = architecture.size * scale
            arguments = denoiser_arguments(*capture(pipe, size, size))
            whole = None
            for ranks in (1, 2, 4, 8):
                name = f"{architecture.name} {size}px 1/{ranks} of the rows"
                if perf_counter() > place.until:
                    yield could_not_run(name, "left out: the suite's time was used up")
                    continue
                try:
                    taken = _strip_ms(pipe, arguments, ranks, place)
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    yield could_not_run(name, error)
                    continue
                row = Row.timed(name, taken, nfe=1)
                whole = whole or row.ms_median
                if whole and row.ms_median:
                    row.quality["inefficiency"] = Interval.exact(ranks * row.ms_median / whole, len(taken))
                    row.ratio = whole / row.ms_median
                yield row


@torch.no_grad()
def _strip_ms(pipe: Any, arguments: dict[str, Any], ranks: int, place: "Place") -> list[float]:
    taken = []
    with (
        using(_Echo(ranks, place.device)),
        fastdiff.accelerate(pipe, PatchParallel()) as handle,
        handle.request(),
    ):
        for _ in range(place.frames + 2):
            place.wait()
            began = perf_counter()
            pipe.unet(**arguments)
            place.wait()
            taken.append((perf_counter() - began) * 1000)
    return taken[2:]


def plot(record: Record, picture: Path) -> None:
    """Draws PSNR to one process against bytes received per call for what is not exact, a colour for each rank count."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.4), constrained_layout=True)
    for ranks, marker, side in ((2, "o", 6), (4, "s", -6)):
        rows = [row for row in record.rows if f"-{ranks}" in row.method and "psnr" in row.quality]
        labels: dict[tuple[float, float], list[str]] = {}
        for row in rows:
            if not row.method.startswith("sync"):
                place = (row.quality["bytes"].value / 1e6, row.quality["psnr"].value)
                labels.setdefault(place, []).append(row.method.replace(f"-{ranks}", "", 1))
        figures = {(row.quality["bytes"].value / 1e6, row.quality["psnr"].value): row.quality["psnr"] for row in rows}
        error = [
            [figures[at].value - figures[at].low for at in labels],
            [figures[at].high - figures[at].value for at in labels],
        ]
        axes.errorbar(
            [x for x, _ in labels], [y for _, y in labels], yerr=error, fmt=marker, label=f"{ranks} ranks", capsize=3
        )
        for place, names in labels.items():
            axes.annotate(", ".join(names), place, (8, side), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2)
    axes.set_xlabel("MB received a rank and denoiser call (steady)")
    axes.set_ylabel("PSNR to one process, dB")
    axes.set_title("sync is exact and sends what stale sends", fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    plot(Record.read(Path(sys.argv[1])), Path(sys.argv[2]))
