"""A server of the identity model in this process, and viewers in Python for it."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from websockets.asyncio.client import connect

from fastdiff_app.live import messages, pictures
from fastdiff_app.live.model import LiveModel
from fastdiff_app.live.server import Serving, build
from fastdiff_pipelines.settings import Settings


@dataclass
class Server:
    """A running server."""

    port: int
    live: Any
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cookie(self, **options: Any) -> str:
        """What the page's visitor is given."""
        found = httpx.get(f"http://{self.address}/metrics", **options)
        found.raise_for_status()
        return found.headers["set-cookie"].split(";")[0]

    def tasks(self) -> int:
        """How many tasks its event loop has."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(30)

    def viewer(self, **headers: str) -> Any:
        """A WebSocket as the page opens it."""
        given = {"Cookie": headers.pop("Cookie", None) or self.cookie(), **headers}
        origin = given.pop("Origin", f"http://{self.address}")
        return connect(f"ws://{self.address}/live", origin=origin, additional_headers=given, max_size=None)  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(model: LiveModel | None = None, page: bool = False, **options: Any) -> Iterator[Server]:
    """A server in a thread of its own."""
    model = model or LiveModel("identity", Settings(""), size=(32, 32))
    with model:
        app = build(model, Serving(**options), page=page)
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="critical", ws_per_message_deflate=False,
            ws_max_size=2 * pictures.MOST_BYTES, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        started = threading.Event()
        startup = server.startup

        async def announced(*words: Any, **more: Any) -> None:
            await startup(*words, **more)
            started.set()

        server.startup = announced  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert started.wait(120)
        try:
            where = server.servers[0]
            yield Server(where.sockets[0].getsockname()[1], app.live, where.get_loop())
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def live_server() -> Any:
    """The context manager `serving`."""
    return serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for a module's tests."""
    with serving(max_users=8) as found:
        yield found


@pytest.fixture
def jpeg() -> bytes:
    """A frame."""
    return pictures.encode(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


async def next_picture(socket: Any) -> tuple[int, float, int, bytes]:
    """The next picture, other messages passed over."""
    while True:
        data = await asyncio.wait_for(socket.recv(), 30)
        if isinstance(data, bytes) and not isinstance(found := messages.read_frame_out(data), int):
            return found


async def next_text(socket: Any, kind: str) -> dict[str, Any]:
    """The next JSON message of a kind, others passed over."""
    import json

    while True:
        data = await asyncio.wait_for(socket.recv(), 30)
        if isinstance(data, str) and (found := json.loads(data))["type"] == kind:
            return found


@pytest.fixture
def picture_of() -> Any:
    """The coroutine `next_picture`."""
    return next_picture


@pytest.fixture
def text_of() -> Any:
    """The coroutine `next_text`."""
    return next_text
