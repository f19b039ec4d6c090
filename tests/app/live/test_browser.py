"""The real page in a real browser with a made-up camera, and what the ledger and the browser say of the same frames."""

from itertools import pairwise

import pytest

from benchmarks.chromium import browser, find
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no chromium is installed (Debian: apt install chromium)"),
]
STATE = "[...document.querySelectorAll('*')].find((one) => one.fastdiff).fastdiff"
FRAMES = 150


def _start(page, server) -> None:
    page.go(f"http://{server.address}/")
    page.until("!!document.querySelector('.fd-start')", 120)
    page.run("document.querySelector('.fd-start').click()")


def test_frames_flow_from_the_camera_to_the_canvas_and_are_all_accounted_for(live_server) -> None:
    with live_server(LiveModel("identity", Settings(""), size=(256, 256)), page=True) as server, browser() as page:
        _start(page, server)
        page.until(f"{STATE}.shown >= {FRAMES}", 180)
        ids, errors = page.run(f"{STATE}.ids"), page.run(f"{STATE}.errors")
        page.until(f"{STATE}.ledger && {STATE}.ledger.frames.shown >= {FRAMES}", 30)
        ledger = server.live.worker.sessions[0].ledger.summary()
        assert errors == []
        assert page.complaints == []
        page.run("document.querySelector('.fd-stop').click()")
        page.until("document.querySelector('.fd-live').dataset.state === 'idle'", 10)
    assert all(b > a for a, b in pairwise(ids))
    assert {"uplink", "wait", "unpack", "pack", "send", "paint"} <= set(ledger["stages_ms"])
    # the browser's clock measured the whole, ours the parts
    assert ledger["unexplained_ms"]["p50"] <= 2


def test_every_tab_opens_without_a_complaint_also_on_a_narrow_screen(live_server) -> None:
    with live_server(LiveModel("identity", Settings(""), size=(64, 64)), page=True) as server, browser() as page:
        page.resize(390, 800)
        page.go(f"http://{server.address}/")
        page.until("!!document.querySelector('.fd-start')", 120)
        for name in ("Generate", "Compare", "Batch", "About this machine", "Live"):
            tabs = "[...document.querySelectorAll('[role=tab]')]"
            page.run(f"{tabs}.find((one) => one.textContent.includes('{name}'))?.click()")
            assert page.run("document.documentElement.scrollWidth") <= 392
        assert page.complaints == []
