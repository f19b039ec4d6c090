"""Undoing, and requests that do not meet."""

import threading

import pytest

from fastdiff.hooks import Hooks, RemovalOrder, Requests, check_on_top, innermost


class Thing:
    def act(self, value: int) -> int:
        return value + 1


def hooks() -> Hooks:
    return Hooks("test", Requests())


def test_wraps_nest_and_come_off_last_in_first_out():
    thing, one = Thing(), hooks()
    one.wrap(thing, "act", lambda inner, value: inner(value) * 2)
    one.wrap(thing, "act", lambda inner, value: inner(value) + 5)
    assert thing.act(1) == 9
    deepest = innermost(thing, "act")
    assert deepest is not None
    one.set(deepest, "inner", lambda value: 0)
    assert thing.act(1) == 5
    one.undo()
    assert vars(thing) == {}
    assert thing.act(1) == 2
    one.undo()
    assert vars(thing) == {}


def test_two_layers_are_on_top_together_and_not_apart():
    thing, first, second = Thing(), hooks(), hooks()
    first.wrap(thing, "act", lambda inner, value: inner(value))
    second.wrap(thing, "act", lambda inner, value: inner(value))
    check_on_top([first, second])
    with pytest.raises(RemovalOrder, match=r"Thing\.act was changed again"):
        check_on_top([first])
    second.undo()
    check_on_top([first])


def test_a_deleted_attribute_is_noticed():
    thing, one = Thing(), hooks()
    one.set(thing, "name", "new")
    delattr(thing, "name")
    with pytest.raises(RemovalOrder):
        check_on_top([one])


def test_requests_nest_and_threads_do_not_see_each_other():
    requests, other = Requests(), Requests()
    seen = []
    with requests.open() as outer:
        assert requests.current() is outer
        assert other.current() is None
        with other.open():
            assert requests.current() is outer
        with requests.open() as inner:
            assert requests.current() is inner
        thread = threading.Thread(target=lambda: seen.append(requests.current()))
        thread.start()
        thread.join()
        assert requests.current() is outer
    assert seen == [None]
    assert requests.current() is None


def test_state_goes_with_its_request_even_when_kept_and_failed():
    ended = []
    requests = Requests(lambda request, failed: ended.append(failed))
    kept = requests.open(keep=True)
    with kept:
        kept.state("a", lambda: bytearray(3))
    assert not kept.closed
    with pytest.raises(KeyError), kept:
        raise KeyError
    assert kept.closed
    assert ended == [True]
    with requests.open(stray=True):
        pass
    assert ended == [True]


def test_a_generator_may_leave_a_request_in_another_place_than_it_entered():
    requests = Requests()

    def stream():
        with requests.open() as request:
            yield request

    first, second = stream(), stream()
    one, two = next(first), next(second)
    assert requests.current() is two
    first.close()
    assert one.closed
    assert requests.current() is two
    second.close()
    assert requests.current() is None
