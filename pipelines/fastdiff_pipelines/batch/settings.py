"""What a job is told, as one file every worker reads."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from fastdiff_pipelines.batch.items import FORMATS, Common, Item, digest, from_row, identity, to_row
from fastdiff_pipelines.batch.outputs import write_whole

WITHIN = "job"


@dataclass(frozen=True)
class Settings:
    """How a job runs. None of it but `common` changes what an output looks like at batch size 1.

    Attributes:
        model: the folder workers load; `common.model` says what is in it.
        batch: items in one call of the model at most.
        workers: processes on this machine.
        threads: CPU threads of each; 0 leaves it to torch.
        devices: one for each worker, used in turn.
        attempts: tries an item gets alone, and workers that may die over it.
        lease_s: see `claims.Claims`.
        verify: "size" trusts a manifest line whose file has the right size, "hash" reads the file.
        since: failures before this time (seconds since 1970) are tried again.
    """

    model: str
    common: Common
    batch: int = 8
    workers: int = 1
    threads: int = 0
    devices: tuple[str, ...] = ("cpu",)
    attempts: int = 3
    lease_s: float = 60.0
    verify: str = "size"
    since: float = 0.0

    def __post_init__(self):
        for wrong, what in (
            (self.batch < 1, f"batch must be at least 1, not {self.batch}"),
            (self.workers < 1, f"workers must be at least 1, not {self.workers}"),
            (self.threads < 0, f"threads must be at least 0, not {self.threads}"),
            (not self.devices, "devices must name at least one"),
            (self.attempts < 1, f"attempts must be at least 1, not {self.attempts}"),
            (not self.lease_s > 0, f"lease_s must be above 0, not {self.lease_s}"),
            (self.verify not in ("size", "hash"), f"verify must be size or hash, not {self.verify!r}"),
            (
                self.common.format not in FORMATS,
                f"format must be one of {FORMATS}, not {self.common.format!r}",
            ),
        ):
            if wrong:
                raise ValueError(what)


@dataclass(frozen=True)
class Work:
    """A job ready to run: settings and items, each with its id, in the order they are worked on."""

    settings: Settings
    items: dict[str, Item]

    @classmethod
    def of(cls, settings: Settings, items: "list[Item] | tuple[Item, ...]") -> Self:
        """Names items that have their seeds and sorts them by bucket; equal ones become one."""
        named = {identity(item, settings.common): item for item in items}
        order = {name: place for place, name in enumerate(named)}
        ordered = sorted(named, key=lambda name: (repr(named[name].bucket), order[name]))
        return cls(settings, {name: named[name] for name in ordered})

    def save(self, folder: Path) -> Path:
        """Writes the job into `folder`/job, whole, under a name of its content."""
        settings = asdict(self.settings)
        rows = [json.dumps(settings), *(json.dumps([name, to_row(item)]) for name, item in self.items.items())]
        path = folder / WITHIN / f"work-{digest(settings, list(self.items))[:12]}.jsonl"
        write_whole(path, "\n".join(rows).encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        first, *rows = path.read_text("utf-8").split("\n")
        found = json.loads(first)
        found |= {"common": Common(**found["common"]), "devices": tuple(found["devices"])}
        named = (json.loads(row) for row in rows)
        return cls(Settings(**found), {name: from_row(row) for name, row in named})

    def since(self, seconds: float) -> Self:
        """The same work, with failures before this moment forgotten."""
        return replace(self, settings=replace(self.settings, since=seconds))
