"""One viewer's WebSocket: frames in, pictures out, controls, and a clear word when something is wrong.

The model never runs here: reading, sending and a report twice a second are three tasks of the event loop, which end
together. Nothing waits in a queue that could grow: the session's mailbox holds one frame and its outbox two pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from fastdiff_app.live import messages, pictures
from fastdiff_app.live.messages import CONDITIONS, ConditionIn, FrameIn, Painted, Wrong
from fastdiff_pipelines.conditions import Picture
from fastdiff_pipelines.live import LiveSession, LiveWorker

REPORT_S = 0.5
SEND_TIMEOUT_S = 15.0
SILENCE_S = 60.0
MOST_WRONG = 20
CONTROLS = ("prompt", "prompts", "negative_prompt", "strength", "steps", "guidance", "guidance_scale", "delta", "seed",
            "seeds", "noise", "blend", "on_update", "control", "image_prompt")  # fmt: skip
POLICY, BUSY = 1008, 1013
# a viewer who leaves, in the ways that servers tell of it
GONE = (WebSocketDisconnect, TimeoutError, OSError)

log = logging.getLogger(__name__)


@dataclass
class Rate:
    """A bucket of tokens: so many a second, and a few at once."""

    per_second: float
    most: float
    left: float = 0.0
    at: float = 0.0

    def __post_init__(self):
        self.left = self.most

    def take(self, now: float) -> bool:
        """Whether one more is allowed."""
        self.left = min(self.most, self.left + (now - self.at) * self.per_second)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Viewer:
    """One connection.

    Args:
        open_session: makes a session, given what to call when there are pictures and when something is wrong.
        record: starts (True) or ends the session's recording and gives the file's name.
        size: (height, width) of the model's pictures.
    """

    def __init__(
        self,
        socket: WebSocket,
        worker: LiveWorker,
        open_session: Callable[..., LiveSession],
        record: Callable[[LiveSession, bool], str | None],
        size: tuple[int, int],
    ):
        self.socket, self.worker, self.record, self.size = socket, worker, record, size
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.session = open_session(on_ready=self._on_ready, on_problem=self._on_problem)
        self._last_id = -1
        self._held = 0
        self._wrong = 0
        self._frames = Rate(130, 60, at=worker.clock())
        self._texts = Rate(60, 60, at=worker.clock())
        self._sending = asyncio.Lock()
        self._problems: set[asyncio.Task[None]] = set()
        self._conditions: dict[str, Picture] = {}

    async def serve(self) -> None:
        """Until the viewer leaves, says nothing for a minute, or breaks the rules too often."""
        self.worker.add(self.session)
        tasks = [asyncio.create_task(work()) for work in (self._read, self._write, self._report)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.worker.remove(self.session)
            for task in (*tasks, *self._problems):
                task.cancel()
            found = await asyncio.gather(*tasks, *self._problems, return_exceptions=True)
            for error in found:
                if isinstance(error, Exception) and not isinstance(error, GONE):
                    log.error("a viewer's connection failed", exc_info=error)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
                await self.socket.close(1000)

    async def _read(self) -> None:
        while not self.session.closed:
            try:
                message = await asyncio.wait_for(self.socket.receive(), SILENCE_S)
            except TimeoutError:
                await self.socket.close(1000, f"nothing was said for {SILENCE_S:g} s")
                return
            if message["type"] != "websocket.receive":
                return
            try:
                if message.get("bytes") is not None:
                    await self._binary(message["bytes"])
                else:
                    await self._text(message.get("text") or "")
            except (Wrong, TypeError, ValueError) as error:
                self._wrong += 1
                await self._say(type="error", message=str(error)[:400])
                if self._wrong >= MOST_WRONG:
                    await self.socket.close(POLICY, "too many wrong messages")
                    return

    async def _binary(self, data: bytes) -> None:
        message = messages.read(data)
        if isinstance(message, Painted):
            self._note_held(message)
            self.session.painted(message.frame_id, message.age_ms)
            return
        now = self.worker.clock()
        if isinstance(message, ConditionIn):
            await self._condition(message, now)
            return
        if not self._frames.take(now):
            self.session.ledger.admit()
            self.session.ledger.drop("rate")
            raise Wrong("more than 120 frames a second")
        await self._frame(message, now)

    async def _frame(self, message: FrameIn, now: float) -> None:
        if message.frame_id <= self._last_id:
            raise Wrong(f"ids must rise: {message.frame_id} came after {self._last_id}")
        if len(message.picture) > pictures.MOST_BYTES:
            raise Wrong(f"a frame has at most {pictures.MOST_BYTES} bytes, not {len(message.picture)}")
        self._last_id = message.frame_id
        # a clock that is wrong must not make frames older than they can be
        captured = min(max(message.captured_ms / 1000, now - 10), now)
        self.session.offer(message.picture, message.frame_id, captured)
        self.worker.wake()
        await self._send(messages.arrived(message.frame_id))

    async def _condition(self, message: ConditionIn, now: float) -> None:
        if not self._texts.take(now):
            raise Wrong("more than 60 settings a second")
        # a large picture takes longer to decode than an event loop may stand still
        image = await asyncio.to_thread(pictures.decode, message.picture, *self.size)
        self._conditions[message.name] = Picture(image, message.scale)
        version = self.session.change(0.0, **{message.name: self._conditions[message.name]})
        await self._say(type="settings", version=version, changes=[message.name])

    def _scaled(self, name: str, value: Any) -> Picture | None:
        if value is None:
            self._conditions.pop(name, None)
            return None
        if name not in self._conditions:
            raise Wrong(f"send a picture first; {name} has none")
        if not isinstance(value, dict) or set(value) != {"scale"}:
            raise Wrong(f"{name} is an object with a scale, or null")
        self._conditions[name] = Picture(self._conditions[name].image, value["scale"])
        return self._conditions[name]

    def _note_held(self, message: Painted) -> None:
        more = min(max(0, message.held_back - self._held), 1000)
        self._held = max(self._held, message.held_back)
        self.session.ledger.admit(more)
        self.session.ledger.drop("window", more)

    async def _text(self, text: str) -> None:
        if not self._texts.take(self.worker.clock()):
            raise Wrong("more than 60 settings a second")
        message = messages.read_text(text)
        if message["type"] == "ping":
            await self._say(type="pong", sent=message.get("sent"), now=self.worker.clock() * 1000)
        elif message["type"] == "record":
            name = self.record(self.session, bool(message.get("on")))
            await self._say(type="recording", on=bool(message.get("on")), file=name)
        else:
            await self._set(message)

    async def _set(self, message: dict[str, Any]) -> None:
        changes = message.get("changes")
        if not isinstance(changes, dict) or not changes:
            raise Wrong("a set message needs changes, an object")
        unknown = [name for name in changes if name not in CONTROLS and not str(name).startswith("lora:")]
        if unknown:
            raise Wrong(f"{', '.join(map(str, unknown))[:100]} cannot be set; these can: {', '.join(CONTROLS)}")
        given = {name: self._scaled(name, value) if name in CONDITIONS else value for name, value in changes.items()}
        version = self.session.change(message.get("seconds", 0.0), **given)
        await self._say(type="settings", version=version, changes=list(changes))

    async def _write(self) -> None:
        while not self.session.closed:
            await self.ready.wait()
            self.ready.clear()
            for one in self.session.take():
                journey = one.journey
                captured = journey.captured * 1000
                await self._send(messages.frame_out(journey.frame_id, captured, journey.version, one.payload))
                self.session.sent(one)

    async def _report(self) -> None:
        while not self.session.closed:
            await asyncio.sleep(REPORT_S)
            found = self.session.summary()
            rung = found["pace"]["now"] if found["pace"] is not None else None
            await self._say(type="ledger", ledger=found, rung=rung)

    async def _say(self, **message: Any) -> None:
        async with self._sending:
            await asyncio.wait_for(self.socket.send_json(message), SEND_TIMEOUT_S)

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await asyncio.wait_for(self.socket.send_bytes(data), SEND_TIMEOUT_S)

    def _on_ready(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have ended before the worker's turn did
            self.loop.call_soon_threadsafe(self.ready.set)

    def _on_problem(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._tell, message)

    def _tell(self, message: str) -> None:
        if len(self._problems) >= 8:
            return
        task = self.loop.create_task(self._say(type="error", message=message[:400]))
        self._problems.add(task)
        task.add_done_callback(self._told)

    def _told(self, task: asyncio.Task[None]) -> None:
        self._problems.discard(task)
        if not task.cancelled():
            task.exception()
