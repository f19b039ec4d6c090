"""Pictures of the page for README: every tab in a real browser, doing its work with the embedded model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.chromium import Page, browser
from benchmarks.live import STATE, serving
from benchmarks.record import RESULTS
from fastdiff_app.live.demo import PROMPT, STEPS, STRENGTH
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.settings import Settings

LIVE_S = 14
SIDE, FRAMES = 512, 180


def main() -> None:
    """Writes page-*.jpg beside the results."""
    with tempfile.TemporaryDirectory() as folder:
        camera = Path(folder) / "camera.y4m"
        write_camera(camera)
        settings = Settings(PROMPT, steps=STEPS, strength=STRENGTH)
        with serving(LiveModel(None, settings), page=True) as (address, _, _), browser(camera) as page:
            page.go(f"http://{address}/")
            page.until("!!document.querySelector('.fd-start')", 60)
            _live(page)
            _tab(page, "Generate", "steps in", "Generate")
            _tab(page, "Compare", "times as fast", "Compare")
            _tab(page, "Batch", " made, ", "Make them all")
            _tab(page, "About", "PromptCache")
            if page.complaints:
                raise RuntimeError(f"the console complained: {page.complaints[:2]}")


def _live(page: Page) -> None:
    page.run("document.querySelector('.fd-start').click()")
    page.until(f"{STATE}.shown > 30", 60)
    # a prompt that is typed, so that prompt to pixel is known
    page.run(f"""(() => {{
        const box = document.querySelector(".fd-prompt");
        box.value = {PROMPT!r};
        box.dispatchEvent(new Event("input", {{ bubbles: true }}));
    }})()""")
    _wait(page, LIVE_S)
    page.picture(RESULTS / "page-live.jpg")
    page.resize(390, 844)
    _wait(page, 2)
    page.picture(RESULTS / "page-narrow.jpg")
    page.resize(1280, 900)
    page.run("document.querySelector('.fd-stop').click()")
    _wait(page, 1)


def _tab(page: Page, name: str, ready: str, button: str | None = None) -> None:
    page.run(f"[...document.querySelectorAll('[role=tab]')].find((one) => one.textContent.includes({name!r})).click()")
    if button is not None:
        found = f"find((one) => one.offsetParent && one.textContent.trim() === {button!r})"
        page.until(f"!![...document.querySelectorAll('button.primary')].{found}", 30)
        page.run(f"[...document.querySelectorAll('button.primary')].{found}.click()")
    page.until(f"document.body.innerText.includes({ready!r})", 180)
    _wait(page, 2)
    page.picture(RESULTS / f"page-{name.lower()}.jpg")


def _wait(page: Page, seconds: float) -> None:
    page.run(f"new Promise((done) => setTimeout(done, {1000 * seconds}))")


def write_camera(path: Path) -> None:
    """A round trip of a red disc over blue, as chromium reads cameras from files (YUV4MPEG2)."""
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{SIDE} H{SIDE} F30:1 Ip A1:1 C420jpeg\n".encode())
        for number in range(FRAMES):
            turn = 2 * np.pi * number / FRAMES
            rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
            away = np.hypot(columns - 0.5 - 0.24 * np.sin(turn), rows - 0.5 - 0.15 * np.sin(2 * turn))
            inside = np.clip((0.23 - away) * SIDE + 0.5, 0, 1)[..., None]
            frame = inside * np.array([216, 48, 42]) + (1 - inside) * np.array([36, 86, 216])
            planes = Image.fromarray(frame.astype(np.uint8)).convert("YCbCr").split()
            halves = [one.resize((SIDE // 2, SIDE // 2)) for one in planes[1:]]
            file.write(b"FRAME\n" + b"".join(one.tobytes() for one in (planes[0], *halves)))


if __name__ == "__main__":
    main()
