"""One viewer's live session: newest frame in, newest pictures out, and a ledger of everything between.

Three threads may touch a session: the transport offers frames and takes pictures, people move controls, and the worker
lets the model run. Only the worker touches streams, so settings change between pushes and never within one.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdiff_pipelines.conditions import Picture, resized
from fastdiff_pipelines.latest import Captured, LatestFrame
from fastdiff_pipelines.live.controller import DeadlineController, Decision, Rung
from fastdiff_pipelines.live.controls import Controls
from fastdiff_pipelines.live.ledger import Finished, Journey, Ledger
from fastdiff_pipelines.live.recording import Recording, digest
from fastdiff_pipelines.slots import NotFinite, Output

OUTBOX = 2
UNREAD_S = 1.0
UNACKNOWLEDGED = 256
MOST_FAILURES = 3
AROUND = ("uplink", "unpack", "pack", "send", "paint")

Open = Callable[[float, str | None], Any]
"""Gives a stream with `Stream`'s interface for a share of the picture's sides and a plan's name."""


@dataclass
class _Inside:
    journey: Journey
    pushed: float
    busy: float
    spent: tuple[float, float, float]


class LiveSession:
    """Frames of one source through a stream.

    Args:
        open: makes a stream; called by the worker, once for each size and plan that the ladder names.
        controls: what frames should get.
        unpack: ``(payload, height, width)`` to a frame as `Stream.push` takes it. A ValueError means a broken frame.
        pack: uint8 ``[H, W, 3]`` to a payload for the transport.
        clock: seconds; every time of the session is of this clock.
        controller: keeps a deadline; None leaves settings alone.
        lora: moved by `lora:NAME` controls; shared by all sessions of a model.
        acknowledged: whether the viewer tells when a picture was shown. If not, it is shown when it is sent.
        on_ready, on_problem: called by the worker: there are pictures; something is wrong with what was sent.
        recording: writes down what happens, for `replay`.
    """

    def __init__(
        self,
        open: Open,
        controls: Controls,
        *,
        unpack: Callable[[Any, int, int], Any] = lambda payload, height, width: payload,
        pack: Callable[[Any], Any] = lambda image: image,
        clock: Callable[[], float] = time.perf_counter,
        target_ms: float | None = None,
        controller: DeadlineController | None = None,
        lora: Any = None,
        acknowledged: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        on_problem: Callable[[str], None] = lambda message: None,
        recording: Recording | None = None,
    ):
        self.controls, self.clock, self.controller, self.lora = controls, clock, controller, lora
        self.ledger = Ledger(clock, target_ms if controller is None else controller.budget.target_ms)
        self.on_ready, self.on_problem = on_ready, on_problem
        self.recording = recording
        self.sharers = 1
        self.closed = False
        self._open, self._unpack, self._pack, self._acknowledged = open, unpack, pack, acknowledged
        self._inbox = LatestFrame()
        self._outbox: deque[Finished] = deque()
        self._shown: OrderedDict[int, tuple[Finished, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._streams: dict[tuple[float, str | None], Any] = {}
        self._place: tuple[float, str | None] | None = None
        self._stream: Any = None
        self._applied: dict[str, Any] = {}
        self._applied_version = 0
        self._versions: dict[int, int] = {}
        self._inside: OrderedDict[int, _Inside] = OrderedDict()
        self._busy = 0.0
        self._pushed_at = clock()
        self._around: deque[float] = deque(maxlen=15)
        self._failures = 0

    # for the transport

    def offer(self, payload: Any, frame_id: int, captured: float | None = None) -> int | None:
        """A frame has come. It replaces one that still waits, whose id is the answer.

        Raises:
            RuntimeError: the session is closed.
        """
        now = self.clock()
        self.ledger.admit()
        with self._lock:
            dropped = self._inbox.dropped_count
            replaced = self._waiting_id
            self._inbox.put((payload, now), frame_id, now if captured is None else min(captured, now))
            self._waiting_id = frame_id
            if self._inbox.dropped_count == dropped:
                return None
        self.ledger.drop("replaced")
        return replaced

    _waiting_id: int | None = None

    def change(self, seconds: float = 0.0, **changes: Any) -> int:
        """Move controls; see `Controls.set`."""
        version = self.controls.set(self.clock(), seconds, **changes)
        self.ledger.asked(version)
        return version

    def take(self) -> list[Finished]:
        """Pictures that wait to be sent, oldest first."""
        with self._lock:
            found = list(self._outbox)
            self._outbox.clear()
            return found

    def sent(self, one: Finished) -> None:
        """A picture has left; where nobody acknowledges, it counts as shown."""
        now = self.clock()
        one.journey.spend("send", (now - one.packed) * 1000)
        if not self._acknowledged:
            self._finish(one.journey, now)
            return
        with self._lock:
            self._shown[one.journey.frame_id] = (one, now)
            while len(self._shown) > UNACKNOWLEDGED:
                self._shown.popitem(last=False)

    def painted(self, frame_id: int, age_ms: float) -> bool:
        """The viewer saw a picture at this age by its own clock; False for one that is not awaited.

        The age is the viewer's word, held to be no less than what passed here and no more than what passed since.
        """
        with self._lock:
            found = self._shown.pop(frame_id, None)
        if found is None:
            return False
        one, left = found
        captured = one.journey.captured
        at = min(max(captured + age_ms / 1000, left), max(left, self.clock()))
        one.journey.spend("paint", (at - left) * 1000)
        self._finish(one.journey, at)
        return True

    def close(self) -> None:
        """No more frames; what waits is forgotten."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            waiting = self._inbox.put_count - self._inbox.taken_count - self._inbox.dropped_count
            count = waiting + len(self._outbox) + len(self._inside)
            self._outbox.clear()
            self._shown.clear()
            self._inbox.close()
        self.ledger.drop("closed", count)

    # for the worker

    @property
    def waits(self) -> bool:
        """Whether a frame is waiting for its turn."""
        inbox = self._inbox
        if self.closed or inbox.put_count <= inbox.taken_count + inbox.dropped_count:
            return False
        # whoever does not read shall not cost others much, but what waits for him must not grow old either
        return len(self._outbox) < OUTBOX or self.clock() - self._pushed_at >= UNREAD_S

    def idle(self, now: float, after_s: float) -> bool:
        """Whether frames are inside and nothing has followed them for a while."""
        return not self.closed and bool(self._inside) and now - self._pushed_at >= after_s

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of pictures now; None before the first."""
        return None if self._stream is None else self._stream.size

    def prepare(self) -> None:
        """Make the stream now, before a frame waits for it."""
        self._prepare()

    def step(self) -> None:
        """One turn: the newest frame goes in, what is finished comes out."""
        taken = self._newest()
        if taken is None:
            return
        payload, received = taken.frame
        journey = Journey(taken.frame_id, taken.captured, received)
        started = self.clock()
        journey.spend("uplink", (received - taken.captured) * 1000)
        journey.spend("wait", (started - received) * 1000)
        if self.controller is not None and not self.controller.admits((started - taken.captured) * 1000):
            self.ledger.drop("stale")
            return
        self._prepare()
        try:
            frame = self._unpack(payload, *self._stream.size)
        except ValueError as error:
            self.ledger.drop("broken")
            self.on_problem(f"frame {taken.frame_id} cannot be read: {error}")
            return
        entered = self.clock()
        journey.spend("unpack", (entered - started) * 1000)
        self._push(frame, journey, entered)

    def drain(self) -> None:
        """Finish what is inside, as nothing follows it."""
        if self._inside:
            self._run(self._stream.flush, "flush")

    def record(self, recording: Recording | None) -> None:
        """Begin a recording, or end it, with the next turn; streams are made anew, so that it begins at a beginning."""
        self._switch = (recording,)

    _switch: tuple[Recording | None] | None = None

    def _newest(self) -> Captured | None:
        try:
            return self._inbox.get(timeout=0)
        except TimeoutError:
            return None

    def _prepare(self) -> None:
        """The stream of the rung in force, with the settings that hold now."""
        rung = self.controller.rung if self.controller is not None else Rung("as asked")
        extra = dict(rung.changes)
        place = (float(extra.pop("scale", 1.0)), extra.pop("plan", None))
        switch, self._switch = self._switch, None
        if place != self._place or switch is not None:
            self.drain()
            if switch is not None:
                self._streams.clear()
                if self.recording is not None:
                    self.recording.close()
                self.recording = switch[0]
            if place not in self._streams:
                self._streams[place] = self._open(*place)
            self._stream, self._place, self._applied = self._streams[place], place, {}
            if self.recording is not None:
                self.recording.write("open", scale=place[0], plan=place[1])
        version, wanted = self.controls.version, self.controls.at(self.clock())
        if "steps" in extra:
            wanted["steps"] = min(wanted["steps"], extra.pop("steps"))
            wanted["timesteps"] = None
        wanted |= extra
        if wanted["control"] is not None:
            wanted["control"] = self._sized(wanted["control"])
        if "similarity" in self._applied and "similarity" not in wanted:
            wanted["similarity"] = None
        changes = {name: value for name, value in wanted.items() if self._applied.get(name, _NOTHING) != value}
        if changes:
            self._apply(changes)
            self._applied = wanted
        self._applied_version = version

    def _sized(self, picture: Picture) -> Picture:
        """A ControlNet's picture at the size in force; the same object for the same picture."""
        key = id(picture), tuple(self._stream.size)
        if self._fitting is None or self._fitting[0] != key:
            self._fitting = key, picture, resized(picture, *self._stream.size)
        return self._fitting[2]

    # holds the picture asked for too, or its id might come back as another's
    _fitting: tuple[Any, Picture, Picture] | None = None

    def _apply(self, changes: dict[str, Any]) -> None:
        scales = {name.removeprefix("lora:"): changes.pop(name) for name in list(changes) if name.startswith("lora:")}
        if scales and self.lora is not None:
            self.lora.set(scales)
        if changes:
            try:
                self._stream.update(**changes)
            except (ValueError, TypeError, NotImplementedError) as error:
                self.on_problem(f"these settings are not possible: {error}")
        if self.recording is not None:
            self.recording.write("change", settings=changes, lora=scales)

    def _push(self, frame: Any, journey: Journey, entered: float) -> None:
        full = self.controller is not None and len(self._inside) >= self.controller.rung.depth - 1
        journey.version = self._applied_version
        self._inside[journey.frame_id] = _Inside(journey, entered, self._busy, self._spent())
        if self.recording is not None:
            self.recording.frame(journey.frame_id, journey.captured, frame)
        outputs = self._run(lambda: self._stream.push(frame, journey.frame_id, journey.captured), "push")
        self._pushed_at = self.clock()
        repeated = any(one.repeated for one in outputs)
        if self.controller is not None and full and not repeated:
            around = statistics.median(self._around) if self._around else None
            spent = (self._pushed_at - entered) * 1000 * self.sharers
            decision = self.controller.observe(spent, self._pushed_at, around)
            if decision is not None:
                self._decided(decision)

    def _decided(self, decision: Decision) -> None:
        if self.recording is not None:
            self.recording.write("decision", before=decision.before, after=decision.after, reason=decision.reason)

    def _run(self, work: Callable[[], list[Output]], kind: str) -> list[Output]:
        """One operation of the stream, and its outputs on their way."""
        started = self.clock()
        rows = len(self._inside)
        try:
            outputs = work()
        except NotFinite as error:
            outputs = []
            self.on_problem(str(error))
        except Exception as error:
            self._failed(error)
            return []
        ended = self.clock()
        self._busy += ended - started
        self._failures = 0
        if self.recording is not None:
            hashes = {str(one.frame_id): digest(one.image) for one in outputs}
            self.recording.write(kind, rows=rows, outputs=hashes)
        for output in outputs:
            self._put_out(output, ended)
        if kind == "flush":
            self._lose(list(self._inside))
        return outputs

    def _failed(self, error: Exception) -> None:
        """The model raised: what was inside is lost, the session goes on unless it happens again and again."""
        self._failures += 1
        self._lose(list(self._inside))
        self._stream.clear()
        self.on_problem(f"the model failed: {type(error).__name__}: {error}")
        if self._failures >= MOST_FAILURES:
            self.close()

    def _lose(self, ids: list[int]) -> None:
        for frame_id in ids:
            del self._inside[frame_id]
        self.ledger.drop("failed", len(ids))

    def _put_out(self, output: Output, ended: float) -> None:
        # outputs come in order, so whoever entered earlier and is still missing will not come
        earlier = []
        for frame_id in self._inside:
            if frame_id == output.frame_id:
                break
            earlier.append(frame_id)
        self._lose(earlier)
        inside = self._inside.pop(output.frame_id)
        journey, timings = inside.journey, output.timings
        journey.repeated = output.repeated
        encode, denoise, decode = timings.encode_ms, timings.denoise_ms, timings.decode_ms
        spent = [now - then for now, then in zip(self._spent(), inside.spent, strict=True)]
        for stage, value in (("encode", encode), ("denoise", denoise), ("decode", decode)):
            journey.spend(stage, value)
        # a repeated frame took part in no call, so all that ran meanwhile was others' work
        journey.spend("others", max(0.0, sum(spent) - encode - denoise - decode))
        journey.spend("idle", (ended - inside.pushed - (self._busy - inside.busy)) * 1000)
        image = output.image
        begun = self.clock()
        payload = self._pack(image)
        packed = self.clock()
        journey.spend("pack", (packed - ended) * 1000 if begun >= ended else 0.0)
        self._send(Finished(journey, payload, packed))

    def _send(self, one: Finished) -> None:
        with self._lock:
            if self.closed:
                return
            self._outbox.append(one)
            late = len(self._outbox) > OUTBOX
            if late:
                self._outbox.popleft()
        if late:
            self.ledger.drop("outbox")
        self.on_ready()

    def _finish(self, journey: Journey, at: float) -> None:
        self._around.append(sum(journey.stages.get(stage, 0.0) for stage in AROUND))
        self.ledger.finish(journey, at)

    def _spent(self) -> tuple[float, float, float]:
        return getattr(self._stream, "spent_ms", (0.0, 0.0, 0.0))


_NOTHING = object()
