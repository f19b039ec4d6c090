"""What the page does with the embedded model, in a real browser: prompts change pictures, every tab does its work."""

import base64
import io
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.chromium import browser, find
from fastdiff.miniature import wan
from fastdiff.miniature.detector import detect
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no chromium is installed (Debian: apt install chromium)"),
]
STATE = "[...document.querySelectorAll('*')].find((one) => one.fastdiff).fastdiff"
WIDE_TABS = ("Generate", "Compare", "Batch", "About this machine", "Live")


def _seen(page: Any) -> dict[str, str]:
    data = page.run("document.querySelector('.fd-picture').toDataURL('image/png')").partition(",")[2]
    return detect(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")))


def _becomes(page: Any, **wanted: str) -> None:
    """Looks at every new picture until one is as wanted; hundreds that are not mean that none will be."""
    seen: dict[str, str] = {}
    first = page.run(f"{STATE}.shown")
    while (shown := page.run(f"{STATE}.shown")) < first + 400:
        seen = _seen(page)
        if all(seen.get(name) == value for name, value in wanted.items()):
            return
        page.until(f"{STATE}.shown > {shown}", 60)
    raise AssertionError(f"wanted {wanted}, the last of 400 pictures shows {seen}")


def _moved(page: Any, selector: str, value: str) -> None:
    page.run(f"""(() => {{
        const box = document.querySelector({selector!r});
        box.value = {value!r};
        box.dispatchEvent(new Event("input", {{ bubbles: true }}));
    }})()""")


def test_the_picture_becomes_what_the_prompt_says_and_something_else_with_the_next(live_server) -> None:
    model = LiveModel(None, Settings("a big green circle on a plain white background", steps=2, strength=0.75))
    with live_server(model, page=True) as server, browser() as page:
        page.go(f"http://{server.address}/")
        page.until("!!document.querySelector('.fd-clip')", 120)
        page.run("document.querySelector('.fd-clip').click()")
        page.until(f"{STATE}.shown > 3", 120)
        _becomes(page, colour="green", shape="circle", background="white")
        _moved(page, ".fd-prompt", "a big yellow square on a plain blue background")
        _becomes(page, colour="yellow", shape="square", background="blue")
        page.until(f"{STATE}.ledger.prompt_to_pixel_frames !== null", 60)
        ids = page.run(f"{STATE}.ids")
        assert page.complaints == []
    assert all(b > a for a, b in pairwise(ids))


def test_the_page_of_a_video_model_changes_the_prompt_and_offers_no_fade(live_server, tmp_path) -> None:
    wan.untrained().save_pretrained(tmp_path / "model")
    model = LiveModel(str(tmp_path / "model"), Settings("a red circle", steps=1), plan="none", size=(32, 32))
    with live_server(model, page=True) as server, browser() as page:
        page.go(f"http://{server.address}/")
        page.until("!!document.querySelector('.fd-clip')", 120)
        assert page.run("document.querySelector('[data-name=seconds]').offsetParent === null")
        assert page.run("document.querySelector('.fd-check').offsetParent === null")
        page.run("document.querySelector('.fd-clip').click()")
        page.until(f"{STATE}.shown > 3", 120)
        (session,) = server.live.worker.sessions
        stream = session._stream
        _moved(page, ".fd-prompt", "a blue square")
        _moved(page, "[data-name=guidance_scale] input", "3")
        for _ in range(200):
            if (stream.settings.prompt, stream.settings.guidance) == ("a blue square", "full"):
                break
            shown = page.run(f"{STATE}.shown")
            page.until(f"{STATE}.shown > {shown}", 60)
        assert (stream.settings.prompt, stream.settings.guidance) == ("a blue square", "full")
        assert page.run(f"{STATE}.errors") == []
        assert page.complaints == []


def _open(page: Any, name: str) -> None:
    tab = f"[...document.querySelectorAll('[role=tab]')].find((one) => one.textContent.includes({name!r}))"
    page.until(f"!!{tab}", 30)
    page.run(f"{tab}.click()")


def _press(page: Any, tab: str, button: str, ready: str) -> None:
    _open(page, tab)
    seen = "[...document.querySelectorAll('button.primary')].find((one) => one.offsetParent && "
    page.until(f"!!{seen}one.textContent.trim() === {button!r})", 60)
    page.run(f"{seen}one.textContent.trim() === {button!r}).click()")
    page.until(f"document.body.innerText.includes({ready!r})", 180)


def test_generate_compare_batch_and_about_do_their_work(live_server, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with live_server(LiveModel(None, Settings("a red circle")), page=True) as server, browser() as page:
        page.go(f"http://{server.address}/")
        page.until("!!document.querySelector('.fd-start')", 120)
        _press(page, "Generate", "Generate", "steps in")
        _press(page, "Compare", "Compare", "times as fast")
        assert page.run("/PSNR|pixel for pixel/.test(document.body.innerText)")
        _press(page, "Batch", "Make them all", "2 made, 0 failed")
        page.until(
            "[...document.querySelectorAll('img')].filter((one) => one.offsetParent && one.naturalWidth).length >= 2",
            30,
        )
        page.run(
            "[...document.querySelectorAll('[role=tab]')].find((one) => one.textContent.includes('About')).click()"
        )
        page.until("document.body.innerText.includes('PromptCache')", 60)
        assert page.complaints == []


def test_every_tab_fits_a_narrow_screen_and_the_keyboard_reaches_the_start(live_server) -> None:
    with live_server(LiveModel("identity", Settings(""), size=(64, 64)), page=True) as server, browser() as page:
        page.go(f"http://{server.address}/")
        page.until("!!document.querySelector('.fd-start')", 120)
        for name in WIDE_TABS:
            page.resize(1280, 900)
            _open(page, name)
            page.resize(390, 844)
            page.until("document.documentElement.clientWidth <= 390", 30)
            assert page.run("document.documentElement.scrollWidth") <= 390, name
        reached = json.loads(
            page.run("""(() => {
            const named = [...document.querySelectorAll('.fd-live button, .fd-live input, .fd-live textarea')];
            return JSON.stringify(named.filter((one) => !one.disabled && one.offsetParent).map((one) => one.tabIndex));
        })()""")
        )
        assert len(reached) > 5
        assert min(reached) >= 0
        page.run("document.querySelector('.fd-clip').focus()")
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        page.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        page.call("Input.dispatchKeyEvent", type="keyUp", **key)
        page.until(f"{STATE}.shown > 5", 60)
        assert page.complaints == []
