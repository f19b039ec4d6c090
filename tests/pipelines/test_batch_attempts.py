"""Memory, retries, poison and NaN (points 8 and 9 of the contract of batch jobs), with a model that costs nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_pipelines.batch.attempts import Attempts, Done, Failed, to_bytes
from fastdiff_pipelines.batch.backoff import Caps
from fastdiff_pipelines.batch.errors import Broken, Cancelled
from fastdiff_pipelines.batch.items import Item

MOST = 16


def _attempts(maker: Any, caps: Caps | None = None, **options: Any) -> Attempts:
    return Attempts(maker, caps or Caps(MOST), lambda item: f"{item.height}", **options)


def _memory(most: int) -> Callable[[Sequence[Item], list[str]], None]:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        if len(items) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return trouble


def _poison(*words: str, error: type[Exception] = RuntimeError) -> Callable[[Sequence[Item], list[str]], None]:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        for item in items:
            if item.prompt in words:
                raise error(f"cannot make {item.prompt}")

    return trouble


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 11, 15])
def test_the_limit_settles_on_the_largest_batch_that_fits(fake_maker: Any, batch_items: Any, most: int) -> None:
    caps = Caps(MOST)
    maker = fake_maker(_memory(most))
    made = []
    for _ in range(30):
        made += list(_attempts(maker, caps).run(batch_items(MOST)))
    assert all(isinstance(one, Done) for one in made)
    assert Counter(one.item.prompt for one in made) == {item.prompt: 30 for item in batch_items(MOST)}
    assert caps.limit("None") == most
    # sizes that failed are not tried again but once in a long while
    assert sum(len(call) > most for call in maker.calls) <= 8 + len(maker.calls) // 64


def test_the_limit_is_remembered_and_damage_to_its_file_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "caps.json"
    caps = Caps(MOST, path)
    caps.ran_out("a", 16)
    caps.ran_out("a", 8)
    assert Caps(MOST, path).limit("a") == 4
    assert Caps(MOST, path).limit("b") == MOST
    assert Caps(2, path).limit("a") == 2
    for damage in (b"", b"[]", b'{"a": "many"}', b'{"a": -1}', b"\xff"):
        path.write_bytes(damage)
        assert Caps(MOST, path).limit("a") == MOST


def test_memory_that_comes_back_is_used_again(fake_maker: Any) -> None:
    caps = Caps(8)
    caps.ran_out("a", 8)
    for _ in range(1000):
        caps.fitted("a", caps.limit("a"))
    assert caps.limit("a") == 8


def test_memory_that_goes_away_halves_the_limit() -> None:
    caps = Caps(16)
    caps.fitted("a", 16)
    caps.ran_out("a", 16)
    assert caps.limit("a") == 8


def test_measures_are_taken_when_one_alone_does_not_fit_and_taken_back(fake_maker: Any, batch_items: Any) -> None:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        if len(items) > 1 or (items[0].height == 64 and "tiles" not in measures):
            raise MemoryError

    maker = fake_maker(trouble)
    maker.possible = ["tiles", "offloading"]
    attempts = _attempts(maker)
    small, large = batch_items(3), batch_items(3, height=64, width=64)
    made = [*attempts.run(large), *attempts.run(small), *attempts.run(large)]
    assert [one.measures for one in made if isinstance(one, Done)] == [("tiles",)] * 3 + [()] * 3 + [("tiles",)] * 3
    assert sum(len(call) == 1 and call[0].height == 64 for call in maker.calls) == 7


def test_what_never_fits_is_given_up_alone(fake_maker: Any, batch_items: Any) -> None:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        if any(item.prompt == "picture 5" for item in items):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    maker = fake_maker(trouble)
    maker.possible = ["tiles"]
    made = list(_attempts(maker).run(batch_items(8)))
    failed = [one for one in made if isinstance(one, Failed)]
    assert [(one.item.prompt, one.error) for one in failed] == [("picture 5", "OutOfMemory")]
    assert "even with tiles" in failed[0].message
    assert len(made) == 8
    assert maker.measures == ["tiles"] or maker.measures == []
    assert all(one.measures == () for one in made if isinstance(one, Done) and one.item.prompt > "picture 5")


@given(st.sets(st.integers(0, 15)), st.integers(1, 4))
def test_poison_is_found_and_all_others_are_made(bad: set[int], most: int) -> None:
    from fastdiff_pipelines.batch.maker import Made

    items = [Item(f"{number}", seed=number) for number in range(16)]
    calls: list[int] = []

    class Maker:
        def __call__(self, group: Sequence[Item], is_aborted: Callable[[], bool]) -> Made:
            calls.append(len(group))
            if any(item.seed in bad for item in group):
                raise RuntimeError("poison")
            return Made([np.zeros((2, 2, 3))] * len(group))

        def relieve(self) -> None: ...
        def restore(self) -> None: ...

    made = list(_attempts(Maker(), most=most).run(items))
    assert {one.item.seed for one in made if isinstance(one, Failed)} == bad
    assert {one.item.seed for one in made if isinstance(one, Done)} == set(range(16)) - bad
    assert calls.count(1) >= most * len(bad)
    # a batch of 16 is cut at most four times on the way to each bad item
    assert len(calls) <= 1 + len(bad) * (2 * 4 + most)


def test_tries_are_bounded_and_recorded(fake_maker: Any, batch_items: Any) -> None:
    made = list(_attempts(fake_maker(_poison("picture 1")), most=3).run(batch_items(2)))
    assert [(type(one), one.attempts) for one in made] == [(Done, 2), (Failed, 4)]
    assert isinstance(made[1], Failed)
    assert (made[1].error, made[1].message) == ("RuntimeError", "cannot make picture 1")


def test_wrong_settings_are_not_tried_again(fake_maker: Any, batch_items: Any) -> None:
    maker = fake_maker(_poison("picture 0", error=ValueError))
    made = list(_attempts(maker, most=5).run(batch_items(1)))
    assert len(maker.calls) == 1
    assert isinstance(made[0], Failed)


def test_an_error_that_passes_costs_one_more_try(fake_maker: Any, batch_items: Any) -> None:
    left = [2]

    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("connection reset")

    made = list(_attempts(fake_maker(trouble), most=3).run(batch_items(1)))
    assert [(type(one), one.attempts) for one in made] == [(Done, 3)]


def test_nan_costs_only_the_item_that_has_it(fake_maker: Any, batch_items: Any) -> None:
    items = [*batch_items(3), *batch_items(1, prompt="nan"), *batch_items(3, prompt="other")]
    maker = fake_maker()
    made = list(_attempts(maker).run(items))
    assert [one.item.prompt for one in made if isinstance(one, Failed)] == ["nan 0"]
    assert [len(call) for call in maker.calls] == [7, 1]
    for one in made:
        if isinstance(one, Done):
            assert np.array_equal(one.pixels, to_bytes(maker.pixels(one.item)))


@pytest.mark.parametrize("error", [Broken("device-side assert"), Cancelled()])
def test_what_ends_the_worker_passes_through(fake_maker: Any, batch_items: Any, error: Exception) -> None:
    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        raise error

    with pytest.raises(type(error)):
        list(_attempts(fake_maker(trouble)).run(batch_items(4)))


def test_no_memory_is_held_by_the_error_while_less_is_tried(fake_maker: Any, batch_items: Any) -> None:
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def trouble(items: Sequence[Item], measures: list[str]) -> None:
        block = np.zeros(10)
        gc.collect()
        assert all(one() is None for one in alive)
        alive.append(weakref.ref(block))
        if len(items) > 1:
            raise MemoryError

    assert all(isinstance(one, Done) for one in _attempts(fake_maker(trouble)).run(batch_items(8)))
    assert len(alive) > 4


def test_rounding_to_bytes_is_to_the_nearest() -> None:
    assert to_bytes(np.array([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.1])).tolist() == [0, 0, 0, 1, 255, 255]
