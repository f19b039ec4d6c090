"""What a stream has been told: it is told what differs from that, and what it will not take holds nothing else back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

_NOTHING = object()


class Applied:
    """The settings that a session's stream has, and those that it refused.

    Args:
        on_problem: told once of every value that a stream refuses.
        lora: moved by `lora:NAME` values; None leaves them alone.
    """

    def __init__(self, on_problem: Callable[[str], None], lora: Any = None):
        self._on_problem, self._lora = on_problem, lora
        self._has: dict[str, Any] = {}
        self._refused: dict[str, tuple[Any, str]] = {}

    def begin(self) -> None:
        """Another stream, which has been told nothing yet."""
        self._has, self._refused = {}, {}

    def tell(self, stream: Any, wanted: dict[str, Any], fades: Collection[str] = ()) -> list[dict[str, dict[str, Any]]]:
        """Bring a stream to what is wanted, as far as it can go there.

        Args:
            fades: which of the wanted values are a moment of a fade; a stream that refuses these cuts.

        Returns:
            What was taken, one update after the other, each with its `settings` and scales of `lora`.
        """
        if "similarity" in self._has and "similarity" not in wanted:
            wanted = {**wanted, "similarity": None}
        changes = {name: value for name, value in wanted.items() if self._has.get(name, _NOTHING) != value}
        # what is not asked for any more may be refused, and told of, another time
        self._refused = {name: found for name, found in self._refused.items() if name in changes}
        if all(name in self._refused and self._refused[name][0] == value for name, value in changes.items()):
            return []
        scales = {name.removeprefix("lora:"): value for name, value in changes.items() if name.startswith("lora:")}
        if scales and self._lora is not None:
            self._lora.set(scales)
        settings = {name: value for name, value in changes.items() if not name.startswith("lora:")}
        taken, refused = _updated(stream.update, settings)
        self._has |= {name: value for name, value in changes.items() if name not in refused}
        self._say(settings, refused, fades)
        if scales and not taken:
            taken = [{}]
        last = len(taken) - 1
        return [{"settings": one, "lora": scales if place == last else {}} for place, one in enumerate(taken)]

    def _say(self, settings: dict[str, Any], refused: dict[str, str], fades: Collection[str]) -> None:
        told = {name: message for name, (_, message) in self._refused.items()}
        self._refused = {name: (settings[name], message) for name, message in refused.items()}
        new = {name: message for name, message in refused.items() if told.get(name) != message}
        cuts = dict.fromkeys(message for name, message in new.items() if name in fades)
        others = dict.fromkeys(message for name, message in new.items() if name not in fades)
        if cuts:
            self._on_problem(f"no fade is possible here, so it is a cut: {'; '.join(cuts)}")
        if others:
            self._on_problem(f"these settings are not possible: {'; '.join(others)}")


def _updated(update: Callable[..., None], changes: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All changes in one update, or one by one where that is refused: what was taken, and what was not with why."""
    if not changes:
        return [], {}
    try:
        update(**changes)
        return [changes], {}
    except (ValueError, TypeError, NotImplementedError) as error:
        if len(changes) == 1:
            return [], dict.fromkeys(changes, str(error))
    taken: list[dict[str, Any]] = []
    # the policy says what the other changes do to frames on their way
    left = {name: changes[name] for name in sorted(changes, key=lambda name: name != "on_update")}
    while left:
        refused: dict[str, str] = {}
        for name, value in left.items():
            try:
                update(**{name: value})
                taken.append({name: value})
            except (ValueError, TypeError, NotImplementedError) as error:
                refused[name] = str(error)
        if len(refused) == len(left):
            return taken, refused
        # what was refused may fit what has been taken since
        left = {name: left[name] for name in refused}
    return taken, {}
