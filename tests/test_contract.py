"""What every acceleration is held to, on every family it can act on. Listed in `fastdiff.plan.MEMBERS` is joined in."""

import inspect
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.acceleration import STAGES, NotEngaged
from fastdiff.anatomy import anatomy, capture
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.hooks import RemovalOrder
from fastdiff.miniature.families import FAMILIES, family
from fastdiff.plan import MEMBERS, member
from fastdiff.runtime.compile import Compile
from tests.members import EXAMPLES, SIZE, STEPS

ALL = [(name, kind, example) for name in FAMILIES for kind in MEMBERS for example in EXAMPLES.get(kind, ("default",))]
# tracing takes seconds where a run takes milliseconds, so compilation is tried on the smallest family only
CASES = [case for case in ALL if case[1] != "Compile" or case[0] == "flux"]
everywhere = pytest.mark.parametrize(("name", "kind", "example"), CASES)
# one UNet and one transformer, for what does not depend on how a pipeline calls its denoiser
on_two = pytest.mark.parametrize(("name", "kind", "example"), [case for case in CASES if case[0] in ("sd", "flux")])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small only lose by waiting for a second thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _pipe(name: str) -> Any:
    """One pipeline a family for the whole file: that it can be shared is part of what is tested."""
    pipe = family(name)
    pipe.set_progress_bar_config(disable=True)
    run(pipe)  # a plain call leaves diffusers' own marks on the modules
    return pipe


def _acceleration(pipe: Any, kind: str, example: str) -> Any:
    make = EXAMPLES.get(kind, {}).get(example)
    return make(pipe) if make else member(kind)()


def _able(name: str, kind: str, example: str) -> tuple[Any, Any]:
    pipe = _pipe(name)
    one = _acceleration(pipe, kind, example)
    verdict = one.supports(pipe)
    # what needs several ranks is held to this in tests/parallel, on virtual ones
    if not verdict or verdict.reason.startswith("one rank"):
        pytest.skip(f"refused: {verdict.reason}")
    return pipe, one


def run(pipe: Any, prompt: Any = "a red circle", seed: int = 0, **settings: Any) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1]."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    kind = pipe.__call__
    given = {
        "max_sequence_length": 24,
        "use_resolution_binning": False,
        "clean_caption": False,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": STEPS,
    }
    known = inspect.signature(kind).parameters
    given = {key: value for key, value in given.items() if key in known}
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    output = pipe(prompt=prompts, generator=generators, output_type="pt", **{**given, **settings})
    return output.images.clone()


def at_step(pipe: Any, step: int, action: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments that make a call of the pipeline do `action(running pipeline)` after a step, or after all (-1)."""

    def new(running: Any, index: int, timestep: Any, tensors: dict) -> dict:
        if step in (-1, index):
            action(running)
        return {}

    def old(index: int, timestep: Any, latents: Any) -> None:
        if step in (-1, index):
            action(pipe)

    modern = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    return {"callback_on_step_end": new} if modern else {"callback": old, "callback_steps": 1}


def marks(pipe: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of the pipeline and of all its modules, by identity of the value."""
    found = {"": _attributes(pipe)}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{path}": _attributes(module) for path, module in part.named_modules()}
    return found


def _attributes(owner: Any) -> dict[str, Any]:
    per_call = ("_guidance", "_num_timesteps", "_interrupt", "_current", "_joint", "_clip", "_cross", "_denoising")
    plain = {key: id(value) for key, value in vars(owner).items() if not key.startswith(per_call)}
    stores = {
        f"{store}.{key}": (id(value), value.data_ptr() if isinstance(value, torch.Tensor) else 0)
        for store in ("_parameters", "_buffers", "_modules")
        for key, value in vars(owner).get(store, {}).items()
    }
    return {**plain, **stores, "class": id(type(owner))}


@everywhere
def test_refusal_has_a_reason_and_changes_nothing(name: str, kind: str, example: str):
    pipe = _pipe(name)
    one = _acceleration(pipe, kind, example)
    before = marks(pipe)
    verdict = one.supports(pipe)
    assert marks(pipe) == before
    assert one.stage in STAGES
    assert one.exact or one.bound
    if not verdict:
        assert len(verdict.reason) > 20
        with pytest.raises(fastdiff.Unsupported, match=kind):
            fastdiff.accelerate(pipe, one)
        assert marks(pipe) == before


@everywhere
def test_says_that_it_engaged_and_is_removed_bit_for_bit(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    plain, before = run(pipe), marks(pipe)
    with fastdiff.accelerate(pipe, one, strict=True) as handle:
        first = run(pipe)
        second = run(pipe)
        row = handle.report().rows[0]
        assert kind in str(handle.report())
    assert row.seen > 0
    assert row.accelerated > 0
    assert not row.misses
    assert torch.equal(first, second)
    assert marks(pipe) == before
    assert torch.equal(run(pipe), plain)
    if one.exact:
        torch.testing.assert_close(first, plain, rtol=0, atol=1e-4)
    else:
        assert not torch.equal(first, plain)
    handle.remove()  # again: nothing happens
    assert marks(pipe) == before


@everywhere
def test_nested_and_threaded_requests_equal_solo_ones(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    with fastdiff.accelerate(pipe, one):
        solo = [run(pipe), run(pipe, "a blue square", 7)]
        inner = []
        outer = run(pipe, **at_step(pipe, 2, lambda running: inner.append(run(pipe, "a blue square", 7))))
        assert torch.equal(outer, solo[0])
        assert torch.equal(inner[0], solo[1])
        together = _in_lockstep(pipe, [("a red circle", 0), ("a blue square", 7)])
    assert torch.equal(together[0], solo[0])
    assert torch.equal(together[1], solo[1])


def _in_lockstep(pipe: Any, jobs: list[tuple[str, int]]) -> list[Any]:
    barrier = threading.Barrier(len(jobs), timeout=60)
    results: list[Any] = [None] * len(jobs)

    def work(place: int) -> None:
        try:
            results[place] = run(pipe, *jobs[place], **at_step(pipe, -1, lambda running: barrier.wait()))
        except BaseException as error:
            results[place] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


class Stop(Exception):
    pass


@on_two
def test_exceptions_and_interrupts_leave_nothing_behind(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)

    def fail(running: Any) -> None:
        raise Stop

    def interrupt(running: Any) -> None:
        running._interrupt = True

    with fastdiff.accelerate(pipe, one) as handle:
        whole = run(pipe)
        with pytest.raises(Stop):
            run(pipe, "a blue square", **at_step(pipe, 2, fail))
        assert handle._requests.current() is None
        assert handle._requests.bytes_held == 0
        assert torch.equal(run(pipe), whole)
        run(pipe, "a blue square", **at_step(pipe, 2, interrupt))
        assert torch.equal(run(pipe), whole)


def _rounds(one: Any) -> bool:
    """True for what rounds as it computes: the last bit of an input then moves a whole step now and then."""
    return getattr(one, "dtype", None) == "bfloat16" or type(one).__name__ == "W8A8"


@on_two
def test_a_row_does_not_depend_on_its_batch_mates(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    prompts = ["a red circle", "a blue square", "a large green triangle"]
    with fastdiff.accelerate(pipe, one):
        together = run(pipe, prompts)
        alone = [run(pipe, prompt, place) for place, prompt in enumerate(prompts)]
    tolerance = 0.05 if _rounds(one) else 2e-4
    for row, image in enumerate(alone):
        torch.testing.assert_close(together[row : row + 1], image, rtol=0, atol=tolerance)


@on_two
def test_another_prompt_size_batch_and_step_count_just_work(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    settings = [
        {"prompt": "a blue square"},
        {"height": 2 * SIZE, "width": SIZE},
        {"prompt": ["a blue square", "a red circle"]},
        {"num_inference_steps": STEPS + 2},
        {},
    ]
    fresh = []
    for changed in settings:
        with fastdiff.accelerate(pipe, () if one.exact else one):
            fresh.append(run(pipe, **changed))
    with fastdiff.accelerate(pipe, one):
        for changed, expected in zip(settings, fresh, strict=True):
            torch.testing.assert_close(run(pipe, **changed), expected, rtol=0, atol=1e-4)


@everywhere
def test_batched_and_separate_guidance_agree(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    if anatomy(pipe).guidance != "batched":
        pytest.skip("this pipeline has no batched guidance")
    denoiser, args, kwargs = capture(pipe, SIZE, SIZE)
    halves = [(_half(args, row), _half(kwargs, row)) for row in range(2)]
    generator = torch.Generator().manual_seed(0)
    drift = [0.05 * torch.randn(1, generator=generator).item() for _ in range(STEPS)]
    with fastdiff.accelerate(pipe, one) as handle, torch.no_grad():
        with handle.request():
            batched = [_sample(denoiser(*_moved(args, by), **_moved(kwargs, by))) for by in drift]
        with handle.request():
            separate = [
                torch.cat([_sample(denoiser(*_moved(a, by), **_moved(k, by))) for a, k in halves]) for by in drift
            ]
    tolerance = 0.05 if _rounds(one) else 1e-4
    for one_call, two_calls in zip(batched, separate, strict=True):
        torch.testing.assert_close(one_call, two_calls, rtol=0, atol=tolerance * one_call.abs().max().item())


def _half(value: Any, row: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[row : row + 1] if value.dim() and len(value) == 2 else value
    if isinstance(value, dict):
        return {key: _half(item, row) for key, item in value.items()}
    return tuple(_half(item, row) for item in value) if isinstance(value, tuple) else value


def _moved(value: Any, by: float) -> Any:
    """Move latents, the only four-dimensional input, as a sampler would."""
    if isinstance(value, torch.Tensor):
        return value + by if value.dim() == 4 else value
    if isinstance(value, dict):
        return {key: _moved(item, by) for key, item in value.items()}
    return tuple(_moved(item, by) for item in value) if isinstance(value, tuple) else value


def _sample(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "example"), [case for case in CASES if case[0] == "flux"])
def test_compiles_without_graph_breaks_or_says_why_not(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    if kind == "Compile":
        pytest.skip("the other tests compile already")
    with fastdiff.accelerate(pipe, one):
        expected = run(pipe)
    before = marks(pipe)
    with fastdiff.accelerate(pipe, one):
        verdict = Compile(backend="eager").supports(pipe)
    if not verdict:
        assert "graph" in verdict.reason
        with pytest.raises(fastdiff.Unsupported, match="graph"):
            fastdiff.accelerate(pipe, [one, Compile(backend="eager")])
        assert marks(pipe) == before
        return
    with fastdiff.accelerate(pipe, [one, Compile(backend="eager")]) as handle:
        for _ in range(2):  # what is kept from call to call acts from the second on
            torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-4)
        rows = {row.name: row for row in handle.report().rows}
    assert rows["Compile"].accelerated == rows["Compile"].seen > 0
    assert rows[kind].accelerated > 0
    assert marks(pipe) == before


@on_two
def test_what_was_changed_later_is_removed_first(name: str, kind: str, example: str):
    pipe, one = _able(name, kind, example)
    before = marks(pipe)
    handle = fastdiff.accelerate(pipe, one)
    denoiser = anatomy(pipe).denoiser
    covered = denoiser.__dict__.get("forward")
    if covered is None:
        handle.remove()
        pytest.skip("changes no denoiser")
    denoiser.forward = lambda *args, **kwargs: covered(*args, **kwargs)
    during = marks(pipe)
    with pytest.raises(RemovalOrder, match="undo the later change first"):
        handle.remove()
    assert marks(pipe) == during
    denoiser.__dict__["forward"] = covered
    handle.remove()
    assert marks(pipe) == before


def test_strict_raises_when_nothing_was_reused():
    pipe = _pipe("flux")
    engaged = pytest.raises(NotEngaged, match="DiffusersCache accelerated none of 6 calls")
    with fastdiff.accelerate(pipe, DiffusersCache(threshold=0.0), strict=True), engaged:
        run(pipe)
    with fastdiff.accelerate(pipe, DiffusersCache(threshold=0.0)) as handle:
        run(pipe)
        assert "did not engage: DiffusersCache accelerated none of 6" in str(handle.report())
