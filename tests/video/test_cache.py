"""The ring of keys and values, on random ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastdiff.anatomy_wan import WanShape
from fastdiff.video import rotary
from fastdiff.video.cache import KeyValueCache

LAYERS, TOKENS, HEADS, WIDTH = 2, 3, 2, 12
SHAPE = WanShape(LAYERS, HEADS, WIDTH, (1, 1, 1), 4, (4, 4, 4))


def cache(frames: int, rows: int = 1, **options) -> KeyValueCache:
    given = {"dtype": torch.float64, **options}
    return KeyValueCache(LAYERS, rows, frames, TOKENS, HEADS, WIDTH, **given)


def draw(frames: int, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values float64 ``[L, B, F, S, N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, LAYERS, rows, frames, TOKENS, HEADS, WIDTH)
    keys, values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return keys, values


def write(ring: KeyValueCache, keys: Tensor, values: Tensor, rows: list[int] | None = None) -> None:
    layout = ring.layout(keys.shape[2], rows)
    for layer in range(LAYERS):
        ring.stage(layer, keys[layer], values[layer])
    ring.commit(layout)


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """``[B, S, N, D]`` each; frames flattened into tokens."""
    mask = None if seen is None else seen.repeat_interleave(TOKENS, 1)[:, None, None]
    query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)


def through(ring: KeyValueCache, query: Tensor, layer: int = 0) -> Tensor:
    """One attention over the ring alone, the query one frame later than what it holds."""
    layout = ring.layout(1)
    keys, values = ring.read(layer, layout)
    keys = rotary.turn(keys, rotary.in_time(SHAPE, layout.held, torch.float64))
    turned = rotary.turn(query[:, None], rotary.in_time(SHAPE, layout.new, torch.float64)).flatten(1, 2)
    return attend(turned, keys.flatten(1, 2), values.flatten(1, 2), layout.seen)


def directly(query: Tensor, keys: Tensor, values: Tensor, layer: int = 0, first: int = 0) -> Tensor:
    """The same over a plain list of frames, oldest first."""
    count = keys.shape[2]
    place = torch.arange(first, first + count + 1)[None]
    times = rotary.in_time(SHAPE, place, torch.float64)
    keys = rotary.turn(keys[layer], times[:, :count])
    turned = rotary.turn(query[:, None], times[:, count:]).flatten(1, 2)
    return attend(turned, keys.flatten(1, 2), values[layer].flatten(1, 2))


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(2, 6),
    sinks=st.integers(0, 2),
    chunks=st.lists(st.integers(1, 2), min_size=1, max_size=9),
    shift=st.integers(-3, 50),
)
def test_ring_is_the_sinks_and_the_last_frames(capacity: int, sinks: int, chunks: list[int], shift: int) -> None:
    sinks = min(sinks, capacity - 2)
    ring = cache(capacity, sinks=sinks)
    total = sum(chunks)
    keys, values = draw(total)
    done = 0
    for count in chunks:
        part = slice(done, done + count)
        write(ring, keys[:, :, part], values[:, :, part])
        done += count
    held = min(total, capacity)
    assert ring.held(0) == held
    kept = list(range(total)) if total <= capacity else [*range(sinks), *range(total - capacity + sinks, total)]
    assert sorted(ring.stamps[ring.stamps >= 0].tolist()) == kept
    query = draw(1, seed=1)[0][0, :, 0]
    for layer in range(LAYERS):
        expected = directly(query, keys[:, :, kept], values[:, :, kept], layer, first=shift)
        torch.testing.assert_close(through(ring, query, layer), expected, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), written=st.integers(1, 9))
def test_order_of_slots_is_irrelevant(order: list[int], written: int) -> None:
    ring = cache(4)
    keys, values = draw(written)
    for frame in range(written):
        write(ring, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    query = draw(1, seed=1)[0][0, :, 0]
    before = through(ring, query)
    for store in (ring.keys, ring.values):
        store.values.copy_(store.values[:, :, order].clone())
    ring.stamps.copy_(ring.stamps[:, order].clone())
    torch.testing.assert_close(through(ring, query), before, rtol=0, atol=1e-12)


def test_relative_positions_stay_within_the_cache_and_absolute_ones_grow() -> None:
    relative, absolute = cache(4, sinks=1), cache(4, sinks=1, positions="absolute")
    keys, values = draw(60)
    for frame in range(60):
        for ring in (relative, absolute):
            write(ring, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    assert sorted(relative.layout(1).held[0].tolist()) == [0, 1, 2, 3] and relative.layout(1).new.item() == 4
    assert sorted(absolute.layout(1).held[0].tolist()) == [0, 57, 58, 59] and absolute.layout(1).new.item() == 60


def test_rows_do_not_know_each_other() -> None:
    both, alone = cache(3, rows=3), cache(3)
    keys, values = draw(5, rows=1)
    other = draw(5, rows=2, seed=9)
    for frame in range(5):
        part = slice(frame, frame + 1)
        write(both, keys[:, :, part], values[:, :, part], [1])
        if frame % 2:
            write(both, other[0][:, :, part], other[1][:, :, part], [2, 0])
        write(alone, keys[:, :, part], values[:, :, part])
    assert torch.equal(both.keys.values[:, 1], alone.keys.values[:, 0])
    assert torch.equal(both.stamps[1], alone.stamps[0]) and [both.held(i) for i in range(3)] == [2, 3, 2]
    both.clear([1])
    assert [both.held(i) for i in range(3)] == [2, 0, 2] and both.stamps[1].max() == -1


def test_a_sink_that_lost_its_likeness_goes() -> None:
    ring = cache(4, sinks=2, evict_below=0.2)
    keys, values = (torch.ones_like(part) for part in draw(8))
    keys[:, :, 6:], values[:, :, 6:] = -1, -1
    for frame in range(6):
        write(ring, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    assert set(ring.stamps[0].tolist()) == {0, 1, 4, 5}
    write(ring, keys[:, :, 6:7], values[:, :, 6:7])
    assert set(ring.stamps[0].tolist()) == {6, 1, 4, 5}
    write(ring, keys[:, :, 7:8], values[:, :, 7:8])
    assert set(ring.stamps[0].tolist()) == {6, 7, 4, 5}
    never = cache(4, sinks=2, evict_below=-1.0)
    for frame in range(8):
        write(never, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    assert set(never.stamps[0].tolist()) == {0, 1, 6, 7}


def test_the_choice_of_slots_never_asks_the_device() -> None:
    """On a device without data any question about a value raises; writing and reading must still work."""
    ring = cache(3, rows=2, sinks=1, evict_below=0.5, device="meta", dtype=torch.float32)
    for _ in range(5):
        layout = ring.layout(1)
        for layer in range(LAYERS):
            new = torch.empty(2, 1, TOKENS, HEADS, WIDTH, device="meta")
            ring.stage(layer, new, new)
        ring.commit(layout, torch.empty(2, 4, 1, 2, 2, device="meta"), torch.empty(2, 1, device="meta"))
    assert ring.layout(1).seen is None and ring.remembered() is not None


def test_storage_never_moves() -> None:
    ring = cache(3, sinks=1, storage="int8")
    tensors = (ring.keys.values, ring.keys.scales, ring.values.values, ring.stamps, ring.counts)
    places = [tensor.data_ptr() for tensor in tensors if tensor is not None]
    size = ring.nbytes
    keys, values = draw(9)
    for frame in range(9):
        write(ring, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    assert [tensor.data_ptr() for tensor in tensors if tensor is not None] == places and ring.nbytes == size


@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.5 / 127), ("float8", 0.5 / 8)])
def test_one_byte_storage_keeps_each_value_within_half_a_step(storage: str, bound: float) -> None:
    whole, small = cache(4), cache(4, storage=storage)
    keys, values = draw(6)
    for ring in (whole, small):
        for frame in range(6):
            write(ring, keys[:, :, frame : frame + 1], values[:, :, frame : frame + 1])
    assert small.keys.nbytes < whole.keys.nbytes / 4
    for one, other in zip(whole.read(1, whole.layout(1)), small.read(1, small.layout(1)), strict=True):
        largest = one.abs().amax(-1, keepdim=True)
        assert ((one - other).abs() <= bound * largest * 1.01).all() and not torch.equal(one, other)


def test_a_failed_forward_leaves_the_ring_as_it_was() -> None:
    ring = cache(3)
    keys, values = draw(2)
    write(ring, keys[:, :, :1], values[:, :, :1])
    before = ring.keys.values.clone(), ring.stamps.clone()
    layout = ring.layout(1)
    ring.stage(0, keys[0, :, 1:], values[0, :, 1:])
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        ring.commit(layout)
    assert torch.equal(ring.keys.values, before[0]) and torch.equal(ring.stamps, before[1]) and ring.held(0) == 1
    write(ring, keys[:, :, 1:], values[:, :, 1:])
    assert ring.held(0) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"frames": 3, "sinks": 3}, "sinks=3"),
        ({"frames": 3, "storage": "int4"}, "'int8', 'float8'"),
        ({"frames": 3, "positions": "learned"}, "'relative', 'absolute'"),
        ({"frames": 3, "evict_below": 2.0}, "evict_below=2.0"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache(**options)


def test_chunks_longer_than_the_ring_and_strange_rows_are_refused() -> None:
    ring = cache(3, rows=2, sinks=1)
    with pytest.raises(ValueError, match="3 frames at a time do not fit a cache of 3 with 1 sinks"):
        ring.layout(3)
    with pytest.raises(ValueError, match="not different rows of a cache of 2"):
        ring.layout(1, [0, 5])
