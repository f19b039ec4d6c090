"""One picture or clip to make: what it depends on, its content-addressed id, its seed and its bucket."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

FORMATS = ("png", "jpg", "webp", "mp4")
SMALLEST, LARGEST, MULTIPLE = 16, 8192, 8
MOST_FRAMES = 4096


@dataclass(frozen=True)
class Adapter:
    """A LoRA: `source` is a file or folder, `content` a digest of what is in it."""

    source: str
    scale: float = 1.0
    content: str = ""

    def identity(self) -> list[Any]:
        """What a picture depends on; where the file lies is not part of it."""
        return [self.content or self.source, self.scale]


@dataclass(frozen=True)
class Common:
    """What every item of a job depends on.

    Attributes:
        model: name and revision, or a digest of the folder (`identity.model_identity`), so that two copies of the same
            weights are the same model.
        plan: the accelerations as JSON text.
        dtype: "auto", "float32", "float16" or "bfloat16".
        format: one of `FORMATS`.
    """

    model: str
    plan: str = ""
    dtype: str = "auto"
    format: str = "png"


@dataclass(frozen=True)
class Item:
    """Everything one output depends on, besides `Common`.

    Attributes:
        seed: from 0 to 2^63 - 1; None only until `with_seeds` has run.
        height, width: pixels, or None for the model's own size.
        frames: None for a picture, else the frames of a clip; `fps` is its pace.

    Raises:
        ValueError: a value no model could use. The message says what would be right.
    """

    prompt: str
    negative: str = ""
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 25
    guidance: float = 5.0
    frames: int | None = None
    fps: int = 8
    adapters: tuple[Adapter, ...] = field(default=())

    def __post_init__(self):
        for wrong, what in (
            (not self.prompt.strip(), "the prompt is empty"),
            (not 1 <= self.steps <= 1000, f"steps must be from 1 to 1000, not {self.steps}"),
            (not 0 <= self.guidance <= 100, f"guidance must be from 0 to 100, not {self.guidance}"),
            (self.seed is not None and not 0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}"),
            ((self.height is None) != (self.width is None), "height and width come together or not at all"),
            (
                self.frames is not None and not 1 <= self.frames <= MOST_FRAMES,
                f"frames cannot be {self.frames}",
            ),
            (not 1 <= self.fps <= 240, f"fps must be from 1 to 240, not {self.fps}"),
            (any(not math.isfinite(one.scale) for one in self.adapters), "an adapter's scale must be a finite number"),
        ):
            if wrong:
                raise ValueError(what)
        for side in (self.height, self.width):
            if side is not None and (not SMALLEST <= side <= LARGEST or side % MULTIPLE):
                raise ValueError(f"each side must be a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}, not {side}")

    def content(self) -> dict[str, Any]:
        """What was asked for, without the seed."""
        found = asdict(self)
        del found["seed"]
        return found | {"adapters": [one.identity() for one in self.adapters]}

    @property
    def bucket(self) -> tuple[Any, ...]:
        """Items with equal buckets can share one call of the pipeline. Adapters come first, so that sorting by
        buckets swaps them least."""
        adapters = tuple((one.source, one.scale) for one in self.adapters)
        return (adapters, self.height or 0, self.width or 0, self.frames or 0, self.steps, self.guidance)

    @property
    def cost(self) -> float:
        """A guess of the relative effort, for the remaining time of shapes not met yet: pixels x frames x steps."""
        return (self.height or 512) * (self.width or 512) * (self.frames or 1) * self.steps


def canonical(value: Any) -> str:
    """JSON with one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(*values: Any) -> str:
    """sha256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(values).encode("utf-8", "surrogatepass")).hexdigest()


def identity(item: Item, common: Common) -> str:
    """The id of an output: the same for the same content anywhere, different when anything it depends on differs."""
    return digest({**item.content(), "seed": item.seed, **asdict(common)})


def derived_seed(job_seed: int, item: Item, duplicate: int) -> int:
    """The seed of an item that names none: the first 8 bytes of a digest, cut to 63 bits.

    It depends on the job's seed, on what was asked for and on how often the same was asked for before in this job;
    not on model, plan or precision, so that their outputs can be compared, and not on rank, shard, batch or order.
    """
    return int(digest(job_seed, item.content(), duplicate)[:16], 16) >> 1


def with_seeds(items: Sequence[Item], job_seed: int) -> list[Item]:
    """Gives every item without a seed its own; asking twice for the same gives two different pictures."""
    asked: dict[str, int] = {}
    seeded = []
    for item in items:
        if item.seed is None:
            content = canonical(item.content())
            duplicate = asked[content] = asked.get(content, -1) + 1
            seeded.append(replace(item, seed=derived_seed(job_seed, item, duplicate)))
        else:
            seeded.append(item)
    return seeded


def file_name(item: Item, name: str, suffix: str) -> str:
    """A name that says what is inside; 16 digits of the id make it unique."""
    words = re.sub(r"[^a-z0-9]+", "-", item.prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'output'}-{name[:16]}.{suffix}"


def to_row(item: Item) -> dict[str, Any]:
    """The item as plain JSON; `from_row` gives an equal one back."""
    return asdict(item)


def from_row(row: dict[str, Any]) -> Item:
    """Reads what `to_row` gave."""
    return Item(**{**row, "adapters": tuple(Adapter(**one) for one in row["adapters"])})
