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
        self.begun = 0
        self.waiting: list[tuple[Any, float]] = []
        self.latest: float | None = None

    def run(self) -> Iterator[Chunk]:
        try:
            for control, times in self._chunks():
                self.begun += 1
                yield from self._hand_out(self.session.generate(control, times))
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

    def _chunks(self) -> Iterator[tuple[list[Any] | None, list[float] | None]]:
        """Control frames of each chunk and when they were taken, or None for one from noise."""
        if self.controls is None:
            while True:
                yield None, None
        for item in self.controls:
            if item is None:
                yield None, None
                continue
            if isinstance(item, Mapping):
                self.session.update(**item)
            else:
                self._gather(item)
            # a change to shorter chunks can make several of what is waiting
            while len(self.waiting) >= self.session.wanted:
                yield self._gathered()
        while self.waiting:
            yield self._gathered()

    def _gather(self, item: Any) -> None:
        """Keep one control frame for the chunk, or refuse it."""
        frame, captured = (item.frame, item.captured) if isinstance(item, Captured) else (item, None)
        if captured is not None:
            if self.latest is not None and captured < self.latest:
                return self._refuse("backwards", ValueError(f"a frame taken at {captured} came after {self.latest}"))
            self.latest = captured
        try:
            self.session.check(frame)
        except (TypeError, ValueError) as error:
            return self._refuse("broken", error)
        self.waiting.append((frame, self.session.clock() if captured is None else captured))

    def _refuse(self, cause: str, error: Exception) -> None:
        if not self.drops:
            raise error
        self.session.ledger.admit()
        self.session.ledger.drop(cause)

    def _gathered(self) -> tuple[list[Any], list[float]]:
        wanted = self.session.wanted
        taken, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        frames, times = [frame for frame, _ in taken], [time for _, time in taken]
        if len(self.session.settings.prompts) > 1:
            frames = [list(video) for video in zip(*frames, strict=True)]
        return frames, times

    def _hand_out(self, made: list[Chunk]) -> Iterator[Chunk]:
        for chunk in made:
            self.session.ledger.hand_out(chunk)
            yield chunk
