"""A ControlNet on another rank, awaited only where its residuals are added (SwiftDiffusion's ControlNet as a service,
Li et al. 2024, arXiv 2407.02031).

The denoiser's encoder does not need the residuals, so both run at the same time. The numbers are those of a local
ControlNet, bit for bit.
"""

import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.hooks import Hooks
from fastdiff.parallel.communicator import Communicator, Pending, current

_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@dataclass(frozen=True)
class RemoteControlNet(Acceleration):
    """Have the pipeline's ControlNet computed by another rank, which runs `serve(pipe.controlnet, communicator)`.

    Removing it (`handle.remove()`, or leaving the `with` block) tells the other rank to end.

    Args:
        rank: the rank that serves.
    """

    stage: ClassVar[str] = "devices"

    rank: int = 1

    def __post_init__(self):
        check_number(type(self).__name__, "rank", self.rank, 0, whole=True)

    @property
    def exact(self) -> bool:
        """Bit-equal on equal devices."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        if getattr(pipe, "controlnet", None) is None:
            return Verdict(False, "this pipeline has no ControlNet")
        communicator = current()
        if communicator.size == 1:
            return Verdict(True, "one rank: nothing was installed; launch another that runs serve()")
        if self.rank >= communicator.size or self.rank == communicator.rank:
            return Verdict(False, f"rank {self.rank} cannot serve rank {communicator.rank} of {communicator.size}")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        communicator = current()
        if communicator.size == 1:
            hooks.counter.expects = "nothing"
            return
        client = _Client(communicator, self.rank, hooks)
        hooks.wrap(pipe.controlnet, "forward", client)
        hooks.on_undo(client.close)


def serve(controlnet: Any, communicator: Communicator, client: int = 0) -> int:
    """Compute `controlnet` for rank `client` until it is done; return how many calls were served."""
    link, calls = _Link(communicator, client), 0
    try:
        while (request := link.receive()) is not None:
            args, kwargs = request
            with torch.no_grad():
                link.send(_plain(controlnet(*args, **kwargs)))
            calls += 1
    except BaseException as error:
        communicator.fail(error)
        raise
    communicator.drain()
    return calls


class _Link:
    """Trees of tensors and plain values to and from one other rank. A tensor that did not change is not sent again."""

    def __init__(self, communicator: Communicator, peer: int):
        self.communicator = communicator
        self.peer = peer
        self.sent: list[tuple[Tensor, int]] = []
        self.kept: list[Tensor] = []
        self.leaving: list[Pending] = []

    def send(self, tree: Any) -> None:
        """Send a tree; None says that nothing more will come."""
        tensors: list[Tensor] = []
        skeleton = _strip(tree, tensors)
        fresh = [number for number, tensor in enumerate(tensors) if not self._known(number, tensor)]
        self.sent = [(tensor, _version(tensor)) for tensor in tensors]
        described = [(tuple(tensors[number].shape), _DTYPES.index(tensors[number].dtype)) for number in fresh]
        header = torch.frombuffer(bytearray(pickle.dumps((skeleton, fresh, described))), dtype=torch.uint8)
        payload = _bytes_of([tensors[number] for number in fresh])
        lengths = torch.tensor([len(header), len(payload)])
        body = torch.cat((header, payload))
        while self.leaving:
            self.leaving.pop().wait()
        self.leaving = [
            self.communicator.exchange("controlnet", {self.peer: part}, {}, part) for part in (lengths, body)
        ]

    def receive(self) -> Any:
        """Wait for a tree."""
        return self.finish(self.begin())

    def begin(self) -> Pending:
        """Start to wait for a tree."""
        return self.communicator.exchange("controlnet", {}, {self.peer: (2,)}, torch.zeros(2, dtype=torch.int64))

    def finish(self, lengths: Pending) -> Any:
        """Wait for a tree that was begun."""
        head, payload = (int(length) for length in lengths.wait()[self.peer])
        like = torch.zeros(1, dtype=torch.uint8)
        body = self.communicator.exchange("controlnet", {}, {self.peer: (head + payload,)}, like).wait()[self.peer]
        skeleton, fresh, described = pickle.loads(body[:head].numpy().tobytes())
        offset = head
        for number, (shape, kind) in zip(fresh, described, strict=True):
            size = torch.Size(shape).numel() * _DTYPES[kind].itemsize
            tensor = body[offset : offset + size].clone().view(_DTYPES[kind]).view(shape)
            self.kept[number : number + 1] = [tensor]
            offset += size
        return _fill(skeleton, self.kept)

    def _known(self, number: int, tensor: Tensor) -> bool:
        if number >= len(self.sent) or tensor.is_inference():
            return False
        before, version = self.sent[number]
        return before is tensor and version == _version(tensor)


class _Client:
    """Stands in for a ControlNet's forward: sends the inputs at once, answers with residuals that are on their way."""

    def __init__(self, communicator: Communicator, peer: int, hooks: Hooks):
        self.communicator = communicator
        self.link = _Link(communicator, peer)
        self.hooks = hooks
        self.shapes: dict[Any, Any] = {}
        self.answer: _Answer | None = None

    def __call__(self, inner: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        from diffusers.models.controlnets.controlnet import ControlNetOutput

        # an answer nobody asked for must still be read before the next one
        if self.answer is not None:
            self.answer.get()
        self.link.send((args, {**kwargs, "return_dict": False}))
        self.answer = _Answer(self.link)
        shape = next(part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)).shape
        if shape not in self.shapes:
            # how many residuals and of what shape is learnt from the first answer
            self.shapes[shape] = _map(self.answer.get(), lambda tensor: torch.empty_like(tensor, device="meta"))
        down, middle = _later(self.shapes[shape], self.answer)
        self.hooks.counter.count(True)
        return ControlNetOutput(down, middle) if return_dict else (down, middle)

    def close(self) -> None:
        """Tell the other rank that this was all."""
        if self.communicator.broken:
            return
        if self.answer is not None:
            self.answer.get()
        self.link.send(None)
        self.communicator.drain()


class _Answer:
    """A tree of tensors on its way."""

    def __init__(self, link: _Link):
        self.link = link
        self.pending = link.begin()
        self.tree: Any = None

    def get(self) -> Any:
        if self.tree is None:
            self.tree = self.link.finish(self.pending)
        return self.tree


class _Later(Tensor):
    """A tensor whose shape is known and whose values are fetched by the first operation that needs them."""

    fetch: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # asking for shape or dtype fetches nothing
        if getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        resolve = lambda value: value.__dict__["fetch"]() if isinstance(value, _Later) else value  # noqa: E731
        return func(*_map(args, resolve), **_map(kwargs or {}, resolve))


def _later(shapes: Any, answer: _Answer) -> Any:
    numbers = iter(range(1_000_000))

    def promise(shape: Tensor) -> Tensor:
        number = next(numbers)
        later: Any = Tensor._make_subclass(_Later, shape)
        later.__dict__["fetch"] = lambda: _tensors(answer.get())[number]
        return later

    return _map(shapes, promise)


def _map(tree: Any, change: Any) -> Any:
    """Apply `change` to every tensor of nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_map(value, change) for value in tree)
    return tree


@dataclass(frozen=True)
class _Place:
    number: int


def _strip(tree: Any, tensors: list[Tensor]) -> Any:
    def take(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    return _map(tree, take)


def _fill(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, _Place):
        return tensors[tree.number]
    if isinstance(tree, dict):
        return {key: _fill(value, tensors) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_fill(value, tensors) for value in tree)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _strip(tree, found)
    return found


def _plain(output: Any) -> Any:
    return tuple(output) if isinstance(output, tuple) else output.to_tuple()


def _bytes_of(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8).cpu() for tensor in tensors])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
