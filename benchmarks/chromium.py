"""A browser to hold the page against: chromium without a window, with a made-up camera, driven by its own protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The browser's path, None where none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: runs JavaScript in it, takes pictures of it, and keeps what its console complained about."""

    def __init__(self, address: str):
        from websockets.sync.client import connect

        self._connection = connect(address, max_size=None, open_timeout=30)
        self._socket = self._connection.__enter__()
        self._number = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": values}))
        while True:
            found = json.loads(self._socket.recv(timeout=60))
            self._note(found)
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def _note(self, message: dict[str, Any]) -> None:
        values = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(values["exceptionDetails"].get("exception", values))[:400])
        elif message.get("method") == "Runtime.consoleAPICalled" and values.get("type") in ("error", "assert"):
            self.complaints.append(json.dumps([one.get("value") for one in values["args"]])[:400])
        elif message.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.complaints.append(f"{values['entry']['text']} {values['entry'].get('url', '')}"[:400])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, promises awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:400])
        return found["result"].get("value")

    def until(self, script: str, seconds: float) -> Any:
        """The first true value of an expression, or TimeoutError."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} was not true within {seconds:g} s; {self.complaints}")
            self.run("new Promise((done) => setTimeout(done, 100))")
        return found

    def go(self, address: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=address)

    def resize(self, width: int, height: int) -> None:
        """The size of the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        """A screenshot as JPEG."""
        data = self.call("Page.captureScreenshot", format="jpeg", quality=88)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Let go of the tab."""
        self._connection.__exit__(None, None, None)


@contextmanager
def browser(camera: Path | None = None, width: int = 1280, height: int = 900, fps: int = 30) -> Iterator[Page]:
    """A page of a fresh browser.

    Args:
        camera: a .y4m or .mjpeg file to serve as the camera; chromium's own test picture where None.
        fps: the most that chromium's own camera offers; a file has its own rate.

    Raises:
        FileNotFoundError: no browser is installed.
    """
    program = find()
    if program is None:
        raise FileNotFoundError("no chromium is installed (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory(prefix="fastdiff-", ignore_cleanup_errors=True) as folder:
        words = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
            f"--user-data-dir={folder}", f"--use-fake-device-for-media-stream=fps={fps}",
            "--use-fake-ui-for-media-stream", "--no-first-run", "--hide-scrollbars", "--disable-extensions",
            "--disable-background-networking", "--mute-audio",
            "--disable-background-timer-throttling", "--disable-renderer-backgrounding",
            f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        if camera is not None:
            words.insert(-1, f"--use-file-for-fake-video-capture={camera}")
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page = Page(_tab(Path(folder) / "DevToolsActivePort", process))
            page.resize(width, height)
            try:
                yield page
            finally:
                page.close()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tab(announced: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the first tab, once the browser has said where it listens."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if announced.exists() and (lines := announced.read_text().splitlines()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=30) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise RuntimeError("the browser did not start")
