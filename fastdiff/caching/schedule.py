"""The schedule that needs no measurement, shared by everything that reuses what was computed at an earlier step."""

from fastdiff.acceleration import check_number
from fastdiff.caching.boundary import Call


def check_schedule(owner: str, interval: int, warm_up: int, tail: int) -> None:
    """Raise a `ValueError` unless these make a schedule."""
    check_number(owner, "interval", interval, low=1, whole=True)
    check_number(owner, "warm_up", warm_up, low=1, whole=True)
    check_number(owner, "tail", tail, low=0, whole=True)


def computes(call: Call, interval: int, warm_up: int, tail: int) -> bool:
    """True at the first `warm_up` steps, the last `tail`, and every `interval`-th between."""
    if call.index < warm_up or (call.steps is not None and call.steps - call.position <= tail):
        return True
    return (call.index - warm_up) % interval == interval - 1
