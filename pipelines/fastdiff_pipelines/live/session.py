"""One viewer's live session: newest frame in, newest pictures out, and a ledger of everything between.

Three threads may touch a session: the transport offers frames and takes pictures, people move controls, and the worker
lets the model run. Only the worker touches streams, so settings change between pushes and never within one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdiff_pipelines.conditions import Picture, resized, scaled
from fastdiff_pipelines.latest import Captured, LatestFrame
from fastdiff_pipelines.live.applied import Applied
from fastdiff_pipelines.live.controller import DeadlineController, Rung
from fastdiff_pipelines.live.controls import Controls
from fastdiff_pipelines.live.ledger import Finished, Journey, Ledger
from fastdiff_pipelines.live.outbox import Outbox
from fastdiff_pipelines.live.pace import pace
from fastdiff_pipelines.live.recording import Recording, digest
from fastdiff_pipelines.live.tape import Tape
from fastdiff_pipelines.slots import NotFinite, Output

UNREAD_S = 1.0
MOST_FAILURES = 3
AROUND = ("uplink", "unpack", "pack", "send", "paint")

Open = Callable[[float, str | None], Any]
"""Gives a stream with `Stream`'s interface for a share of the picture's sides and a plan's name."""


@dataclass
class _Inside:
    journey: Journey
    rung: Rung | None
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
        unpack: Callable[[Any, int, int], Any] = scaled,
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
        self.sharers = 1
        self.closed = False
        self._open, self._unpack, self._pack = open, unpack, pack
        self._inbox = LatestFrame()
        self._outbox = Outbox(acknowledged)
        self._lock = threading.Lock()
        self._streams: dict[tuple[float, str | None], Any] = {}
        self._place: tuple[float, str | None] | None = None
        self._stream: Any = None
        self._tape = Tape(recording)
        self._applied = Applied(lambda message: self.on_problem(message), lora)
        self._applied_version = 0
        self._versions: dict[int, int] = {}
        self._inside: OrderedDict[int, _Inside] = OrderedDict()
        self._busy = 0.0
        self._pushed_at = clock()
        self._around: deque[float] = deque(maxlen=60)
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
        return self._outbox.take()

    def sent(self, one: Finished) -> None:
        """A picture has left; where nobody acknowledges, it counts as shown."""
        now = self.clock()
        one.journey.spend("send", (now - one.packed) * 1000)
        if self._outbox.acknowledged:
            self._outbox.sent(one, now)
        else:
            self._finish(one.journey, now)

    def painted(self, frame_id: int, age_ms: float) -> bool:
        """The viewer saw a picture at this age by its own clock; False for one that is not awaited.

        The age is the viewer's word, held to be no less than what passed here and no more than what passed since.
        """
        found = self._outbox.seen(frame_id)
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
            count = self._count_waiting() + self._outbox.clear() + len(self._inside)
            self._inbox.close()
        self.ledger.drop("closed", count)

    def summary(self) -> dict[str, Any]:
        """The ledger, and under `pace` what is done to keep the target; plain values."""
        return self.ledger.summary() | {"pace": pace(self.controller, self._stream, self.controls.settings.steps)}

    def record(self, recording: Recording | None) -> None:
        """Begin a recording, or end it, with the next turn; streams are made anew, so that it begins at a beginning.

        Raises:
            RuntimeError: no turn will come; the recording is closed.
        """
        self._tape.ask(recording)

    @property
    def recording(self) -> Recording | None:
        """The recording from the next turn on."""
        return self._tape.next

    # for the worker

    @property
    def waits(self) -> bool:
        """Whether a frame is waiting for its turn."""
        # whoever does not read shall not cost others much, but what waits for him must not grow old either
        kept_up = not self._outbox.unread(self.clock()) or self.clock() - self._pushed_at >= UNREAD_S
        return kept_up and not self.closed and self._count_waiting() > 0

    def idle(self, now: float, after_s: float) -> bool:
        """Whether frames are inside and nothing has followed them for a while."""
        return not self.closed and bool(self._inside) and now - self._pushed_at >= after_s

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of pictures now; None before the first."""
        return None if self._stream is None else self._stream.size

    def prepare(self) -> None:
        """Make the streams now, before a frame waits for one."""
        self._prepare()
        while self.unprepared is not None:
            self.prepare_another()

    def prepare_another(self) -> None:
        """Make a stream that the ladder may ask for, as no frame would be on time if it were made then."""
        place = self.unprepared
        if place is not None:
            self._streams[place] = self._open(*place)

    @property
    def unprepared(self) -> tuple[float, str | None] | None:
        """Size and plan of a stream yet to be made; None when all are, or none was needed yet."""
        if self.closed or self.controller is None or self._stream is None:
            return None
        return next((one for rung in self.controller.rungs if (one := _place(rung)) not in self._streams), None)

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

    def end(self) -> None:
        """No turn will come: the session is closed, and its recording is whole."""
        self.close()
        try:
            self._tape.close()
        except OSError as error:
            # whoever runs turns has other sessions too
            self.on_problem(f"the recording is not whole: {error}")

    def _count_waiting(self) -> int:
        return self._inbox.put_count - self._inbox.taken_count - self._inbox.dropped_count

    def _newest(self) -> Captured | None:
        try:
            return self._inbox.get(timeout=0)
        except TimeoutError:
            return None

    def _prepare(self) -> None:
        """The stream of the rung in force, with the settings that hold now."""
        rung = self.controller.rung if self.controller is not None else Rung("as asked")
        place = _place(rung)
        extra = {name: value for name, value in rung.changes.items() if name not in ("scale", "plan")}
        if place != self._place or self._tape.switches:
            self.drain()
            if self._tape.switch():
                self._streams.clear()
            if place not in self._streams:
                self._streams[place] = self._open(*place)
            self._stream, self._place = self._streams[place], place
            self._applied.begin()
            self._tape.write("open", scale=place[0], plan=place[1])
        version, wanted = self.controls.version, self.controls.at(self.clock())
        asked = self.controls.settings
        fades = [name for name in ("prompts", "seeds") if wanted[name] and not getattr(asked, name)]
        if "steps" in extra:
            wanted["steps"] = min(wanted["steps"], extra.pop("steps"))
            wanted["timesteps"] = None
        wanted |= extra
        if wanted["control"] is not None:
            wanted["control"] = self._sized(wanted["control"])
        for taken in self._applied.tell(self._stream, wanted, fades):
            self._tape.write("change", **taken)
        self._applied_version = version

    def _sized(self, picture: Picture) -> Picture:
        """A ControlNet's picture at the size in force; the same object for the same picture."""
        key = id(picture), tuple(self._stream.size)
        if self._fitting is None or self._fitting[0] != key:
            self._fitting = key, picture, resized(picture, *self._stream.size)
        return self._fitting[2]

    # holds the picture asked for too, or its id might come back as another's
    _fitting: tuple[Any, Picture, Picture] | None = None

    def _push(self, frame: Any, journey: Journey, entered: float) -> None:
        rung = None if self.controller is None else self.controller.rung
        journey.version = self._applied_version
        self._inside[journey.frame_id] = _Inside(journey, rung, entered, self._busy, self._spent())
        # a rung's cost is of frames that are all of this rung, and as many as it holds
        settled = rung is not None and next(iter(self._inside.values())).rung is rung
        full = rung is not None and settled and len(self._inside) >= rung.depth
        if self._tape.current is not None:
            self._tape.current.frame(journey.frame_id, journey.captured, frame)
        outputs = self._run(lambda: self._stream.push(frame, journey.frame_id, journey.captured), "push")
        self._pushed_at = self.clock()
        repeated = any(one.repeated for one in outputs)
        if self.controller is not None and full and not repeated:
            around = sorted(self._around)[int(0.9 * len(self._around))] if self._around else None
            spent = (self._pushed_at - entered) * 1000 * self.sharers
            decision = self.controller.observe(spent, self._pushed_at, around)
            if decision is not None:
                told = {"before": decision.before, "after": decision.after, "reason": decision.reason}
                self._tape.write("decision", **told)

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
        if self._tape.current is not None:
            hashes = {str(one.frame_id): digest(one.image) for one in outputs}
            self._tape.write(kind, rows=rows, outputs=hashes)
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
        spent = sum(self._spent()) - sum(inside.spent)
        journey.spend_inside(timings, spent, (self._busy - inside.busy) * 1000, (ended - inside.pushed) * 1000)
        payload = self._pack(output.image)
        packed = self.clock()
        journey.spend("pack", (packed - ended) * 1000)
        self._send(Finished(journey, payload, packed))

    def _send(self, one: Finished) -> None:
        with self._lock:
            if self.closed:
                return
            late = self._outbox.put(one)
        if late:
            self.ledger.drop("outbox")
        self.on_ready()

    def _finish(self, journey: Journey, at: float) -> None:
        self._around.append(sum(journey.stages.get(stage, 0.0) for stage in AROUND))
        self.ledger.finish(journey, at)

    def _spent(self) -> tuple[float, float, float]:
        return getattr(self._stream, "spent_ms", (0.0, 0.0, 0.0))


def _place(rung: Rung) -> tuple[float, str | None]:
    """The share of the size and the plan that a rung's stream has."""
    return float(rung.changes.get("scale", 1.0)), rung.changes.get("plan")
