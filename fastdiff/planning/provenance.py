"""What a tuned plan was tuned on, kept in its file and compared with the pipeline it is applied to."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastdiff.acceleration import check_number

Expected = tuple[str, float, float, float, int]
_SAMPLES = 64


@dataclass(frozen=True)
class Provenance:
    """Fingerprints of what a plan was tuned on, and what it may be expected to do there.

    Args:
        pipeline, scheduler: class names. model, scheduler_config: SHA-256 of configs and of the tensors' shapes.
        weights: a sample of the denoisers' weights, compared with room for what another float type rounds.
        steps, guidance: of the run it was tuned for. dtype, device: of the denoiser.
        versions: (package, version).
        expected: (name, value, low, high, n) of what was measured on prompts the search had not seen.
    """

    pipeline: str
    model: str
    weights: tuple[float, ...]
    scheduler: str
    scheduler_config: str
    steps: int
    guidance: float
    dtype: str
    device: str
    versions: tuple[tuple[str, str], ...]
    expected: tuple[Expected, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(self.weights))
        object.__setattr__(self, "versions", tuple(tuple(pair) for pair in self.versions))
        object.__setattr__(self, "expected", tuple(tuple(row) for row in self.expected))
        for field in ("pipeline", "model", "scheduler", "scheduler_config", "dtype", "device"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"tuned: {field} must be text, not {getattr(self, field)!r}")
        for value in self.weights:
            check_number("tuned", "a sampled weight", value, low=-1e300)
        check_number("tuned", "steps", self.steps, low=1, whole=True)
        check_number("tuned", "guidance", self.guidance, low=0)
        for row in self.expected:
            if len(row) != 5:
                raise ValueError(f"tuned: an expected figure is (name, value, low, high, n), not {row}")
            for value in row[1:4]:
                check_number("tuned", f"expected {row[0]}", value, low=-1e300)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> "Provenance":
        """Read what `as_json` gave.

        Raises:
            ValueError: a key is missing, unknown, or has an impossible value.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) - known or (known - {"expected"}) - set(found):
            raise ValueError(f"tuned holds {', '.join(sorted(known))}, no more and no less")
        return cls(**found)

    def check(self, pipe: Any) -> tuple[str, ...]:
        """Compare with a pipeline; what differs without harm comes back in words.

        Raises:
            ValueError: another model, or a scheduler of another kind.
        """
        here = of(pipe, self.steps, self.guidance)
        if here.model != self.model:
            raise ValueError(
                f"this plan was tuned for another model (a {self.pipeline} whose fingerprint begins with "
                f"{self.model[:12]}; this {here.pipeline}'s begins with {here.model[:12]}); run fastdiff tune here"
            )
        if not _alike(here.weights, self.weights):
            raise ValueError(
                f"this plan was tuned for another model: a {self.pipeline} of this shape with other weights; "
                "run fastdiff tune here"
            )
        if (here.scheduler, here.scheduler_config) != (self.scheduler, self.scheduler_config):
            raise ValueError(
                f"this plan was tuned with {self.scheduler} as it was set then; the pipeline now has "
                f"{here.scheduler}, or other settings; set the scheduler back, or run fastdiff tune again"
            )
        notes = []
        for name in ("dtype", "device"):
            if getattr(here, name) != getattr(self, name):
                notes.append(f"tuned in {getattr(self, name)}, used in {getattr(here, name)}: measure again")
        now = dict(here.versions)
        for package, version in self.versions:
            if now.get(package) != version:
                notes.append(f"tuned with {package} {version}, used with {now.get(package)}")
        return tuple(notes)


def of(pipe: Any, steps: int, guidance: float, expected: tuple[Expected, ...] = ()) -> Provenance:
    """The provenance of a plan tuned on this pipeline now."""
    import diffusers
    import torch

    import fastdiff
    from fastdiff.anatomy import anatomy, public_class

    parts = anatomy(pipe)
    weight = next(parts.denoiser.parameters())
    scheduler = parts.scheduler
    versions = (("diffusers", diffusers.__version__), ("fastdiff", fastdiff.__version__), ("torch", torch.__version__))
    return Provenance(
        public_class(pipe).__name__,
        model_fingerprint(pipe),
        sampled_weights(pipe),
        type(scheduler).__name__,
        _digest(json.dumps(_plain(scheduler.config), sort_keys=True)),
        steps,
        float(guidance),
        str(weight.dtype).removeprefix("torch."),
        weight.device.type,
        versions,
        expected,
    )


def model_fingerprint(pipe: Any) -> str:
    """SHA-256 over configs, names and shapes of the denoisers."""
    digest = hashlib.sha256()
    for name, denoiser in _denoisers(pipe).items():
        shapes = [(key, list(tensor.shape)) for key, tensor in sorted(denoiser.state_dict().items())]
        digest.update(json.dumps([name, _plain(denoiser.config), shapes], sort_keys=True).encode())
    return digest.hexdigest()


def sampled_weights(pipe: Any) -> tuple[float, ...]:
    """The middle weight of each of up to 64 tensors of the denoisers, spread over all of them; three digits each."""
    tensors = [
        tensor
        for denoiser in _denoisers(pipe).values()
        for _, tensor in sorted(denoiser.state_dict().items())
        if tensor.is_floating_point() and tensor.numel()
    ]
    chosen = tensors[:: max(1, len(tensors) // _SAMPLES)][:_SAMPLES]
    return tuple(float(f"{float(tensor.flatten()[tensor.numel() // 2]):.2e}") for tensor in chosen)


def _denoisers(pipe: Any) -> dict[str, Any]:
    from fastdiff.anatomy import anatomy

    return anatomy(pipe).denoisers


def _alike(here: tuple[float, ...], there: tuple[float, ...]) -> bool:
    """Equal up to what bfloat16 and float16 round: 8 binary digits, and nothing below 1e-7."""
    return len(here) == len(there) and all(
        abs(one - other) <= 2e-2 * max(abs(one), abs(other)) + 1e-7 for one, other in zip(here, there, strict=True)
    )


def _plain(config: Any) -> dict[str, Any]:
    hidden = {"_name_or_path", "_diffusers_version", "_use_default_values", "_class_name"}
    found = dict(config) if not hasattr(config, "__dict__") or hasattr(config, "keys") else vars(config)
    return {key: str(value) for key, value in found.items() if key not in hidden}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
