"""What sparse attention promises on one layer: exact identities, the spot check, the schedule, wrong settings."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.attention.far import FAR, near
from fastdiff.attention.plug import Call, Moment
from fastdiff.attention.selection import SELECTORS
from fastdiff.attention.sparse import Memory, Run, SparseAttention
from fastdiff.hooks import Hooks, Requests
from fastdiff.miniature.families import family
from fastdiff_kernels.selection import top_k

SMALL: dict[str, Any] = dict(query_block=4, key_block=4, minimum_tokens=8, warm_up=1, refresh=0)


def call(step: int = 0, timestep: float = 500.0, seed: int = 0, request: Any = None, tokens: int = 64) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=generator)
    request = request or Requests().open()
    moment = Moment(request, "branch", step, 8, timestep, (1, 8, 8))
    return Call(q, k, v, 0.25, None, "layer", moment)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum() / b.abs().sum())


@pytest.mark.parametrize("name", ["merge", "ratio", "tracked"])
def test_frozen_inputs_give_the_full_result_again(name: str):
    kind: Any = FAR[name]
    one = call()
    output, lse = near(one, None)
    chosen = top_k(torch.rand(1, 2, 16, 16), 4, 4, 4)
    far = kind(**({} if name == "ratio" else {"wide": True}))
    far.full(one, chosen, output, lse)
    torch.testing.assert_close(far.sparse(one, chosen), output, rtol=0, atol=2e-6)
    if name != "ratio":
        far = kind()
        far.full(one, chosen, output, lse)
        assert relative(far.sparse(one, chosen), output) < 0.05  # e4m3


def test_the_ratio_is_a_share_and_grows_to_one():
    one = call()
    output, lse = near(one, None)
    far: Any = FAR["ratio"]()
    far.full(one, top_k(torch.rand(1, 2, 16, 16), 4, 4, 4), output, lse)
    assert ((far.share > 0) & (far.share <= 1)).all()
    chosen = top_k(torch.rand(1, 2, 16, 16), 16, 4, 4)
    far.full(one, chosen, output, lse)
    torch.testing.assert_close(far.share, torch.ones_like(far.share), rtol=0, atol=1e-6)
    assert far.residual.abs().max() < 1e-6
    far.sparse(one, chosen)
    assert far.share.max() == 1


def test_centroids_are_exact_where_blocks_are_constant():
    one = call()
    one.k, one.v = (x[:, :, ::4].repeat_interleave(4, 2) for x in (one.k, one.v))
    chosen = top_k(torch.rand(1, 2, 16, 16), 3, 4, 4)
    torch.testing.assert_close(FAR["centroid"]().sparse(one, chosen), near(one, None)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("select", [name for name in SELECTORS if name != "tiles"])
def test_all_blocks_are_dense_whatever_is_chosen(select: str, far: str):
    run = Run(SparseAttention(select=select, far=far, density=0.999, **SMALL), Hooks("test", Requests()))
    request = Requests().open()
    for step in range(3):
        one = call(step, seed=step, request=request)
        output = run.attend(one)
        assert output is not None
        torch.testing.assert_close(output, near(one, None)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("far", [name for name in FAR if name != "none"])
def test_what_stands_for_the_far_keys_beats_nothing_when_inputs_drift(far: str):
    errors = {}
    for name in ("none", far):
        run = Run(SparseAttention(far=name, density=0.25, **SMALL), Hooks("test", Requests()))
        request = Requests().open()
        run.attend(call(0, request=request))
        one = call(1, request=request)
        drift = torch.randn(3, *one.q.shape) * 0.05
        one.q, one.k, one.v = one.q + drift[0], one.k + drift[1], one.v + drift[2]
        output = run.attend(one)
        assert output is not None
        errors[name] = relative(output, near(one, None)[0])
    assert errors[far] < 0.9 * errors["none"], errors


def test_full_steps_come_when_the_schedule_says():
    run = Run(SparseAttention(density=0.25, **{**SMALL, "warm_up": 2, "refresh": 3}), Hooks("test", Requests()))
    request = Requests().open()
    engaged = []
    for step in range(9):
        one = call(step, seed=step, request=request)
        output = run.attend(one)
        assert output is not None
        exact = near(one, None)[0]
        engaged.append(one.moment.engaged)
        assert one.moment.engaged or torch.equal(output, exact)
    assert engaged == [False, False, True, True, False, True, True, False, True]
    assert "0.58 of all block pairs" in run.describe()


def test_the_spot_check_falls_back_loudly(caplog: pytest.LogCaptureFixture):
    settings = SparseAttention(density=0.07, far="none", check_every=2, check_limit=0.1, **SMALL)
    hooks = Hooks("test", Requests())
    run = Run(settings, hooks)
    request = Requests().open()
    outputs = [run.attend(call(step, seed=step, request=request)) for step in range(5)]
    assert [output is None for output in outputs] == [False, False, False, True, True]
    assert "fell back to exact attention in layer" in hooks.counter.misses[0]
    assert "fell back" in caplog.text
    # another request starts afresh
    assert run.attend(call(0)) is not None
    calm = Run(SparseAttention(density=0.9, far="tracked", check_every=1, check_limit=0.9, **SMALL), hooks)
    assert all(calm.attend(call(step, request=request)) is not None for step in range(4))


def test_far_parts_beyond_their_memory_are_centroids():
    # one layer's far part takes 64 rows of 2 heads of 16 channels, and a float32 a row
    room = 64 * 2 * (16 + 4)
    for limit, kinds in ((0, ["Tracked", "Tracked"]), (room, ["Tracked", "Centroid"]), (room - 1, ["Centroid"] * 2)):
        hooks = Hooks("test", Requests())
        run = Run(SparseAttention(far="tracked", far_bytes=limit, density=0.25, **SMALL), hooks)
        request = Requests().open()
        found = []
        for layer in ("first", "second"):
            one = call(0, request=request)
            for step in range(2):
                one = call(step, seed=step, request=request)
                one.layer = layer
                assert run.attend(one) is not None
            found.append(type(one.moment.state((run, layer), Memory).far).__name__)
        assert found == kinds
        assert len(hooks.counter.notes) == kinds.count("Centroid")


def test_a_budget_rules_by_layer_and_timestep():
    rows = (("layer", 0.0, 400.0, 0.5, "exact", "none"), ("layer", 400.0, 1000.0, 1.0, "int8", "none"))
    run = Run(SparseAttention(budget=rows, **SMALL), Hooks("test", Requests()))
    assert run.choice(call(timestep=100)) == (0.5, "exact", "none")
    assert run.choice(call(timestep=900)) == (1.0, "int8", "none")
    assert run.choice(call(timestep=2000)) is None
    plan = fastdiff.Plan([SparseAttention(budget=rows)])
    assert fastdiff.Plan.from_json(plan.to_json()) == plan


def test_tiles_are_fewer_at_both_ends_and_keep_their_mean():
    counts = [SELECTORS["tiles"](4, 4).choose(call(step), 0.375).blocks.shape[-1] for step in range(8)]
    assert counts == [4, 4, 8, 8, 8, 8, 4, 4]
    chosen = SELECTORS["near"](16, 16).choose(call(tokens=64), 0.5)
    assert chosen.blocks[0, 0].tolist() == [[0, 1], [0, 1], [1, 2], [2, 3]]


def test_a_window_over_the_whole_grid_is_dense_and_radial_ones_are_symmetric():
    for name in ("near", "radial"):
        chosen = SELECTORS[name](4, 4).choose(call(), 1.0)
        assert chosen.mask(16).all()
    one = call(tokens=64)
    one.moment.latents = (4, 4, 4)
    where = SELECTORS["radial"](4, 4).scores(one, None)[0, 0]
    torch.testing.assert_close(where, where.T)
    # the distance of a frame counts double with every frame
    rows = where[0].view(4, 4)
    assert (rows.diff(dim=0) < 0).all()


def test_the_first_block_and_those_next_in_order():
    chosen = SELECTORS["sink"](4, 4).choose(call(), 3 / 16)
    assert (chosen.blocks[..., 0] == 0).all()
    assert chosen.blocks[0, 0, 8].tolist() == [0, 7, 8]


def test_padded_keys_are_chosen_last():
    one = call()
    one.lengths = torch.tensor([20], dtype=torch.int32)
    for name in ("pooled", "antidiagonal", "near"):
        assert (SELECTORS[name](4, 4).choose(one, 5 / 16).blocks < 5).all()


@pytest.mark.parametrize("name", ["mass", "pattern", "pooled", "antidiagonal"])
def test_what_padding_holds_changes_no_choice(name: str):
    chosen = []
    for shift in (0.0, 9.0):
        one = call()
        one.lengths = torch.tensor([22], dtype=torch.int32)
        one.q[:, :, 22:] += shift
        one.k[:, :, 22:] -= shift
        _, lse = near(one, None)
        chosen.append(SELECTORS[name](4, 4).choose(one, 3 / 16, lse).blocks[:, :, :6])
    assert torch.equal(*chosen)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_block_is_chosen_once_and_in_order(name: str):
    one = call()
    _, lse = near(one, None)
    blocks = SELECTORS[name](4, 4).choose(one, 0.4, lse).blocks
    assert (blocks.diff(dim=-1) > 0).all()
    assert ((blocks >= 0) & (blocks < 16)).all()


def test_a_grid_that_cannot_be_found_is_said():
    hooks = Hooks("test", Requests())
    run = Run(SparseAttention(select="near", far="none", **SMALL), hooks)
    one = call(1)
    one.moment.latents = None
    assert run.attend(one) is None
    assert "do not say where 64 tokens lie" in hooks.counter.misses[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"density": 0}, "density=0"),
        ({"far_bytes": -1}, "far_bytes=-1"),
        ({"select": "best"}, "select='best'"),
        ({"far": "away"}, "far='away'"),
        ({"precision": "int2"}, "precision='int2'"),
        ({"warm_up": 0}, "set warm_up=1"),
        ({"budget": (("layer", 0.0),)}, "a budget row is"),
        ({"check_limit": float("nan")}, "check_limit"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        SparseAttention(**changed)


def test_eight_bits_are_called_emulated_on_a_cpu():
    assert "emulated" in SparseAttention(precision="int8").supports(family("sd")).reason
