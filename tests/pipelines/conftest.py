"""What tests of batch jobs share: a model that costs nothing and a job for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff_pipelines.batch.items import Common, Item, with_seeds
from fastdiff_pipelines.batch.maker import Made
from fastdiff_pipelines.batch.settings import Settings, Work
from fastdiff_pipelines.batch.worker import Worker


class FakeMaker:
    """Pixels drawn from an item's seed. `trouble(items, measures)` may raise or return what to do to the pixels."""

    def __init__(self, trouble: Callable[[Sequence[Item], list[str]], Any] = lambda items, measures: None):
        self.trouble = trouble
        self.calls: list[list[Item]] = []
        self.measures: list[str] = []
        self.possible: list[str] = []

    def __call__(self, items: Sequence[Item], is_aborted: Callable[[], bool]) -> Made:
        self.calls.append(list(items))
        self.trouble(items, self.measures)
        return Made([self.pixels(item) for item in items], {"denoise": 0.25}, 1000)

    @staticmethod
    def pixels(item: Item) -> np.ndarray:
        shape = (item.height or 16, item.width or 16, 3)
        frames = () if item.frames is None else (item.frames,)
        found = np.random.default_rng(item.seed).random(frames + shape)
        return found * np.nan if "nan" in item.prompt else found

    def relieve(self) -> str | None:
        if len(self.measures) == len(self.possible):
            return None
        self.measures.append(self.possible[len(self.measures)])
        return self.measures[-1]

    def restore(self) -> None:
        self.measures.clear()


@pytest.fixture
def fake_maker() -> type[FakeMaker]:
    return FakeMaker


@pytest.fixture
def batch_items() -> Callable[..., list[Item]]:
    """Gives `count` items with seeds, differing by their prompts."""

    def make(count: int, prompt: str = "picture", **fields: Any) -> list[Item]:
        return with_seeds([Item(f"{prompt} {number}", **fields) for number in range(count)], 7)

    return make


@pytest.fixture
def batch_worker(tmp_path: Path) -> Callable[..., Worker]:
    """Gives a worker of a job over items; workers of one test share its folder."""

    def make(items: Sequence[Item], maker: Any, folder: Path | None = None, **options: Any) -> Worker:
        names = ("batch", "attempts", "workers", "lease_s", "since", "verify")
        chosen = {name: options.pop(name) for name in names if name in options}
        settings = Settings("nowhere", Common("fake@1", format=options.pop("format", "png")), **chosen)
        return Worker(Work.of(settings, list(items)), folder or tmp_path, maker, **options)

    return make
