"""`bench moving`: does the embedded video model show what the words say, and does it move as they say?

Rows, each scored by the detector on the same scenes, 17 frames each:
    renders: the scenes themselves, drawn by the world.
    autoencoder: those after encoding and decoding, which is the most any model behind it can reach.
    mini-wan: clips from the scenes' captions as diffusers' pipeline makes them, 25 steps with guidance.
    rollout: clips made causally, frame after frame, 4 steps each and no guidance.
    shuffled: the clips of `mini-wan` held against other captions, which is what knowing nothing would give.

`track_error_px` is the root mean square distance from a line of the caption's velocity, `permanence` the share of
frames in which an object of about the right area is there, `flicker` the change outside of it from frame to frame.
Intervals are 95 % bootstraps over scenes. `ms_median` is one clip.
"""

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.record import Record, Row
from fastdiff.miniature import moving, moving_detector, wan, wan_rollout, wan_training, world
from fastdiff.quality import mean_interval, psnr
from fastdiff.video.causal import CausalWan
from fastdiff_app.engine import load_pipeline

STEPS, GUIDANCE, ROLLOUT_STEPS = 25, 3.0, 4
SEED = 2_000_017  # scenes no training run draws: those count up from small seeds


def run(full: bool = False, prompts: int = 0, batch: int = 32, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many; 0 chooses.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline("mini-wan", "text-to-image")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(SEED)
    scenes = [moving.scene(rng) for _ in range(prompts or (1024 if full else 256))]
    drawn = [moving.render(scene) for scene in scenes]
    record = Record("moving")
    record.rows.append(_row("renders", drawn, scenes))
    decoded, taken = _collect(_through_autoencoder(pipe, drawn, batch))
    row = _row("autoencoder", decoded, scenes, taken)
    row.quality["psnr"] = mean_interval(_clip_psnr(decoded, drawn))
    record.rows.append(row)
    captions = [world.caption(scene) for scene in scenes]
    made, taken = _collect(whole_clips(pipe, captions, batch))
    record.rows.append(_row("mini-wan", made, scenes, taken, nfe=2 * STEPS))
    rolled, taken = _collect(rollouts(pipe, captions, batch))
    record.rows.append(_row("rollout", rolled, scenes, taken, nfe=ROLLOUT_STEPS + 1))
    record.rows.append(_row("shuffled", made, scenes[1:] + scenes[:1]))
    return record.finish()


def _row(
    method: str,
    clips: list[np.ndarray],
    scenes: list[world.Scene],
    taken: list[float] | None = None,
    nfe: int | None = None,
) -> Row:
    quality = {name: mean_interval(values) for name, values in moving_detector.score(clips, scenes).items()}
    return Row.timed(method, taken, nfe=nfe, quality=quality) if taken else Row(method, quality=quality)


def _collect(batches: Iterator[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """Clips uint8 [F, H, W, 3] from batches [B, F, H, W, 3], and milliseconds for each clip."""
    clips: list[np.ndarray] = []
    taken: list[float] = []
    start = perf_counter()
    for batch in batches:
        taken += [(perf_counter() - start) * 1000 / len(batch)] * len(batch)
        clips += list(batch)
        start = perf_counter()
    return clips, taken


def _clip_psnr(made: list[np.ndarray], drawn: list[np.ndarray]) -> np.ndarray:
    def whole(clips: list[np.ndarray]) -> torch.Tensor:  # a clip's frames side by side make one picture
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).flatten(2, 3).float() / 255

    return psnr(whole(made), whole(drawn)).numpy()


@torch.no_grad()
def _through_autoencoder(pipe: Any, clips: list[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(clips), batch):
        frames = wan_training.pixels(clips[start : start + batch]).to(pipe.vae.device, pipe.vae.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(frames).latent_dist.mode()).sample
        yield ((decoded.float() / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def whole_clips(pipe: Any, captions: list[str], batch: int, steps: int = STEPS) -> Iterator[np.ndarray]:
    """Clips of 17 frames as diffusers' pipeline makes them: uint8 [B, F, H, W, 3]."""
    for start in range(0, len(captions), batch):
        some = captions[start : start + batch]
        noise = [torch.Generator().manual_seed(SEED + start + index) for index in range(len(some))]
        made = pipe(
            some,
            height=wan.SIZE,
            width=wan.SIZE,
            num_frames=wan.FRAMES,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=noise,
            output_type="np",
        ).frames
        yield (made * 255).round().astype(np.uint8)


def rollouts(
    pipe: Any, captions: list[str], batch: int, steps: int = ROLLOUT_STEPS, frames: int = 5, guidance: float = 1.0
) -> Iterator[np.ndarray]:
    """Clips made causally, a latent frame at a time: uint8 [B, F, H, W, 3]."""
    with CausalWan(pipe.transformer) as causal:
        for start in range(0, len(captions), batch):
            some = captions[start : start + batch]
            prompts, nothing = pipe.encode_prompt(some, "", max_sequence_length=64)
            generator = torch.Generator().manual_seed(SEED + start)
            rollout = wan_rollout.Rollout(causal, prompts, generator, nothing[:1], guidance)
            latents = rollout.clip(frames, wan_rollout.sigmas(steps))
            yield wan_rollout.pixels(pipe.vae, latents).cpu().numpy()
