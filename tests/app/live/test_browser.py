"""The real page in a real browser with a made-up camera, and what the ledger and the browser say of the same frames."""

from itertools import pairwise

import pytest

from benchmarks.chromium import browser, find
from benchmarks.slow_line import slow_line
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason="no chromium is installed (Debian: apt install chromium)"),
]
STATE = "[...document.querySelectorAll('*')].find((one) => one.fastdiff).fastdiff"
FRAMES = 150
DELAY_S = 0.075


def _start(page, address: str) -> None:
    page.go(f"http://{address}/")
    page.until("!!document.querySelector('.fd-start')", 120)
    page.run("document.querySelector('.fd-start').click()")


def test_frames_flow_from_the_camera_to_the_canvas_and_are_all_accounted_for(
    live_server, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with live_server(LiveModel("identity", Settings(""), size=(256, 256)), page=True) as server, browser() as page:
        _start(page, server.address)
        page.until(f"{STATE}.shown >= {FRAMES}", 180)
        # the page asks the camera for the session's rate, and this one has it
        assert page.run(f"{STATE}.stream.getVideoTracks()[0].getSettings().frameRate") == 30
        ids, errors = page.run(f"{STATE}.ids"), page.run(f"{STATE}.errors")
        page.until(f"{STATE}.ledger && {STATE}.ledger.frames.shown >= {FRAMES}", 30)
        ledger = server.live.worker.sessions[0].ledger.summary()
        assert errors == []
        assert page.complaints == []
        page.run("document.querySelector('.fd-stop').click()")
        page.until("document.querySelector('.fd-live').dataset.state === 'idle'", 10)
    assert all(b > a for a, b in pairwise(ids))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert {"uplink", "wait", "unpack", "pack", "send", "paint"} <= set(ledger["stages_ms"])
    # the browser's clock measured the whole, ours the parts
    assert ledger["unexplained_ms"]["p50"] <= 2


def test_a_long_line_is_filled_with_as_many_frames_as_it_holds(live_server) -> None:
    model = LiveModel("identity", Settings(""), size=(64, 64))
    with live_server(model, page=True) as server, slow_line(server.port, DELAY_S) as port, browser() as page:
        _start(page, f"127.0.0.1:{port}")
        page.until(f"{STATE}.shown >= 60", 180)
        trip = page.run(f"Math.min(...{STATE}.trips.map(([, took]) => took))")
        # one frame at a time would be lost on this line; ids of frames on their way at once say that several were
        page.until(f"{STATE}.flying.size >= 3", 60)
        assert page.run(f"{STATE}.flying.size") <= 16
        ages = page.run(f"{STATE}.ages")
        assert page.complaints == []
    assert trip >= 2000 * DELAY_S
    # what the browser says of the age includes both ways, which its own clock and the server's agree on
    assert min(ages) >= 2000 * DELAY_S
