"""Text embeddings kept by the content of what they were made from.

The key is the text and every other argument of `encode_prompt`, the weights of the text encoders and their adapters;
never an address, which a later tensor may come to have. Streams ask for the same prompt at every update and batch jobs
repeat the negative prompt, so this is often the whole cost of the text encoders.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.hooks import Hooks

_SCALARS = (str, int, float, bool, bytes, type(None))
_PROBE = 256


class _Opaque(Exception):
    """A value that has no content to go by."""


@dataclass(frozen=True)
class PromptCache(Acceleration):
    """Call the text encoders once per distinct prompt. Exact.

    Args:
        max_bytes: embeddings kept, least recently used dropped first.

    A prompt is encoded afresh after any change of the text encoders: weights written in place, a LoRA loaded, fused or
    rescaled, tokens added. To notice, every call reads all their weights once, which is what encoding would do before
    computing anything; a change of less than about one part in a million of one weight goes unnoticed, as it would in
    the embeddings. Calls with embeddings, images or other objects among the arguments pass through.
    """

    stage: ClassVar[str] = "steps"
    max_bytes: int = 256 * 2**20

    def __post_init__(self):
        check_number("PromptCache", "max_bytes", self.max_bytes, low=1, whole=True)

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Needs a pipeline that encodes its prompts in a method of its own."""
        if not callable(getattr(pipe, "encode_prompt", None)):
            return Verdict(False, f"{type(pipe).__name__} has no encode_prompt; there is no text to keep")
        if not anatomy(pipe).text_encoders:
            return Verdict(False, "no text encoder is loaded; the pipeline is given embeddings, which need no cache")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand in front of `encode_prompt`."""
        shelf = _Shelf(self.max_bytes)
        hooks.counter.expects = "seen"
        hooks.counter.held = lambda: shelf.bytes_held

        def around(inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                key = (_content(args), _content(kwargs), _encoders(pipe))
            except _Opaque:
                hooks.counter.count(False)
                return inner(*args, **kwargs)
            kept = shelf.get(key)
            hooks.counter.count(kept is not None)
            if kept is not None:
                return _copied(kept)
            fresh = inner(*args, **kwargs)
            try:
                shelf.put(key, _copied(fresh))
            except _Opaque:
                hooks.counter.note("encode_prompt returned something other than tensors, which is not kept")
            return fresh

        hooks.override(pipe, "encode_prompt", around)


class _Shelf:
    """Results by key, bounded in bytes, least recently used dropped first; safe across threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes_held = 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any) -> None:
        size = _size(value)
        with self._lock:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = (value, size)
            self.bytes_held += size
            while self.bytes_held > self.max_bytes:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.bytes_held -= dropped


def _content(value: Any) -> Any:
    """Return a hashable equal of nested plain values."""
    import torch

    if isinstance(value, _SCALARS):
        return type(value).__name__, value  # 1, 1.0 and True are equal and not the same argument
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_content(item) for item in value)
    if isinstance(value, dict):
        return "dict", tuple(sorted((str(key), _content(item)) for key, item in value.items()))
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    raise _Opaque


def _copied(value: Any) -> Any:
    """Copy nested tensors, so that neither side can write into the other's."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, _SCALARS):
        return value
    raise _Opaque


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return getattr(value, "nbytes", 0)


def _encoders(pipe: Any) -> tuple:
    """What the embeddings depend on beside the arguments: encoders, adapters and tokenizers."""
    parts = anatomy(pipe)
    encoders = tuple((name, _weights(module), _adapters(module)) for name, module in parts.text_encoders.items())
    tokenizers = tuple(
        (name, len(tokenizer), getattr(tokenizer, "model_max_length", 0), getattr(tokenizer, "padding_side", ""))
        for name, tokenizer in parts.tokenizers.items()
        if hasattr(tokenizer, "__len__")
    )
    return encoders, tokenizers


def _weights(module: Any) -> tuple:
    """A number per parameter that changes with its content; where only the device's copy is known, its version."""
    import torch

    if module.training:
        raise _Opaque  # dropout: no two encodings are equal
    content = []
    probes: dict[Any, Any] = {}
    with torch.no_grad():
        for parameter in module.parameters():
            data = parameter.detach()
            if type(data) is not torch.Tensor or data.is_meta:
                content.append((id(parameter), parameter._version))
                continue
            content.append((tuple(data.shape), str(data.dtype), _projection(data, probes)))
    return tuple(content)


def _projection(data: Any, probes: dict[Any, Any]) -> float:
    """Two fixed random projections, first of short rows in float32, then of the rows' values in float64."""
    import torch

    flat = data.reshape(-1)
    whole = flat.numel() // _PROBE * _PROBE
    rows = flat[:whole].view(-1, _PROBE)
    values = [rows.to(torch.float32) @ _probe(_PROBE, data.device, probes)] if whole else []
    values.append(flat[whole:].to(torch.float32))
    sums = torch.cat(values).to(torch.float64)
    return float(sums @ _probe(sums.numel(), data.device, probes).to(torch.float64))


def _probe(length: int, device: Any, probes: dict[Any, Any]) -> Any:
    import torch

    if (length, device) not in probes:
        generator = torch.Generator().manual_seed(length)
        probes[length, device] = torch.randn(length, generator=generator).to(device)
    return probes[length, device]


def _adapters(module: Any) -> tuple:
    """The state of LoRA layers that is not in parameters: which are active, at what strength, merged or not."""
    found = []
    for name, part in module.named_modules():
        scaling = getattr(part, "scaling", None)
        if isinstance(scaling, dict):
            active = tuple(getattr(part, "active_adapters", ()))
            flags = (bool(getattr(part, "disable_adapters", False)), bool(getattr(part, "merged", False)))
            found.append((name, tuple(sorted(scaling.items())), active, flags))
    return tuple(found)
