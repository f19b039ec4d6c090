"""`make readme`, last part: figures in the cards of shipped students, and the cards of models beside `mini-sd`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import fastdiff
from benchmarks import card, moving, switch, video
from benchmarks.readme import markdown
from benchmarks.record import RESULTS, Record
from fastdiff.miniature import moving as motion
from fastdiff.miniature import moving_detector, wan, world
from fastdiff.miniature.weights import FOLDER

STUDENTS = FOLDER / "students"
PARTS = ("vae", "text_encoder", "transformer")
PICTURES = ("nfe", "attribute", "attribute_difference", "mmd2", "diversity")
CLIPS = ("nfe", *moving_detector.ATTRIBUTES, "track_error_px", "permanence", "flicker")
SHOWN: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "mini-sd/four-step": ("fewstep", ("teacher-25", "teacher-4", "student-4"), PICTURES),
    "mini-sd/one-step": ("fewstep", ("teacher-25", "teacher-4", "student-2", "student-1"), PICTURES),
    "mini-sd/guidance": ("fewstep", ("teacher-25", "agd-25"), PICTURES),
    "mini-dit/four-step": ("fewstep", ("teacher-25-dit", "teacher-4-dit", "student-4-dit"), PICTURES),
    "mini-dit/one-step": ("fewstep", ("teacher-25-dit", "teacher-4-dit", "student-2-dit", "student-1-dit"), PICTURES),
    "mini-dit/scm": ("fewstep", ("teacher-25-dit", "teacher-4-dit", "scm-2-dit", "scm-1-dit"), PICTURES),
    "mini-dit/guidance": ("fewstep", ("teacher-25-dit", "agd-25-dit"), PICTURES),
    "mini-wan/rollout": ("moving", ("mini-wan", "rollout", "rollout-student"), CLIPS),
    "mini-wan/buffer": ("moving", ("buffer-16", "buffer-4", "buffer-student"), CLIPS),
}
"""Of each student's folder: the record that measured it, its rows there and those beside them, and their figures."""

_HEADING = "\n## How well it does\n"
_LORA = {
    "rollout": """learned from its own rollouts (Self-Forcing, https://arxiv.org/abs/2506.08009): a latent frame in four
calls without guidance, after none to four frames before it. Trained by `python -m fastdiff.miniature.train
mini-wan-student`; `fastdiff stream --model mini-wan` and `ChunkRollout` are what it is for.""",
    "buffer": """distilled share by share for StreamDiT's moving buffer (https://arxiv.org/abs/2507.03745): one call
moves four frames under way across their shares of the noise levels, without guidance. Trained by `python -m
fastdiff.miniature.train mini-wan-buffer`; `fastdiff_pipelines.rollout.buffered` is what it is for.""",
}
_HEAD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n"
_VIDEO = (
    _HEAD.replace("diffusers\n---", "diffusers\npipeline_tag: text-to-video\n---")
    + """# mini-wan

A Wan small enough to ship with a library and to be right or wrong about. It draws moving scenes of
`fastdiff.miniature.world`: one object (shape, colour) that crosses a plain background at a pace and in a direction that
the caption says, around the edges and back, at 32 pixels. A detector without weights reads its clips back word by word.

![every fourth frame of clips, with their captions](samples.png)

## What is in it

{parts}

`WanPipeline` loads the folder as it is. The transformer is block-causal too: told one noise level a frame, it makes a
frame from those before it, which is what `fastdiff_pipelines.rollout.ChunkRollout` streams.

## How well it does

`renders` are the scenes themselves, `autoencoder` is the most any transformer behind it can reach, `shuffled` what
knowing nothing would give. Intervals are 95 % bootstraps over captions.

{table}

## How it was trained

`python -m fastdiff.miniature.train` with `wan-autoencoder`, `wan-long` (the same on long clips and cuts) and `mini-wan`
(the first 140,000 images on the latents of the first, 65,000 more on those of the second), on renders and captions
drawn afresh for every batch; no clip was downloaded.
"""
)


_FLOW = (
    _HEAD.replace("diffusers\n---", "diffusers\npipeline_tag: text-to-image\n---")
    + """# mini-dit

A Stable Diffusion 3 small enough to ship with a library: joint transformer blocks and a flow, over the latents and the
words of `mini-sd`, so that everything here is shown on a transformer too. What it draws, and how its pictures are read
back, is what `mini-sd`'s card says.

![captions and what was drawn from them; words the detector did not find are listed in red](samples.png)

## What is in it

{parts}

`StableDiffusion3Pipeline` loads the folder as it is.

## How well it does

Rows ending in `-dit` are this model; `teacher-25` is `mini-sd` beside it. Intervals are 95 % bootstraps over captions.

{table}

## How it was trained

`python -m fastdiff.miniature.train mini-dit`: it learns the velocity that `mini-sd` sees, on renders and captions drawn
afresh for every batch; no picture was downloaded.
"""
)


def with_figures(text: str, record: Record, methods: tuple[str, ...], columns: tuple[str, ...]) -> str:
    """A card's text with the measured rows at its end, in place of those that stood there."""
    chosen = replace(record, rows=[row for row in record.rows if row.method in methods])
    kept = re.split(re.escape(_HEADING), text)[0].rstrip()
    return f"{kept}\n{_HEADING}\n{markdown(chosen, columns)}\n"


def students(folder: Path = STUDENTS, results: Path = RESULTS) -> None:
    """Writes the figures into the card of every shipped student that has been measured."""
    for name, (bench, methods, columns) in SHOWN.items():
        text, measured = folder / name / "README.md", results / f"{bench}.json"
        if not text.parent.exists() or not measured.exists():
            continue
        if not text.exists():
            model, kind = name.split("/")
            text.write_text(f"{_HEAD}# {model}: {kind}\n\nA LoRA {_LORA[kind]}\n", "utf-8")
        text.write_text(with_figures(text.read_text("utf-8"), Record.read(measured), methods, columns), "utf-8")


def clips(pipe: Any, count: int = 8) -> Image.Image:
    """A sheet: a clip a line, every fourth frame, and its caption."""
    rng = np.random.default_rng(moving.SEED + 2)
    captions = [world.caption(motion.scene(rng)) for _ in range(count)]
    with torch.no_grad():
        made = next(moving.whole_clips(pipe, captions, count))[:, ::4]
    side, gap, words = 3 * wan.SIZE, 6, 330
    frames = made.shape[1]
    sheet = Image.new("RGB", (frames * (side + gap) + words, count * (side + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for line, (caption, clip) in enumerate(zip(captions, made, strict=True)):
        top = gap + line * (side + gap)
        for place, frame in enumerate(clip):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + place * (side + gap), top))
        middle = caption.find(" ", len(caption) // 2)
        broken = f"{caption[:middle]}\n{caption[middle + 1 :]}" if middle > 0 else caption
        draw.multiline_text((2 * gap + frames * (side + gap), top + side // 3), broken, "black", font)
    return sheet


def main() -> None:
    """Writes what there are figures for."""
    students()
    if (record := _measured("mini-dit", "fewstep")) is not None:
        pipe = _plain("mini-dit")
        chosen = [row for row in record.rows if row.method.endswith("-dit") or row.method == "teacher-25"]
        table = markdown(replace(record, rows=chosen), PICTURES)
        _write(
            "mini-dit",
            card.samples(pipe),
            _FLOW.format(parts=card.parts(pipe, FOLDER / "mini-dit", PARTS), table=table),
        )
    if (record := _measured("mini-wan", "moving")) is not None:
        pipe = _plain("mini-wan")
        text = _VIDEO.format(parts=card.parts(pipe, FOLDER / "mini-wan", PARTS), table=markdown(record, CLIPS))
        _write("mini-wan", clips(pipe), text)
        streamed, missing = video.embedded()
        if not missing:
            switch.sheet(streamed).save(RESULTS / "switch.png", optimize=True)


def _measured(model: str, bench: str) -> Record | None:
    """The record of a model that ships and has been measured."""
    shipped, record = (FOLDER / model / "model_index.json").exists(), RESULTS / f"{bench}.json"
    return Record.read(record) if shipped and record.exists() else None


def _plain(model: str) -> Any:
    """A model as it ships, without what the app adds to it."""
    pipe = fastdiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write(model: str, sheet: Image.Image, text: str) -> None:
    sheet.save(FOLDER / model / "samples.png", optimize=True)
    (FOLDER / model / "README.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
