"""What a rollout is equal to, in float64 to the last sum, and what it is not."""

from typing import Any

import numpy as np
import pytest
import torch

from fastdiff_pipelines.rollout import Context, RolloutSession, RolloutSettings
from tests.pipelines.rollout.tiny import plain_model, rollout, video

EXACT: Any = {"rtol": 0.0, "atol": 1e-12}
PROMPT = ("a red circle",)


def latents(
    settings: RolloutSettings, context: Context, controls=None, chunks: int | None = 9, model=None
) -> torch.Tensor:
    session = RolloutSession(model or plain_model(), settings, context)
    return torch.cat([chunk.latents for chunk in session.run(controls, chunks)], dim=2)


@pytest.mark.parametrize("prompts", [PROMPT, ("a red circle", "a blue square")])
@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize(("steps", "chunk"), [(4, 1), (3, 2), (1, 1)])
def test_a_batched_rollout_is_a_sequential_one_with_a_cache_for_every_step(
    prompts, sampler, guidance_scale, steps: int, chunk: int
) -> None:
    options = {"sampler": sampler, "guidance_scale": guidance_scale, "steps": steps, "chunk": chunk}
    context = Context(frames=4, sinks=1, kind="steps")
    batched, sequential = (
        latents(RolloutSettings(prompts, batched=flag, **options), context) for flag in (True, False)
    )
    assert batched.shape == (len(prompts), 4, 9 * chunk, 2, 2)
    torch.testing.assert_close(batched, sequential, **EXACT)


def test_the_same_holds_for_video_to_video() -> None:
    controls, context = video(14), Context(frames=3, kind="steps")
    made = [
        latents(RolloutSettings(PROMPT, batched=flag, noise="warped"), context, controls, None)
        for flag in (True, False)
    ]
    torch.testing.assert_close(made[0], made[1], **EXACT)


def test_it_is_no_rollout_whose_chunks_see_finished_ones() -> None:
    settings = RolloutSettings(PROMPT, batched=False)
    steps, last, clean = (latents(settings, Context(kind=kind)) for kind in ("steps", "last", "clean"))
    torch.testing.assert_close(steps[:, :, :1], clean[:, :, :1], **EXACT)
    for one, other in ((steps, last), (steps, clean), (last, clean)):
        assert (one - other)[:, :, 1:].abs().max() > 0.01


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_rolling_rollout_is_one_block_causal_forward_over_everything_made_so_far(chunk: int) -> None:
    """Each call, computed again without a cache over all finished chunks and those in flight, gives the same."""
    from fastdiff_pipelines.rollout.levels import Levels

    steps, window, total = 3, 4, 7
    settings = RolloutSettings(PROMPT, steps=steps, chunk=chunk)
    found = latents(settings, Context(frames=window), chunks=total)
    model = plain_model()
    session = RolloutSession(model, settings, Context(frames=window))
    text, noises = session._memory.texts[0], [session._noise.chunk(i, chunk, steps) for i in range(total)]
    (sigmas,) = Levels(steps, 3.0)(torch.ones(1)).tolist()
    done: list[torch.Tensor] = []
    flying: list[tuple[int, int, torch.Tensor]] = []
    for call in range(total + steps - 1):
        if call < total:
            flying.append((call, 0, noises[call][0]))
        x = torch.cat([*done, *(state for _, _, state in flying)], dim=2)
        told = [0.0] * (chunk * len(done)) + [1000 * sigmas[step] for _, step, _ in flying for _ in range(chunk)]
        empty = model.causal.cache(1, window, 2, 2)
        velocity = model.causal(x, torch.tensor([told], dtype=torch.float64), text, cache=empty, chunk=chunk,
                                window=window)  # fmt: skip
        moved = []
        for (number, step, state), part in zip(flying, velocity.split(chunk, dim=2)[len(done) :], strict=True):
            clean = state - sigmas[step] * part
            if step + 1 == steps:
                done.append(clean)
            else:
                then = sigmas[step + 1]
                moved.append((number, step + 1, (1 - then) * clean + then * noises[number][step + 1]))
        flying = moved
    torch.testing.assert_close(found, torch.cat(done, dim=2), **EXACT)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_one_chunk_at_a_time_a_rolling_context_is_a_clean_one(level: float, guidance_scale: float) -> None:
    settings = RolloutSettings(PROMPT, batched=False, guidance_scale=guidance_scale)
    rolling, clean = (latents(settings, Context(kind=kind, level=level)) for kind in ("rolling", "clean"))
    torch.testing.assert_close(rolling, clean, **EXACT)


def test_denoiser_calls_of_a_batched_rollout() -> None:
    model = plain_model()
    latents(RolloutSettings(PROMPT, steps=4), Context(kind="steps"), chunks=6, model=model)
    assert model.causal.calls == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    model = plain_model()
    latents(RolloutSettings(PROMPT, steps=4), Context(kind="rolling"), chunks=6, model=model)
    assert model.causal.calls == [1, 2, 3, 4, 5, 5, 4, 3, 2]
    model = plain_model()
    latents(RolloutSettings(PROMPT, steps=4, batched=False), Context(kind="clean"), chunks=6, model=model)
    assert model.causal.calls == [1] * 30


def test_until_the_ring_is_full_its_size_does_not_matter() -> None:
    settings = RolloutSettings(PROMPT, batched=False)
    small, large = (latents(settings, Context(kind="clean", frames=frames)) for frames in (4, 20))
    torch.testing.assert_close(small[:, :, :5], large[:, :, :5], **EXACT)
    assert not torch.allclose(small[:, :, 5:], large[:, :, 5:])


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    context = Context()
    both = latents(RolloutSettings(("one", "other")), context)
    torch.testing.assert_close(both[:1], latents(RolloutSettings(("one",)), context), **EXACT)


def test_recaching_every_chunk_under_one_prompt_changes_nothing_before_the_ring_is_full() -> None:
    settings = RolloutSettings(PROMPT, batched=False)
    never, always = (latents(settings, Context(kind="clean", frames=4, recache_every=n)) for n in (0, 1))
    torch.testing.assert_close(always[:, :, :5], never[:, :, :5], **EXACT)


def test_a_new_prompt_makes_the_context_forget_the_old_one() -> None:
    """After the switch the session stands where one under the new prompt would, had it seen the same latents."""
    settings, context = RolloutSettings(("old",), batched=False), Context(kind="clean")
    switched = RolloutSession(plain_model(), settings, context)
    for _ in range(3):
        switched.generate()
    switched.update(prompt="new")
    (found,) = switched.generate()
    fresh = RolloutSession(plain_model(), RolloutSettings(("new",), batched=False), context)
    memory = fresh._memory
    inputs, told = switched._memory.cache.remembered() or pytest.fail("nothing is remembered")
    for frame in range(3):
        memory.velocity(inputs[:, :, frame : frame + 1], told[:, frame], [0], commit=True)
    fresh._number = 3
    (expected,) = fresh.generate()
    torch.testing.assert_close(found.latents, expected.latents, **EXACT)


def test_changing_steps_live_keeps_the_video_going() -> None:
    session = RolloutSession(plain_model(), RolloutSettings(PROMPT, steps=4), Context(kind="steps"))
    made = [chunk for _ in range(6) for chunk in session.generate()]
    session.update(steps=2)
    made += [chunk for _ in range(4) for chunk in session.generate()] + session.flush()
    assert [chunk.number for chunk in made] == list(range(10)) and session._memory.cache.rows == 2
    assert session._memory.cache.held(1) == 4
    assert [chunk.first_frame for chunk in made] == [0, *range(1, 36, 4)]


def test_the_real_transformer_too_in_single_precision() -> None:
    with rollout(context=Context(kind="steps")) as model:
        made = [
            np.concatenate(list(model("a red circle", chunks=7, batched=flag))).astype(int) for flag in (True, False)
        ]
    assert made[0].shape == (25, 16, 16, 3) and np.abs(made[0] - made[1]).max() <= 1
