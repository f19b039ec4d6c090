"""`bench miniature`: does the embedded model draw what the words say, and how much of a miss is its autoencoder's?

Rows, each scored by the detector on the same scenes:
    renders: the scenes themselves, drawn by the world.
    autoencoder: those after encoding and decoding, which is the most any model behind it can reach.
    mini-sd: pictures generated from the scenes' captions, 25 steps of DPM-Solver++ with guidance 5. Its figures are
        relative to `autoencoder`, each with `<name>_absolute` beside it.
    shuffled: the same pictures held against other captions, which is what knowing nothing would give.

Intervals are 95 % bootstraps over scenes; the relative ones are of the paired difference. `ms_median` is one picture.
"""

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.record import Record, Row
from fastdiff.miniature import detector, render, world
from fastdiff.quality import Interval, mean_interval, paired_difference, psnr
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import check_finite, to_bytes

NAMES = ("background", "colour", "position", "shape", "size")
STEPS, GUIDANCE = 25, 5.0
SEED = 2_000_003  # scenes no training run draws: those count up from small seeds


def run(full: bool = False, prompts: int = 0, batch: int = 32, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many; 0 chooses.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    rng = np.random.default_rng(SEED)
    scenes = [world.object_scene(rng) for _ in range(prompts or (2048 if full else 512))]
    drawn = [render.render(scene) for scene in scenes]
    record = Record("miniature")
    record.rows.append(_row("renders", [], _scores(drawn, scenes)))

    decoded, taken = _collect(_through_autoencoder(pipe, drawn, batch))
    ceiling = _scores(decoded, scenes)
    row = _row("autoencoder", taken, ceiling)
    row.quality["psnr"] = mean_interval(psnr(_stack(decoded), _stack(drawn)).numpy())
    record.rows.append(row)

    made, taken = _collect(_generated(pipe, [world.caption(scene) for scene in scenes], batch))
    found = _scores(made, scenes)
    row = _row("mini-sd", taken, found, nfe=2 * STEPS)
    # an autoencoder that never gets an attribute right leaves nothing to be relative to
    row.quality = {name: _relative(found[name], ceiling[name]) for name in NAMES if np.nanmean(ceiling[name]) > 0}
    row.quality |= {f"{name}_absolute": mean_interval(found[name]) for name in NAMES}
    record.rows.append(row)

    # a rotation by half leaves no picture with its own caption
    other = scenes[len(scenes) // 2 :] + scenes[: len(scenes) // 2]
    record.rows.append(_row("shuffled", [], _scores(made, other)))
    return record.finish()


def _scores(pictures: list[np.ndarray], scenes: list[world.Scene]) -> dict[str, np.ndarray]:
    found = detector.score(pictures, scenes)
    return {name: found[name] for name in NAMES}


def _row(method: str, milliseconds: list[float], scores: dict[str, np.ndarray], nfe: int | None = None) -> Row:
    quality = {name: mean_interval(scores[name]) for name in NAMES}
    if not milliseconds:
        return Row(method, quality=quality)
    return Row.timed(method, milliseconds, nfe=nfe, quality=quality)


def _relative(found: np.ndarray, ceiling: np.ndarray) -> Interval:
    """Accuracy over the autoencoder's own, with the interval of the paired difference; the ceiling counts as known."""
    difference = paired_difference(found, ceiling, seed=0)
    top = float(np.nanmean(ceiling))
    low, value, high = (1 + side / top for side in (difference.low, difference.value, difference.high))
    return Interval(value, low, high, difference.n)


def _collect(batches: Iterator[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """Pictures uint8 [H, W, 3] from batches float [B, H, W, 3] in 0..1, and milliseconds for each picture."""
    pictures: list[np.ndarray] = []
    taken: list[float] = []
    start = perf_counter()
    for batch in batches:
        taken += [(perf_counter() - start) * 1000 / len(batch)] * len(batch)
        check_finite(batch, "a picture")
        pictures += [to_bytes(picture) for picture in batch]
        start = perf_counter()
    return pictures, taken


@torch.no_grad()
def _through_autoencoder(pipe: Any, pictures: list[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    weight = next(pipe.vae.parameters())
    for start in range(0, len(pictures), batch):
        images = (_stack(pictures[start : start + batch]) * 2 - 1).to(weight.device, weight.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(images).latents).sample
        yield (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()


def _generated(pipe: Any, prompts: list[str], batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        # each picture has its own noise, whatever the batch size
        noise = [torch.Generator().manual_seed(SEED + start + index) for index in range(len(some))]
        yield pipe(some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, output_type="np").images


def _stack(pictures: list[np.ndarray]) -> torch.Tensor:
    """Float [B, 3, H, W] in 0..1 of uint8 pictures [H, W, 3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
