"""`bench moving`: does the embedded video model show what the words say, and does it move as they say?

Rows, each scored by the detector on the same scenes, 17 frames each:
    renders: the scenes themselves, drawn by the world.
    autoencoder: those after encoding and decoding, which is the most any model behind it can reach.
    mini-wan: clips from the scenes' captions as diffusers' pipeline makes them, 25 steps with guidance.
    rollout, rollout-student: clips made causally, frame after frame, 4 steps each and no guidance; by the model as it
        is, and with the LoRA that learned from its own rollouts.
    buffer-16: clips from StreamDiT's moving buffer of 4 frames under way, 16 guided steps to each.
    buffer-4, buffer-student: the same with 4 steps, no guidance; as it is, and with the LoRA distilled share by share.
    shuffled: the clips of `mini-wan` held against other captions, which is what knowing nothing would give.

`track_error_px` is the root mean square distance from a line of the caption's velocity, `permanence` the share of
frames in which an object of about the right area is there, `flicker` the change outside of it from frame to frame.
Intervals are 95 % bootstraps over scenes. `ms_median` is one clip. Rows of what has not been trained yet say so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastdiff
from benchmarks.record import Record, Row, could_not_run
from fastdiff.miniature import (
    moving,
    moving_detector,
    wan,
    wan_buffer,
    wan_rollout,
    wan_student,
    wan_training,
    wan_weights,
    world,
)
from fastdiff.quality import mean_interval, psnr
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.buffer import MovingBuffer, Partition

STEPS, GUIDANCE, ROLLOUT_STEPS = 25, 3.0, 4
BUFFER_STEPS = 4  # of an undistilled moving buffer to a share of the noise levels
SEED = 2_000_017  # scenes no training run draws: those count up from small seeds


def run(full: bool = False, prompts: int = 0, batch: int = 32, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many; 0 chooses.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or fastdiff.load("mini-wan")  # as it is: `load_pipeline` gives it the student it is streamed with
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
    with student(pipe, wan_weights.STUDENT) as missing:
        clips = rollouts(pipe, captions, batch)
        record.rows.append(_student_row("rollout-student", missing, clips, scenes, ROLLOUT_STEPS + 1))
    guided, taken = _collect(buffered(pipe, captions, batch, BUFFER_STEPS, wan_student.GUIDANCE))
    record.rows.append(_row("buffer-16", guided, scenes, taken, nfe=2 * BUFFER_STEPS * wan_training.SHARES))
    plain, taken = _collect(buffered(pipe, captions, batch))
    record.rows.append(_row("buffer-4", plain, scenes, taken, nfe=wan_training.SHARES))
    with student(pipe, wan_weights.BUFFER_STUDENT) as missing:
        clips = buffered(pipe, captions, batch)
        record.rows.append(_student_row("buffer-student", missing, clips, scenes, wan_training.SHARES))
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


@contextmanager
def student(pipe: Any, folder: Path) -> Iterator[str]:
    """The pipeline with a shipped LoRA meanwhile; gives what is missing, "" where nothing is."""
    if not any(folder.glob("*.safetensors")):
        yield f"not trained yet: there is no {folder.parent.name}/{folder.name}"
        return
    pipe.load_lora_weights(str(folder))
    try:
        yield ""
    finally:
        pipe.unload_lora_weights()


def _student_row(method: str, missing: str, clips: Iterator[np.ndarray], scenes: list[world.Scene], nfe: int) -> Row:
    if missing:
        return could_not_run(method, missing)
    made, taken = _collect(clips)
    return _row(method, made, scenes, taken, nfe=nfe)


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
        yield wan_rollout.as_uint8(decoded).cpu().numpy()


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


@torch.no_grad()
def buffered(
    pipe: Any, captions: list[str], batch: int, micro_steps: int = 1, guidance: float = 1.0, frames: int = 5
) -> Iterator[np.ndarray]:
    """Clips from a moving buffer of one latent frame to a chunk, led by a clean one: uint8 [B, F, H, W, 3]."""
    partition = Partition(wan_training.SHARES, 1, micro_steps, references=1)
    with CausalWan(pipe.transformer) as causal:
        for start in range(0, len(captions), batch):
            some = captions[start : start + batch]
            prompts, nothing = pipe.encode_prompt(some, "", max_sequence_length=64)
            generator = torch.Generator().manual_seed(SEED + start)
            shape = (len(some), wan.CHANNELS, frames, wan.SIZE // 8, wan.SIZE // 8)
            noise = torch.randn(shape, generator=generator).to(causal.device, causal.dtype)
            text = Text(prompts)

            def plain(x: torch.Tensor, told: torch.Tensor, text: Text = text) -> torch.Tensor:
                return causal(x, told, text)

            velocity = plain if guidance == 1.0 else wan_buffer.guided(causal, prompts, nothing[:1], guidance)
            moved = MovingBuffer(velocity, lambda number: noise[:, :, number : number + 1], partition, wan.SHIFT)  # noqa: B023
            left = [done for _ in range(frames) if (done := moved.advance()) is not None]
            yield wan_rollout.pixels(pipe.vae, torch.cat([*left, *moved.flush()], dim=2)).cpu().numpy()
