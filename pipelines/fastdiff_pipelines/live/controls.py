"""Settings that people move while frames flow: at once, or as a ramp given in seconds.

A ramp is evaluated when a frame enters, at that frame's time, so it takes as long at 8 frames per second as at 60.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields
from typing import Any

from fastdiff_pipelines.settings import Settings

SMOOTH = ("strength", "guidance_scale", "delta", "blend", "embedded_guidance")
"""Settings that are numbers and may ramp; besides these `prompt` and `seed`, which blend."""

_KNOWN = frozenset(field.name for field in fields(Settings)) | {"on_update"}
LONGEST_RAMP_S = 600.0


@dataclass(frozen=True)
class _Ramp:
    before: Any
    after: Any
    begun: float
    seconds: float

    def share(self, now: float) -> float:
        return min(1.0, max(0.0, (now - self.begun) / self.seconds))


class Controls:
    """What frames entering now should get; changed from any thread, read by the one that runs the model.

    Args:
        settings: what holds at first.
        adapters: names of LoRA adapters whose scales may be moved too, as `lora:NAME`, with their scales at first.
    """

    def __init__(self, settings: Settings, adapters: dict[str, float] | None = None):
        self._settings = settings
        self._adapters = dict(adapters or {})
        self._policy: str | None = None
        self._ramps: dict[str, _Ramp] = {}
        self._lock = threading.Lock()
        self.version = 0

    @property
    def settings(self) -> Settings:
        """What was asked for last; ramps count as arrived."""
        with self._lock:
            return self._settings

    def set(self, now: float, seconds: float = 0.0, **changes: Any) -> int:
        """Ask for other settings, from `now` on or reached `seconds` later. Either all are taken or none.

        Numbers move along a line; `prompt` and `seed` along an arc from what they are; everything else at once.

        Returns:
            The version that frames with these settings will have.

        Raises:
            TypeError: a name that is not a setting.
            ValueError: an impossible value or time.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= LONGEST_RAMP_S:
            raise ValueError(f"a ramp lasts 0 to {LONGEST_RAMP_S:g} seconds, got {seconds!r}")
        plain = {name: value for name, value in changes.items() if not name.startswith("lora:")}
        scales = {name: value for name, value in changes.items() if name.startswith("lora:")}
        with self._lock:
            self._check(plain, scales)
            policy = plain.pop("on_update", self._policy)
            settings = self._settings.changed(**plain)
            current = self._values(now)
            for name, value in changes.items():
                self._ramps.pop(name, None)
                if name in ("prompt", "seed"):
                    before = current[f"{name}s"] or ((current[name], 1.0),)
                    moves = before != ((value, 1.0),)
                else:
                    before = current.get(name)
                    moves = _can_ramp(name) and before is not None and before != value
                if seconds > 0 and moves:
                    self._ramps[name] = _Ramp(before, value, now, float(seconds))
            self._settings, self._policy = settings, policy
            self._adapters |= {name.removeprefix("lora:"): float(value) for name, value in scales.items()}
            self.version += 1
            return self.version

    def at(self, now: float) -> dict[str, Any]:
        """Arguments of `Stream.update` for a frame that enters now, and `lora:NAME` scales."""
        with self._lock:
            found = self._values(now)
            for name in [name for name, ramp in self._ramps.items() if ramp.share(now) >= 1]:
                del self._ramps[name]
            if self._policy is not None:
                found["on_update"] = self._policy
            return found

    @property
    def moving(self) -> bool:
        """Whether a ramp is under way."""
        with self._lock:
            return bool(self._ramps)

    def _check(self, plain: dict[str, Any], scales: dict[str, Any]) -> None:
        unknown = [name for name in plain if name not in _KNOWN]
        unknown += [name for name in scales if name.removeprefix("lora:") not in self._adapters]
        if unknown:
            adapters = ", ".join(f"lora:{name}" for name in self._adapters)
            raise TypeError(f"{', '.join(unknown)} cannot be changed live; {', '.join(sorted(_KNOWN))} {adapters} can")
        for name, scale in scales.items():
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
                raise ValueError(f"{name} must be a finite number, got {scale!r}")

    def _values(self, now: float) -> dict[str, Any]:
        found = {field.name: getattr(self._settings, field.name) for field in fields(Settings)}
        found |= {f"lora:{name}": scale for name, scale in self._adapters.items()}
        for name, ramp in self._ramps.items():
            share = ramp.share(now)
            if name in ("prompt", "seed"):
                if share < 1:
                    found[f"{name}s"] = _towards(ramp, share)
            else:
                found[name] = ramp.before + share * (ramp.after - ramp.before)
        return found


def _towards(ramp: _Ramp, share: float) -> tuple[tuple[Any, float], ...]:
    """Weighted values part of the way from a blend to one of them."""
    total = sum(weight for _, weight in ramp.before)
    weights = {thing: (1 - share) * weight / total for thing, weight in ramp.before}
    weights[ramp.after] = weights.get(ramp.after, 0.0) + share
    return tuple((thing, weight) for thing, weight in weights.items() if weight > 0)


def _can_ramp(name: str) -> bool:
    return name in SMOOTH or name.startswith("lora:")
