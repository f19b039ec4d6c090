"""`make readme`, second half: the card and the contact sheet of the embedded model, from its record and its weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks import miniature
from benchmarks.readme import ATTRIBUTES, markdown
from benchmarks.record import RESULTS, Record
from fastdiff.miniature import detector, path, world
from fastdiff_app.engine import load_pipeline

COLUMNS, LINES, TILE = 6, 4, 128
GOALS = {"background": 0.97, "colour": 0.95, "position": 0.93, "shape": 0.85}

_TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# mini-sd

A Stable Diffusion small enough to ship with a library and to be right or wrong about. It draws the captions of
`fastdiff.miniature.world`: one object (shape, colour, size, position, texture) on a background, two objects in a
relation, small landscapes, at 64 pixels. It is a test object: what an acceleration costs can be read off its pictures
by a detector without weights, word by word.

![{count} captions and what was drawn from them; words the detector did not find are listed in red](samples.png)

## What is in it

{parts}

`StableDiffusionPipeline` loads the folder as it is. The denoiser predicts velocity; the pooled text reaches it through
its own cross-attention states, so a call needs no argument that Stable Diffusion's does not have.

## How well it draws

{steps} steps of DPM-Solver++ with guidance {guidance:g}. `mini-sd` is relative to `autoencoder`, the most any denoiser
behind it can reach; `…_absolute` is the plain share of pictures in which the detector found the word; intervals are
95 % bootstraps over captions.

{table}

{verdict}

## How it was trained

`python -m fastdiff.miniature.train` with `autoencoder`, then `mini-sd`, then `decoder` (which leaves the latents as
they are), on renders and captions drawn afresh for every batch; no picture was downloaded. Two things decided the
result: the pooled caption in the timestep embedding made shapes appear within twenty thousand images, and drawing most
timesteps from the noisiest quarter is what moved objects to where the caption wants them. The same command continues
from these weights.
"""


def parts(pipe: Any, folder: Path, names: tuple[str, ...]) -> str:
    """A table of a model's parts: what they are, how many parameters, how large on disk."""
    lines = ["| part | class | parameters | file |", "|--|--|--:|--:|"]
    for name in names:
        module = getattr(pipe, name)
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        count = sum(parameter.numel() for parameter in module.parameters())
        lines.append(f"| {name} | {type(module).__name__} | {count / 1e6:.2f} M | {size / 1e6:.1f} MB |")
    return "\n".join(lines)


def _verdict(record: Record) -> str:
    quality = next(row.quality for row in record.rows if row.method == "mini-sd")
    short = [
        f"{name} {quality[name].value:.3f} (goal {goal})" for name, goal in GOALS.items() if quality[name].value < goal
    ]
    if not short:
        return "Every goal is met: " + ", ".join(f"{name} at least {goal}" for name, goal in GOALS.items()) + "."
    return "Short of its goal: " + ", ".join(short) + "."


def samples(pipe: Any) -> Image.Image:
    """Pictures of captions of every kind, `COLUMNS` x `LINES`, each with its caption and the words that were missed."""
    rng = np.random.default_rng(miniature.SEED + 1)
    scenes = [world.random_scene(rng) for _ in range(COLUMNS * LINES)]
    captions = [world.caption(scene) for scene in scenes]
    noise = [torch.Generator().manual_seed(index) for index in range(len(scenes))]
    made = pipe(
        captions,
        num_inference_steps=miniature.STEPS,
        guidance_scale=miniature.GUIDANCE,
        generator=noise,
        output_type="pil",
    ).images
    found = detector.score([np.asarray(picture) for picture in made], scenes)
    font = ImageFont.load_default(11)
    gap, text = 10, 72
    sheet = Image.new("RGB", (gap + COLUMNS * (TILE + gap), gap + LINES * (TILE + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(made):
        left, top = gap + index % COLUMNS * (TILE + gap), gap + index // COLUMNS * (TILE + text)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))
        wrapped = _wrapped(captions[index], font)
        draw.multiline_text((left, top + TILE + 2), wrapped, "black", font, spacing=1)
        missed = [name for name, score in found.items() if score[index] == 0]
        draw.text((left, top + TILE + 54), ", ".join(missed), "red", font)
    return sheet


def _wrapped(text: str, font: Any) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > TILE and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def card(pipe: Any, record: Record) -> str:
    """The model card's text."""
    table = markdown(record, (*ATTRIBUTES, *(f"{name}_absolute" for name in ATTRIBUTES)))
    return _TEXT.format(
        count=COLUMNS * LINES,
        parts=parts(pipe, path(), ("vae", "text_encoder", "unet")),
        steps=miniature.STEPS,
        guidance=miniature.GUIDANCE,
        table=table,
        verdict=_verdict(record),
    )


def main() -> None:
    """Writes README.md and samples.png beside the shipped weights; without a record there is nothing to say."""
    measured = RESULTS / "miniature.json"
    if not measured.exists():
        return
    folder: Path = path()
    pipe = load_pipeline(None, "text-to-image")
    samples(pipe).save(folder / "samples.png", optimize=True)
    (folder / "README.md").write_text(card(pipe, Record.read(measured)), "utf-8")


if __name__ == "__main__":
    main()
