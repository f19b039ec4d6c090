"""Live without our WebSocket: Gradio's own streaming picture, where a proxy lets nothing else through.

It is slower, because Gradio sends a picture as text in a request of its own. What comes back goes into the page as a
data address and not as a picture of Gradio's, which would leave a file behind for every frame.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from fastdiff_app.live import pictures

if TYPE_CHECKING:
    from fastdiff_app.live.server import Live
    from fastdiff_pipelines.live import LiveSession

WAIT_S = 2.0
FORGOTTEN_S = 60.0


@dataclass
class _Viewing:
    session: LiveSession
    ready: threading.Event
    shown: str = ""
    count: int = 0
    seen: float = 0.0
    asked: dict[str, Any] = field(default_factory=dict)


class Fallback:
    """Sessions of people who look through Gradio, one a page.

    Args:
        live: whose model and places they share.
    """

    def __init__(self, live: Live):
        self.live = live
        self._viewing: dict[str, _Viewing] = {}
        self._lock = threading.Lock()

    def frame(self, who: str, image: np.ndarray, **asked: Any) -> str:
        """A camera frame uint8 ``[H, W, 3]`` in, the newest picture as an HTML image out.

        Raises:
            ValueError: impossible settings, or all places are taken.
        """
        viewing = self._of(who)
        changes = {name: value for name, value in asked.items() if viewing.asked.get(name) != value}
        if changes:
            viewing.session.change(**changes)
            viewing.asked |= changes
        viewing.ready.clear()
        viewing.session.offer(image, viewing.count)
        viewing.count += 1
        self.live.worker.wake()
        # a model slower than the camera answers with what it had, rather than hold a line that could grow
        viewing.ready.wait(WAIT_S)
        for one in viewing.session.take():
            data = base64.b64encode(one.payload).decode()
            viewing.shown = f'<img class="fd-fallback" alt="The live picture" src="data:image/jpeg;base64,{data}">'
            viewing.session.sent(one)
        return viewing.shown

    def leave(self, who: str | None) -> None:
        """The page is closed."""
        with self._lock:
            viewing = self._viewing.pop(who or "", None)
        if viewing is not None:
            self.live.worker.remove(viewing.session)
            self.live.leave()

    def _of(self, who: str) -> _Viewing:
        now = self.live.worker.clock()
        for other in [name for name, one in self._viewing.items() if now - one.seen > FORGOTTEN_S]:
            self.leave(other)
        with self._lock:
            found = self._viewing.get(who)
            if found is None:
                self.live.enter()
                ready = threading.Event()
                session = self.live.session(unpack=_fitted, acknowledged=False, on_ready=ready.set)
                found = self._viewing[who] = _Viewing(session, ready)
                self.live.worker.add(session)
            found.seen = now
            return found


def _fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    from fastdiff_app.images import fitted

    if image.size > 3 * pictures.MOST_PIXELS:
        raise ValueError(f"a frame has at most {pictures.MOST_PIXELS} pixels")
    return np.asarray(fitted(Image.fromarray(image), height, width))


def fallback(live: Live, blocks: gr.Blocks) -> None:
    """The part of the Live tab for browsers without a WebSocket."""
    held = Fallback(live)
    settings = live.model.settings
    with gr.Accordion("No picture? Stream through Gradio instead (slower)", open=False), gr.Row():
        with gr.Column(min_width=280):
            camera = gr.Image(label="Camera", sources=["webcam"], streaming=True, type="numpy", height=280)
            prompt = gr.Textbox(settings.prompt, label="Prompt", max_length=500)
            strength = gr.Slider(0.05, 1, settings.strength, step=0.01, label="Strength")
        made = gr.HTML(min_height=280)

    def stream(image: np.ndarray | None, prompt: str, strength: float, request: gr.Request) -> Any:
        if image is None or request.session_hash is None:
            return gr.skip()
        try:
            return held.frame(request.session_hash, image, prompt=prompt, strength=strength)
        except (ValueError, TypeError, RuntimeError) as error:
            raise gr.Error(str(error)) from error

    def gone(request: gr.Request) -> None:
        held.leave(request.session_hash)

    camera.stream(stream, [camera, prompt, strength], made, stream_every=1 / 30, time_limit=None,
                  concurrency_limit=live.serving.max_users, show_progress="hidden")  # fmt: skip
    blocks.unload(gone)
