"""A plan: which accelerations, with which settings, in which order. Hashable, and the same after JSON and back."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from fastdiff.acceleration import STAGES, Acceleration, check_choice

SCHEMA = 1
PRESETS = ("exact", "balanced", "fast")

MEMBERS = {
    "Precision": "fastdiff.runtime.precision",
    "FewStep": "fastdiff.distillation.few_step",
    "TinyDecoder": "fastdiff.runtime.tiny_decoder",
    "W8A8": "fastdiff.quantization.w8a8",
    "StoredWeights": "fastdiff.quantization.stored",
    "LayerPrecision": "fastdiff.quantization.layer_precision",
    "FoldedText": "fastdiff.attention.folded",
    "SparseAttention": "fastdiff.attention.sparse",
    "SparseLinear": "fastdiff.attention.linear",
    "TokenOrder": "fastdiff.attention.order",
    "SlicedInference": "fastdiff.runtime.slicing",
    "Forecast": "fastdiff.caching.forecast",
    "CacheQuant": "fastdiff.caching.cachequant",
    "GuidanceReuse": "fastdiff.caching.guidance",
    "DeepFeatures": "fastdiff.caching.deep",
    "UnitMask": "fastdiff.caching.units",
    "BlockResidual": "fastdiff.caching.block_residual",
    "DiffusersCache": "fastdiff.caching.diffusers_cache",
    "GuidanceAdapter": "fastdiff.distillation.adapters",
    "PromptCache": "fastdiff.runtime.prompt_cache",
    "TiledInference": "fastdiff.runtime.tiles",
    "FrameWindows": "fastdiff.video.windows",
    "NoiseShift": "fastdiff.sampling.noise_shift",
    "GuidanceInterval": "fastdiff.sampling.interval",
    "StepBudget": "fastdiff.sampling.steps",
    "PatchParallel": "fastdiff.parallel.patch",
    "BranchParallel": "fastdiff.parallel.branches",
    "DecoderParallel": "fastdiff.parallel.decoder",
    "ClipParallel": "fastdiff.parallel.clip",
    "ContextParallel": "fastdiff.parallel.context",
    "LateLora": "fastdiff.parallel.lora",
    "RemoteControlNet": "fastdiff.parallel.controlnet",
    "Compile": "fastdiff.runtime.compile",
}
"""Every acceleration by class name and the module it lives in, in the order of their stages. One line adds one."""


class PlanError(ValueError):
    """A plan, or a plan file, that cannot be used. The message says what is wrong and what would be right."""


def member(kind: str) -> Any:
    """Return the acceleration class called `kind`."""
    if kind not in MEMBERS:
        raise PlanError(f"no acceleration is called {kind!r}; known are {', '.join(MEMBERS)}")
    return getattr(import_module(MEMBERS[kind]), kind)


@dataclass(frozen=True)
class Plan:
    """An ordered tuple of accelerations.

    Args:
        accelerations: in the order of their stages (`fastdiff.acceleration.STAGES`), no kind twice.
        name: the name of the preset this is, if it is one. A preset leaves out, and reports, members that cannot act
            on a model; in a plan made by hand such a member is an error.
        tuned: what the plan was tuned on (`fastdiff.planning.provenance.Provenance`), when a planner made it.

    Raises:
        PlanError: wrong order (the right one is printed), a kind twice, or two that cannot work together.
    """

    accelerations: Sequence[Acceleration] = ()
    name: str = ""
    tuned: Any = None

    def __post_init__(self):
        accelerations: Any = self.accelerations
        if isinstance(accelerations, Acceleration):
            accelerations = (accelerations,)
        elif isinstance(accelerations, Plan):
            accelerations = accelerations.accelerations
        object.__setattr__(self, "accelerations", tuple(accelerations))
        for one in self.accelerations:
            if not isinstance(one, Acceleration):
                raise PlanError(f"a plan holds accelerations, such as PromptCache(); this is a {type(one).__name__}")
        if self.name:
            check_choice("Plan", "name", self.name, PRESETS)
        self._check_order()
        self._check_pairs()

    def _check_order(self) -> None:
        right = sorted(self.accelerations, key=lambda one: STAGES.index(one.stage))
        if list(self.accelerations) != right:
            order = ", ".join(f"{type(one).__name__} ({one.stage})" for one in right)
            raise PlanError(f"wrong order of accelerations; the right one is: {order}")

    def _check_pairs(self) -> None:
        for index, one in enumerate(self.accelerations):
            for other in self.accelerations[index + 1 :]:
                if type(one) is type(other):
                    raise PlanError(f"{type(one).__name__} stands twice in the plan; keep one")
                reason = one.conflict(other) or other.conflict(one)
                if reason:
                    raise PlanError(f"{type(one).__name__} and {type(other).__name__} cannot work together: {reason}")

    def __iter__(self) -> Iterator[Acceleration]:
        return iter(self.accelerations)

    def __len__(self) -> int:
        return len(self.accelerations)

    @classmethod
    def of(cls, plan: "Plan | str | Acceleration | Iterable[Acceleration]") -> "Plan":
        """Accept what a caller may reasonably write for a plan: a plan, a preset's name, one or more accelerations."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str):
            return cls.preset(plan)
        return cls(plan)  # type: ignore[arg-type]

    @classmethod
    def preset(cls, name: str) -> "Plan":
        """Return a plan that suits any pipeline; what cannot act on one is left out there, and reported.

        exact: prompt cache and memory format. balanced: the measured-best precision and, where sound, a guarded
        diffusers cache as well. fast: the tiny decoder too. Each compiles on a GPU and not on a CPU.
        """
        if name not in PRESETS:
            raise PlanError(f"no preset is called {name!r}; presets are {', '.join(PRESETS)}")
        weights = [member("Precision")(dtype="keep")] if name == "exact" else [member("Precision")()]
        if name == "fast":
            # first, so that precision is measured on the decoder that will run
            weights.insert(0, member("TinyDecoder")())
        blocks = [] if name == "exact" else [member("DiffusersCache")()]
        rest = [member("PromptCache")(), member("Compile")(on_cpu=False)]
        return cls((*weights, *blocks, *rest), name=name)

    def to_json(self) -> str:
        """Return the plan as JSON text; `from_json` gives an equal plan back."""
        rows = [{"kind": type(one).__name__, **one.settings()} for one in self.accelerations]
        try:
            tuned = {"tuned": self.tuned.as_json()} if self.tuned else {}
            whole = {"schema": SCHEMA, "preset": self.name, "accelerations": rows, **tuned}
            return json.dumps(whole, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanError(f"this plan holds something a file cannot hold ({error}); use a path or a name") from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            PlanError: not JSON, a later schema, an unknown member or key, or a value that is not allowed.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: the text is not JSON ({error})") from error
        if not isinstance(data, dict) or not isinstance(data.get("accelerations"), list):
            raise PlanError('not a plan: expected {"schema": 1, "accelerations": [...]}')
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"this plan has schema {data.get('schema')!r} and this fastdiff reads schema {SCHEMA}; "
                "upgrade fastdiff, or write the plan again with this version"
            )
        unknown = set(data) - {"schema", "preset", "accelerations", "tuned"}
        if unknown:
            keys = "schema, preset, accelerations, tuned"
            raise PlanError(f"unknown key {sorted(unknown)[0]!r} in the plan; keys are {keys}")
        try:
            tuned = _provenance(data["tuned"]) if "tuned" in data else None
            return cls(tuple(_read(row) for row in data["accelerations"]), data.get("preset") or "", tuned)
        except PlanError:
            raise
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan from a file; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan file {path}: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _read(row: Any) -> Acceleration:
    if not isinstance(row, dict) or "kind" not in row:
        raise PlanError('each acceleration in a plan is an object with a "kind"')
    settings = {key: _frozen(value) for key, value in row.items() if key != "kind"}
    kind = member(row["kind"])
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise PlanError(f"{row['kind']} has no setting {key!r}; its settings are {', '.join(known) or 'none'}")
    return kind(**settings)


def _provenance(found: Any) -> Any:
    from fastdiff.planning.provenance import Provenance

    return Provenance.from_json(found)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _refuse_constant(name: str) -> float:
    raise PlanError(f"the plan holds {name}, which is not a number; write a finite one")
