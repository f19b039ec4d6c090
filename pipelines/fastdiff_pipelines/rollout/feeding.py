"""From a source of frames, changes and nothing to chunks: what is gathered, what is refused, and how it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastdiff.acceleration import check_choice
from fastdiff_pipelines.latest import Captured
from fastdiff_pipelines.rollout.chunks import Chunk
from fastdiff_pipelines.rollout.session import RolloutSession

ON_BAD = ("raise", "drop")


def feed(session: RolloutSession, controls: Iterable[Any] | None, chunks: int | None, on_bad: str) -> Iterator[Chunk]:
    """Run a session from a source until it ends, the consumer stops, or ``chunks`` have been made.

    Nothing runs ahead: a chunk is begun when the consumer asks for it, so one who stops reading costs nothing and no
    queue can grow.

    Raises:
        ValueError: an unknown ``on_bad``, or fewer than one chunk.
    """
    check_choice("run", "on_bad", on_bad, ON_BAD)
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be 1 or more, or None for no end, got {chunks!r}")
    return _Feeding(session, controls, chunks, on_bad == "drop").run()


class _Feeding:
    def __init__(self, session: RolloutSession, controls: Iterable[Any] | None, chunks: int | None, drops: bool):
        self.session, self.controls, self.chunks, self.drops = session, controls, chunks, drops
        self.begun = self.made = 0
        self.frames: list[Any] = []
        self.times: list[float] = []
        self.latest: float | None = None

    def run(self) -> Iterator[Chunk]:
        try:
            for control in self._chunks():
                yield from self._hand_out(self._generate(control))
                self.session.finalise()
                if self._enough():
                    break
            yield from self._hand_out(self.session.flush())
        finally:
            # also when the consumer stops reading: nothing of this run is left in the session
            if self.session.in_flight:
                self.session.restart("closed")

    def _enough(self) -> bool:
        return self.chunks is not None and self.begun >= self.chunks

    def _chunks(self) -> Iterator[list[Any] | None]:
        """Control frames of each chunk, or None for one from noise."""
        if self.controls is None:
            while True:
                yield None
        for item in self.controls:
            if isinstance(item, Mapping):
                self.session.update(**item)
            elif item is None:
                yield None
            elif self._gather(item) and len(self.frames) >= self.session.wanted:
                yield self._gathered()
        if self.frames:
            yield self._gathered()

    def _gather(self, item: Any) -> bool:
        """Keep one control frame for the chunk; False when it was dropped."""
        frame, captured = (item.frame, item.captured) if isinstance(item, Captured) else (item, None)
        if captured is not None:
            if self.latest is not None and captured < self.latest:
                return self._refuse("backwards", ValueError(f"a frame taken at {captured} came after {self.latest}"))
            self.latest = captured
        try:
            self.session.check(frame)
        except (TypeError, ValueError) as error:
            return self._refuse("broken", error)
        self.frames.append(frame)
        self.times.append(self.session.clock() if captured is None else captured)
        return True

    def _refuse(self, cause: str, error: Exception) -> bool:
        if not self.drops:
            raise error
        self.session.ledger.admit()
        self.session.ledger.drop(cause)
        return False

    def _gathered(self) -> list[Any]:
        frames, self.frames = self.frames, []
        if len(self.session.settings.prompts) > 1:
            return [list(video) for video in zip(*frames, strict=True)]
        return frames

    def _generate(self, control: list[Any] | None) -> list[Chunk]:
        times, self.times = self.times, []
        self.begun += 1
        return self.session.generate(control, times or None)

    def _hand_out(self, made: list[Chunk]) -> Iterator[Chunk]:
        for chunk in made:
            self.made += 1
            self.session.ledger.hand_out(chunk)
            yield chunk
