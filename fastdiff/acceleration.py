"""The contract every acceleration obeys.

An acceleration is a frozen dataclass: the object *is* its settings, checked on construction. What it needs while it
runs lives in the hooks it installs (`fastdiff.hooks`), keyed by request and guidance branch, never in the object and
never on a class.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from fastdiff.hooks import Hooks

STAGES = ("weights", "attention", "blocks", "steps", "devices", "compile")
"""The order in which accelerations are applied; each may rely on everything before it being in place."""


class Unsupported(NotImplementedError):
    """An acceleration cannot act on this pipeline or machine. The message names the reason and the remedy."""


class NotEngaged(RuntimeError):
    """With `strict=True`: something that should have made a request faster did not. The message names it."""


@dataclass(frozen=True)
class Verdict:
    """Whether an acceleration can act on one pipeline, and if not, why not and what would help.

    A verdict that is `ok` may still carry a `reason`: a limit worth saying aloud.
    """

    ok: bool
    reason: str = ""

    def __post_init__(self):
        if not self.ok and not self.reason:
            raise ValueError("a refusal needs a reason")

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Acceleration:
    """Base of every acceleration; subclasses are frozen dataclasses whose fields are plain JSON values.

    Class attributes a subclass sets:
        stage: one of `STAGES`.
        exact: True when a denoiser forward stays within a relative L2 distance of 1e-5 in float32 (1e-12 in float64).
        bound: for a lossy one, the name of the metric that bounds the loss, as `fastdiff.quality` names it.
    `exact` and `bound` may be properties when they depend on the settings.
    """

    stage: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        if cls.stage not in STAGES:
            raise TypeError(f"{cls.__name__}.stage is {cls.stage!r}; it must be one of {', '.join(STAGES)}")

    @property
    def exact(self) -> bool:
        """True when outputs are the same up to rounding."""
        return False

    @property
    def bound(self) -> str:
        """Name of the metric that bounds the loss; empty for an exact acceleration."""
        return "" if self.exact else "psnr"

    def supports(self, pipe: Any) -> Verdict:
        """Say whether this can act on `pipe` here. Pure and cheap: nothing is changed, run or downloaded."""
        raise NotImplementedError

    def apply(self, pipe: Any, hooks: "Hooks") -> None:
        """Act on that pipeline object only, through `hooks`, so that everything can be undone.

        Raises:
            Unsupported: it turned out that it cannot act; what `hooks` recorded so far is undone by the caller.
        """
        raise NotImplementedError

    def conflict(self, other: "Acceleration") -> str:
        """Why this and `other` cannot stand in one plan; empty when they can."""
        return ""

    def settings(self) -> dict[str, Any]:
        """The fields by name, as they go into a plan file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def check_choice(owner: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a `ValueError` that lists the right values unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r} is not known; use one of {', '.join(map(repr, choices))}")


def check_number(
    owner: str, name: str, value: Any, low: float, high: float = float("inf"), whole: bool = False
) -> None:
    """Raise a `ValueError` unless `value` is a finite number in [`low`, `high`] (an `int` when `whole`)."""
    kind = int if whole else (int, float)
    # NaN fails both comparisons, so it is refused here too
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == float("inf"):
        sort = "a whole number" if whole else "a number"
        limit = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise ValueError(f"{owner}: {name}={value!r} must be {sort} {limit}")
