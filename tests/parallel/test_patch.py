"""Patch parallelism on virtual ranks, against one device."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.hooks import Wrapped
from fastdiff.parallel.communicator import Alone, using
from fastdiff.parallel.patch import PatchParallel, balanced
from fastdiff.parallel.simulator import Simulator, replica
from tests.parallel.nets import NETS, controlnet, inputs, largest, pipeline, sd, simulate

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-3}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_in_sync_it_equals_one_device(name: str, ranks: int):
    pipe = pipeline(NETS[name]().double())
    arguments = inputs(name, batch=2 if ranks == 2 else 1, dtype=torch.float64)
    truth = pipe(**arguments)
    assert truth.abs().max() > 0.1
    assert largest(simulate(pipe, PatchParallel(), ranks, **arguments), truth) < 1e-13 * truth.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_sync_in_shorter_floats(dtype: torch.dtype):
    pipe = pipeline(sd().to(dtype))
    arguments = inputs("sd", dtype=dtype)
    truth = pipe(**arguments)
    assert largest(simulate(pipe, PatchParallel(), 4, **arguments), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "shares"), [(16, (3, 1)), (22, ()), (27, (1, 2, 1)), (16, (1, 2, 5))])
def test_uneven_strips_and_odd_heights(rows: int, shares: tuple[float, ...]):
    pipe = pipeline(sd(3).double())
    arguments = inputs("sd", rows=32 if len(shares) == 3 and rows == 16 else rows, dtype=torch.float64)
    truth = pipe(**arguments)
    run = simulate(pipe, PatchParallel(shares=shares), len(shares) or 2, **arguments)
    assert largest(run, truth) < 1e-13 * truth.abs().max()


def test_one_rank_installs_nothing():
    pipe = pipeline(sd())
    arguments = inputs("sd")
    truth = pipe(**arguments)
    before = {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()}
    with using(Alone()), fastdiff.accelerate(pipe, PatchParallel("stale"), strict=True) as handle:
        assert {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()} == before
        assert torch.equal(pipe(**arguments), truth)
        assert "one rank" in str(handle.report())


@pytest.mark.parametrize("ranks", [2, 4])
def test_stale_with_constant_input_is_sync_bit_for_bit(ranks: int):
    pipe, arguments = pipeline(sd()), inputs("sd")
    sync = simulate(pipe, PatchParallel(), ranks, **arguments).results[0]
    stale = simulate(pipe, PatchParallel("stale", warmup=0, few_steps=True), ranks, steps=3, **arguments)
    assert all(torch.equal(result, sync) for result in stale.results)


def test_stale_is_sync_while_warming_up_and_not_after():
    pipe, arguments = pipeline(sd()), {**inputs("sd"), "steps": 4, "rate": 0.5}
    sync = simulate(pipe, PatchParallel(), 2, **arguments).results[0]

    def at(**settings: Any) -> torch.Tensor:
        return simulate(pipe, PatchParallel("stale", few_steps=True, **settings), 2, **arguments).results[0]

    assert torch.equal(at(warmup=3), sync)
    assert torch.equal(at(warmup=0, resync=1), sync)
    assert not torch.equal(at(warmup=2), sync)
    error = [(at(warmup=0, resync=every) - sync).abs().mean() for every in (2, 0)]
    assert 0 < error[0] < error[1]


def test_a_stale_step_uses_the_keys_of_the_step_before():
    """The neighbour's keys are those of its old input: replacing the neighbour's new input changes nothing here."""
    pipe = pipeline(sd())
    first, second = inputs("sd"), inputs("sd")
    noise = torch.randn_like(second["sample"])

    def run(sample: torch.Tensor) -> torch.Tensor:
        def one(communicator):
            twin = replica(pipe)
            settings = PatchParallel("stale", warmup=0, few_steps=True)
            with torch.no_grad(), fastdiff.accelerate(twin, settings) as handle, handle.request():
                twin.unet(**first)
                return twin.unet(**{**second, "sample": sample}).sample

        return Simulator(2).run(one).results[0]

    lower = torch.zeros_like(noise)
    # beyond the one row that the first convolution reads from the input itself
    lower[..., 9:, :] = noise[..., 9:, :]
    changed, plain = run(second["sample"] + lower), run(second["sample"])
    assert torch.equal(changed[..., :8, :], plain[..., :8, :])
    assert not torch.equal(changed[..., 8:, :], plain[..., 8:, :])


def test_partial_identities():
    pipe, arguments = pipeline(sd(3)), {**inputs("sd", rows=32), "steps": 3, "rate": 0.5}

    def at(policy: str, ranks: int, portion: float = 0.0) -> torch.Tensor:
        settings = PatchParallel(policy, portion=portion, warmup=0, few_steps=True)
        return simulate(pipe, settings, ranks, **arguments).results[0]

    displaced = {ranks: at("stale", ranks) for ranks in (2, 4)}
    assert torch.equal(at("partial", 2, 1.0), displaced[2])
    assert torch.equal(at("partial", 4, 3.0), displaced[4])
    assert not torch.equal(at("partial", 4, 1.0), displaced[4])


def test_partial_zero_sends_no_keys_and_sees_only_its_strip():
    pipe, arguments = pipeline(sd()), inputs("sd")
    settings = PatchParallel("partial", portion=0.0, warmup=0, few_steps=True)
    one = simulate(pipe, settings, 2, steps=1, **arguments)
    three = simulate(pipe, settings, 2, steps=3, **arguments)
    assert one.traffic[0].received["attention"] == three.traffic[0].received["attention"]


def test_controlnet_lora_and_ip_adapter_are_allowed():
    unet = sd().double()
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "conv1"], init_lora_weights=False))
    unet.requires_grad_(False)
    pipe = pipeline(unet, controlnet(sd()).double())
    arguments = {**inputs("sd", dtype=torch.float64), "controlnet_cond": torch.rand(1, 3, 32, 32).double()}
    truth = pipe(**arguments)
    assert largest(simulate(pipe, PatchParallel(), 2, **arguments), truth) < 1e-13

    adapted = sd()
    adapted._load_ip_adapter_weights([_ip_adapter(adapted)])
    pipe = pipeline(adapted.double())
    arguments = inputs("sd", dtype=torch.float64)
    arguments["added_cond_kwargs"] = {"image_embeds": [torch.randn(1, 1, 12, dtype=torch.float64)]}
    truth = pipe(**arguments)
    assert largest(simulate(pipe, PatchParallel(), 2, **arguments), truth) < 1e-13
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16).double()]}}
    with pytest.raises(fastdiff.Unsupported, match="masks of IP-Adapters"):
        simulate(pipe, PatchParallel(), 2, **arguments, **masks)


def _ip_adapter(unet: Any) -> dict:
    """An IP-Adapter of one token: projection of a 12-wide image embedding, and its keys and values for each layer."""
    tokens = 4
    projection = {
        "proj.weight": torch.randn(tokens * 16, 12),
        "proj.bias": torch.randn(tokens * 16),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    keys, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            keys[f"{number}.to_k_ip.weight"] = torch.randn(width, 16)
            keys[f"{number}.to_v_ip.weight"] = torch.randn(width, 16)
            number += 2
    return {"image_proj": projection, "ip_adapter": keys}


def test_few_steps_are_refused_unless_allowed():
    pipe, arguments = pipeline(sd()), inputs("sd")
    with pytest.raises(fastdiff.Unsupported, match="8 steps are too few"):
        simulate(pipe, PatchParallel("stale"), 2, steps=8, **arguments)
    simulate(pipe, PatchParallel("stale"), 2, steps=9, **arguments)


def test_what_cannot_be_cut_is_refused_with_its_name():
    unet = sd()
    unet.mid_block.resnets[0].extra = torch.nn.InstanceNorm2d(8)
    verdict = PatchParallel().supports(pipeline(unet))
    assert not verdict
    assert "mid_block.resnets.0.extra (InstanceNorm2d)" in verdict.reason
    with pytest.raises(fastdiff.Unsupported, match="at most 2 ranks"):
        simulate(pipeline(sd(3)), PatchParallel(), 4, **inputs("sd", rows=8))


def test_layers_added_later_are_noticed():
    from peft import LoraConfig

    def one(communicator):
        twin = replica(pipeline(sd()))
        with fastdiff.accelerate(twin, PatchParallel()):
            twin.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
            return twin(**inputs("sd"))

    with pytest.raises(fastdiff.Unsupported, match="layers were added"):
        Simulator(2).run(one)


def test_different_inputs_on_different_ranks_are_noticed():
    def one(communicator):
        twin = replica(pipeline(sd()))
        with fastdiff.accelerate(twin, PatchParallel()):
            arguments = inputs("sd")
            arguments["sample"] = arguments["sample"] + communicator.rank
            return twin(**arguments)

    with pytest.raises(fastdiff.Unsupported, match="different inputs"):
        Simulator(2).run(one)


def test_requests_do_not_meet_and_removal_is_exact():
    pipe = pipeline(sd())
    settings = PatchParallel("stale", warmup=0)
    first, second = inputs("sd"), inputs("sd", rows=24)
    solo = [simulate(pipe, settings, 2, steps=9, rate=0.1, **one).results[0] for one in (first, second)]
    truth = pipe(**first)

    def both(communicator):
        twin = replica(pipe)
        with fastdiff.accelerate(twin, settings) as handle:
            results = [twin(steps=9, rate=0.1, **one) for one in (first, second, first)]
            assert handle.report().rows[0].accelerated == 27
        assert not any(isinstance(value, Wrapped) for value in twin.unet.__dict__.values())
        return results, twin(**first)

    for results, plain in Simulator(2).run(both).results:
        assert torch.equal(results[0], solo[0])
        assert torch.equal(results[1], solo[1])
        assert torch.equal(results[2], solo[0])
        assert torch.equal(plain, truth)


def test_rows_follow_measured_speed():
    assert balanced((16, 16), (2.0, 1.0)) == (8.0, 16.0)
    pipe, arguments = pipeline(sd().double()), inputs("sd", dtype=torch.float64)
    truth = pipe(**arguments)
    run = simulate(pipe, PatchParallel(rebalance=1), 2, steps=3, **arguments)
    assert largest(run, truth) < 1e-13
    assert run.traffic[0].operations["balance"] == 3


def test_settings_are_checked():
    wrongs: tuple[dict[str, Any], ...] = (
        {"policy": "fresh"},
        {"portion": -1},
        {"warmup": -1},
        {"shares": (1, 0)},
        {"groups": 0},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="PatchParallel"):
            PatchParallel(**wrong)
    from fastdiff.parallel.branches import BranchParallel

    with pytest.raises(ValueError, match="groups=2"):
        fastdiff.Plan((PatchParallel(), BranchParallel(2)))
