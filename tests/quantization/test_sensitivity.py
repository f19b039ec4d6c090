"""Choosing precision by measurement: against every combination, within the budget, and nothing left behind."""

import itertools
import random
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.miniature.families import family
from fastdiff.quantization.layers import places
from fastdiff.quantization.sensitivity import Score, block_of_layer, choose, plan, record, score


def scores(seed: int, groups: int = 4, options: int = 3) -> list[Score]:
    rng = random.Random(seed)
    made = []
    for group in range(groups):
        made.append(Score(str(group), (str(group),), "keep", 0.0, 10.0, 100.0))
        for option in range(options - 1):
            made.append(
                Score(str(group), (str(group),), f"q{option}", rng.random(), rng.random() * 10, rng.random() * 100)
            )
    return made


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cost", ["ms", "bytes"])
def test_the_choice_is_the_best_of_all(seed: int, cost: str):
    every = scores(seed)
    budget = 0.2 + 0.2 * seed
    groups = [[one for one in every if one.group == str(group)] for group in range(4)]
    allowed = [
        combination for combination in itertools.product(*groups) if sum(one.error for one in combination) <= budget
    ]
    best = min(sum(getattr(one, cost) for one in combination) for combination in allowed)
    picked = choose(every, budget, cost)
    assert sum(one.error for one in picked) <= budget
    assert sum(getattr(one, cost) for one in picked) == pytest.approx(best)


def test_more_budget_never_costs_more():
    every = scores(3, groups=8)
    spent = [sum(one.ms for one in choose(every, budget)) for budget in (0, 0.5, 1, 2, 4)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == 80
    with pytest.raises(fastdiff.Unsupported, match="allow more"):
        choose([one for one in every if one.scheme != "keep" and one.error > 0], 0.0)
    with pytest.raises(ValueError, match="cost"):
        choose(every, 1.0, "watts")


def test_layers_of_a_block_belong_together():
    assert block_of_layer("unet.down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_out.0") == (
        "unet.down_blocks.1.attentions.0.transformer_blocks.2"
    )
    name = "transformer.transformer_blocks.7.ff.net.0.proj"
    assert block_of_layer(name) == "transformer.transformer_blocks.7"


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = family("flux")
    made.set_progress_bar_config(disable=True)
    generate(made)  # a plain call leaves diffusers' own marks on the modules
    return made


def generate(pipe: Any) -> None:
    pipe(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=3,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )


def block(name: str) -> str:
    return ".".join(name.split(".")[:3])


def test_recording_and_scoring_leave_nothing_behind(pipe: Any):
    before = {name: id(part) for name, part in pipe.transformer.named_modules()}
    marks = dict(pipe.transformer.__dict__)
    calls = record(pipe, lambda: generate(pipe), 2)
    found = places(pipe, 8)
    measured = score(calls, found, ("int8", "int4"), block, "eager")
    assert len(calls) == 2
    assert {name: id(part) for name, part in pipe.transformer.named_modules()} == before
    assert pipe.transformer.__dict__ == marks
    error = {(one.group, one.scheme): one.error for one in measured}
    for group in {one.group for one in measured}:
        assert error[group, "keep"] == 0 < error[group, "int8"] < error[group, "int4"]
    assert {name for one in measured for name in one.names} == {place.name for place in found}


def test_the_plan_is_within_its_budget_and_acts(pipe: Any):
    budget = 1e-4
    chosen = plan(pipe, lambda: generate(pipe), budget, ("int8", "int4", "codebook2"), "bytes", 2, 8, group=block)
    assert 0 < chosen.error <= budget
    assert chosen.bytes < 0.5 * chosen.bytes_before
    assert chosen.calls > 0
    again = fastdiff.Plan.from_json(fastdiff.Plan((chosen.plan,)).to_json())
    denoiser, args, kwargs = capture(pipe, 32, 32)
    with torch.no_grad():
        truth = denoiser(*args, **kwargs)[0]
        with fastdiff.accelerate(pipe, again):
            found = denoiser(*args, **kwargs)[0]
    # other inputs than those it was chosen on
    assert 0 < ((found - truth).norm() / truth.norm()) ** 2 < 10 * budget


def test_an_impossible_budget_keeps_everything(pipe: Any):
    chosen = plan(pipe, lambda: generate(pipe), 0.0, ("int4",), "bytes", 1, 8, group=block)
    assert chosen.plan.exact
    assert chosen.error == 0
    assert chosen.bytes == chosen.bytes_before
