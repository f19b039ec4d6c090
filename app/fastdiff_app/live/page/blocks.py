"""The tabs, put together."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from fastdiff_app.failures import Failure, one_line
from fastdiff_app.live.model import IDENTITY
from fastdiff_app.live.page.fallback import fallback
from fastdiff_app.live.page.look import CSS, THEME
from fastdiff_app.live.page.models import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fastdiff_app.live.server import Live

HERE = Path(__file__).parent
PROMPT = "a big yellow square on a plain black background"
MOST_JOB_LINES = 200


def mount(app: FastAPI, live: Live) -> FastAPI:
    """Put the page under `/` of an app that has the other routes already."""
    with gr.Blocks(title="fastdiff", fill_width=True, delete_cache=(3600, 3600), analytics_enabled=False) as blocks:
        _head(live)
        name = None if live.model.name == IDENTITY else live.model.name
        studio = Studio(name, live.model.plan)
        with gr.Tabs():
            with gr.Tab("Live", id="live"):
                _live(live, blocks)
            with gr.Tab("Generate", id="generate"):
                _generate(studio)
            with gr.Tab("Compare", id="compare"):
                _compare(studio)
            with gr.Tab("Batch", id="batch"):
                _batch(name)
            with gr.Tab("About this machine", id="about") as about:
                _about(live, about)
    return gr.mount_gradio_app(
        app, blocks, path="/", server_name=live.serving.host, server_port=live.serving.port, theme=THEME, css=CSS,
        footer_links=[], show_error=True, max_file_size="16mb", enable_monitoring=False,
    )  # fmt: skip


def _head(live: Live) -> None:
    title = html.escape(live.model.title)
    gr.HTML(f'<div class="fd-head"><h1>fastdiff</h1><span>{title}</span></div>', padding=False)


def _live(live: Live, blocks: gr.Blocks) -> None:
    # what the page shows before anybody connects
    hello = html.escape(json.dumps(live.hello()), quote=True)
    gr.HTML(
        html_template=(HERE / "live.html").read_text("utf-8").replace("HELLO", hello),
        css_template=(HERE / "live.css").read_text("utf-8"),
        js_on_load=(HERE / "live.js").read_text("utf-8"),
        elem_id="fd-live",
        apply_default_css=False,
    )
    fallback(live, blocks)


def _asked(prompt: str, negative: str, seed: float, steps: float, guidance: float) -> dict[str, Any]:
    if not prompt.strip():
        raise gr.Error("The prompt is empty.")
    asked = {"prompt": prompt, "seed": int(seed), "num_inference_steps": int(steps), "guidance_scale": guidance}
    return asked | ({"negative_prompt": negative} if negative else {})


def _generate(studio: Studio) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2)
            negative = gr.Textbox(label="Not this")
            with gr.Row():
                steps = gr.Slider(1, 100, 25, step=1, label="Steps")
                guidance = gr.Slider(1, 15, 5, step=0.5, label="Guidance")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            with gr.Accordion("Start from a picture", open=False):
                image = gr.Image(label="Picture", type="numpy", sources=["upload", "clipboard"], height=200)
                strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="How much may change")
            go = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=300):
            made = gr.Image(label="Picture", format="png", height=520, buttons=["download", "fullscreen"])
            note = gr.Markdown("Every step is shown as it is made.", elem_classes="fd-note")

    def run(prompt: str, negative: str, steps: float, guidance: float, seed: float, image: Any, strength: float,
            bar: gr.Progress = gr.Progress()) -> Iterator[tuple[Any, str]]:  # fmt: skip # noqa: B008
        asked = _asked(prompt, negative, seed, steps, guidance)
        total = int(steps) if image is None else max(1, int(steps * strength))
        try:
            for step, picture, seconds in studio.steps(image=image, strength=strength, **asked):
                done = step == -1
                bar(1.0 if done else step / total, desc=f"step {total if done else step} of {total}")
                said = f"{total} steps in {seconds:.2f} s" if done else f"step {step} of {total}"
                yield gr.skip() if picture is None else _enlarged(picture), said
        except Failure as failure:
            raise gr.Error(str(failure)) from failure

    inputs = [prompt, negative, steps, guidance, seed, image, strength]
    gr.on([go.click, prompt.submit], run, inputs, [made, note], concurrency_limit=1, show_progress="minimal")


def _enlarged(picture: np.ndarray, smallest: int = 512) -> np.ndarray:
    """Small pictures by whole multiples, so that a browser does not blur them."""
    times = max(1, smallest // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _compare(studio: Studio) -> None:
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(PROMPT, label="Prompt", scale=4)
        steps = gr.Slider(1, 100, 25, step=1, label="Steps", scale=2)
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", scale=1, min_width=90)
        go = gr.Button("Compare", variant="primary", scale=1, min_width=110, elem_classes="fd-go")
    with gr.Row():
        slow = gr.Image(label="diffusers", format="png", buttons=["download"])
        fast = gr.Image(label="fastdiff", format="png", buttons=["download"])
        apart = gr.Image(label="difference, ten times as strong", format="png", buttons=[])
    note = gr.Markdown("The same prompt and seed through both; each runs once before it is timed.",
                       elem_classes="fd-note")  # fmt: skip

    def run(prompt: str, steps: float, seed: float) -> tuple[Any, Any, Any, str]:
        import torch

        from fastdiff.quality import psnr

        asked = _asked(prompt, "", seed, steps, 5.0)
        found = []
        try:
            for is_fast in (False, True):
                studio.finished(is_fast, **{**asked, "num_inference_steps": 2})
                found.append(studio.finished(is_fast, **asked))
        except Failure as failure:
            raise gr.Error(str(failure)) from failure
        (plain, plain_s), (ours, ours_s) = found
        gap = np.abs(plain.astype(int) - ours)
        first, second = (torch.from_numpy(one).permute(2, 0, 1)[None].double() / 255 for one in (plain, ours))
        value = float(torch.as_tensor(psnr(first, second)).mean())
        fidelity = "pixel for pixel the same" if not gap.any() else f"PSNR {value:.1f} dB"
        faster = f"**{plain_s / ours_s:.2f} times as fast**"
        said = f"diffusers {plain_s:.2f} s · fastdiff {ours_s:.2f} s · {faster} · {fidelity}"
        return _enlarged(plain), _enlarged(ours), _enlarged(np.clip(10 * gap, 0, 255).astype(np.uint8)), said

    gr.on([go.click, prompt.submit], run, [prompt, steps, seed], [slow, fast, apart, note], concurrency_limit=1)


def _batch(name: str | None) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            lines = gr.Textbox("a red circle on a blue background\na small yellow square on a black background",
                               label="A prompt a line", lines=6)  # fmt: skip
            file = gr.File(label="Or a file of jobs (.txt, .csv, .jsonl)", file_types=[".txt", ".csv", ".jsonl"],
                           height=180)  # fmt: skip
            with gr.Row():
                steps = gr.Slider(1, 100, 25, step=1, label="Steps")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            go = gr.Button("Make them all", variant="primary")
            note = gr.Markdown(f"At most {MOST_JOB_LINES} at a time here; `fastdiff batch` takes millions.",
                               elem_classes="fd-note")  # fmt: skip
            bundle = gr.File(label="Download", interactive=False, visible=False)
        with gr.Column(scale=3, min_width=300):
            gallery = gr.Gallery(label="Pictures", columns=4, height=540, object_fit="contain", format="png")

    def run(lines: str, file: str | None, steps: float, seed: float,
            bar: gr.Progress = gr.Progress()) -> Iterator[tuple[Any, str, Any]]:  # fmt: skip # noqa: B008
        yield from _batched(name, lines, file, int(steps), int(seed), bar)

    go.click(run, [lines, file, steps, seed], [gallery, note, bundle], concurrency_limit=1, show_progress="minimal")


def _batched(
    name: str | None, lines: str, file: str | None, steps: int, seed: int, bar: Any
) -> Iterator[tuple[Any, str, Any]]:
    # Gradio copies what it shows, so nothing need stay here when the last picture has been handed over
    with tempfile.TemporaryDirectory(prefix="fastdiff-batch-", ignore_cleanup_errors=True) as folder:
        yield from _batched_in(Path(folder), name, lines, file, steps, seed, bar)


def _batched_in(
    folder: Path, name: str | None, lines: str, file: str | None, steps: int, seed: int, bar: Any
) -> Iterator[tuple[Any, str, Any]]:
    from fastdiff_pipelines.batch import BatchJob, Item, JobError, read_jobs

    jobs_file = Path(file) if file else folder / "jobs.txt"
    if not file:
        jobs_file.write_text(lines, "utf-8")
    try:
        jobs = read_jobs(jobs_file, Item("-", "", None, None, None, steps, 5.0, None))
        if not jobs.items:
            raise gr.Error("No line asks for something possible. " + " ".join(map(str, jobs.problems[:2])))
        if len(jobs.items) > MOST_JOB_LINES:
            raise gr.Error(f"{len(jobs.items)} jobs are more than {MOST_JOB_LINES}; use fastdiff batch for these.")
        job = BatchJob(jobs.items, folder / "out", model=name, seed=seed, workers=1)
        state: dict[str, Any] = {}

        def work() -> None:
            try:
                state["summary"] = job.run(lambda now: state.update(now=now))
            except (JobError, ValueError, RuntimeError, OSError) as error:
                state["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            now = state.get("now")
            if now is not None:
                done = now.done + now.skipped + now.failed
                bar(done / max(1, now.total), desc=f"{done} of {now.total}")
                yield _made(folder), f"{done} of {now.total}", gr.skip()
    except (JobError, ValueError) as error:
        raise gr.Error(one_line(error)) from error
    if "error" in state:
        raise gr.Error(one_line(state["error"]))
    summary, found = state["summary"], _made(folder)
    archive = folder / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in found:
            bundle.write(path, Path(path).name)
    said = f"{summary.done} made, {len(summary.failed) + len(jobs.problems)} failed in {summary.seconds:.1f} s"
    yield found, said, gr.update(value=str(archive), visible=True)


def _made(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "out").rglob("*.png") if not path.name.startswith("."))


def _about(live: Live, tab: gr.Tab) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            gr.Markdown("### What is here")
            text = gr.Code(label="fastdiff doctor", language=None, interactive=False, lines=18, wrap_lines=True)
        with gr.Column(min_width=300):
            gr.Markdown("### What is engaged on the live model")
            gr.Code(live.model.report or "the identity model has nothing to accelerate", label="report", language=None,
                    interactive=False, wrap_lines=True)  # fmt: skip
            gr.Markdown("`/health` and `/metrics` say for machines what the Live tab says for people.",
                        elem_classes="fd-note")  # fmt: skip

    def look() -> str:
        from rich.console import Console

        from fastdiff_app import doctor

        file = io.StringIO()
        with contextlib.suppress(Failure):
            doctor.doctor(None if live.model.name == IDENTITY else live.model.name,
                          Console(file=file, highlight=False, soft_wrap=True, width=120))  # fmt: skip
        # reasons stand far to the right in a terminal, and would be alone on a line here
        return re.sub(r"(?<=\S) {16,}", "   ", file.getvalue())

    tab.select(look, None, text, concurrency_limit=1)
