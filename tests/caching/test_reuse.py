"""Guidance reuse, deep features and the unit mask: what their rules say is what is computed."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.caching.block_residual import BlockResidual
from fastdiff.caching.deep import DeepFeatures
from fastdiff.caching.guidance import GuidanceReuse
from fastdiff.caching.units import UnitMask, units
from fastdiff.miniature.families import family


@pytest.fixture(scope="module")
def sd() -> Any:
    """The embedded architecture, untrained."""
    pipe = family("sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, steps: int = 6, scale: float = 5.0) -> torch.Tensor:
    return pipe(
        "a red circle",
        num_inference_steps=steps,
        guidance_scale=scale,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images


def _inputs(pipe: Any, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    width = pipe.unet.config.cross_attention_dim
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 24, width, generator=generator),
    }


@pytest.mark.parametrize("one", [GuidanceReuse(interval=1), DeepFeatures(interval=1), UnitMask(interval=1)])
def test_computing_at_every_step_is_bit_exact(sd: Any, one: Any):
    plain = _draw(sd)
    with fastdiff.accelerate(sd, one):
        assert torch.equal(_draw(sd), plain)


def test_the_positive_branch_is_computed_at_every_step_and_the_negative_one_at_some(sd: Any):
    rows: list[int] = []
    handle = sd.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with fastdiff.accelerate(sd, GuidanceReuse(interval=3, warm_up=2)):
        _draw(sd, steps=8)
        guided, _ = list(rows), rows.clear()
        _draw(sd, steps=8, scale=1.0)
    handle.remove()
    # steps 0 and 1 are warm-up, 4 the interval's, 7 the last
    assert guided == [2, 2, 1, 1, 2, 1, 1, 2]
    assert rows == [1] * 8


def test_a_model_with_guidance_inside_is_refused():
    verdict = GuidanceReuse().supports(family("flux"))
    assert not verdict
    assert "guidance is an input" in verdict.reason


@pytest.mark.parametrize("branch", [0, 1, 2, 3, 4])
def test_deep_features_of_the_same_input_give_the_same_output(sd: Any, branch: int):
    inputs = _inputs(sd)
    with torch.no_grad():
        plain = sd.unet(**inputs).sample
        with fastdiff.accelerate(sd, DeepFeatures(branch=branch, interval=4, warm_up=1)) as handle, handle.request():
            first = sd.unet(**inputs).sample
            again = sd.unet(**inputs).sample
            held = handle.report().rows[0].bytes_held
    assert torch.equal(first, plain)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)
    widest = max(unit.in_channels for block in sd.unet.up_blocks for unit in block.resnets)
    assert 0 < held - inputs["encoder_hidden_states"].nbytes <= 2 * widest * 8 * 8 * 4


def test_a_controlnets_residuals_reach_the_layers_that_run(sd: Any):
    inputs = _inputs(sd)
    recorded: list[tuple[torch.Size, ...]] = []
    watch = [
        block.register_forward_hook(lambda module, args, output: recorded.append(tuple(one.shape for one in output[1])))
        for block in sd.unet.down_blocks
    ]
    with torch.no_grad():
        sd.unet(**inputs)
    for one in watch:
        one.remove()
    first = inputs["sample"].new_zeros(2, sd.unet.conv_in.out_channels, 8, 8).shape
    shapes = [first, *(shape for some in recorded for shape in some)]

    def residuals(shallow: float, deep: float) -> dict[str, Any]:
        down = [torch.full(shape, shallow if place <= 1 else deep) for place, shape in enumerate(shapes)]
        return {
            "down_block_additional_residuals": tuple(down),
            "mid_block_additional_residual": torch.full(shapes[-1], deep),
        }

    settings = DeepFeatures(branch=1, interval=9, warm_up=1)
    with torch.no_grad(), fastdiff.accelerate(sd, settings) as accelerated, accelerated.request():
        sd.unet(**inputs, **residuals(0.1, 0.1))
        still = sd.unet(**inputs, **residuals(0.1, 0.1)).sample
        deep = sd.unet(**inputs, **residuals(0.1, 5.0)).sample
        shallow = sd.unet(**inputs, **residuals(5.0, 0.1)).sample
    assert torch.equal(deep, still)
    assert not torch.allclose(shallow, still)


def test_refusals_name_what_is_there(sd: Any):
    assert "goes from 0 to 4" in DeepFeatures(branch=5).supports(sd).reason
    assert "is no UNet" in DeepFeatures().supports(family("flux")).reason
    none = UnitMask((("resnet", "*", 0.0, 1.0),)).supports(family("flux"))
    assert "it has units of kind" in none.reason


def test_units_are_found_by_kind_on_both_architectures(sd: Any):
    of_unet = {kind for kind, _ in units(sd.unet).values()}
    assert of_unet == {"block", "layer", "resnet", "self-attention", "cross-attention", "feed-forward"}
    of_flux = {kind for kind, _ in units(family("flux").transformer).values()}
    assert {"block", "self-attention", "feed-forward"} <= of_flux


@pytest.mark.parametrize("kind", ["block", "layer", "resnet", "self-attention", "cross-attention", "feed-forward"])
def test_masked_units_run_only_where_the_mask_lets_them(sd: Any, kind: str):
    runs: dict[str, int] = {}
    hooks = []
    for path, (of, part) in units(sd.unet).items():
        for number, one in enumerate(part if isinstance(part, list) else [part]):
            if of == kind:
                counter = one.forward
                runs[f"{path}.{number}"] = 0

                def counted(*args: Any, name: str = f"{path}.{number}", inner: Any = counter, **kwargs: Any) -> Any:
                    runs[name] += 1
                    return inner(*args, **kwargs)

                one.forward = counted
                hooks.append(one)
    try:
        where = "up_blocks.*"
        with fastdiff.accelerate(sd, UnitMask(((kind, where, 0.0, 1.0),), interval=9, warm_up=2)):
            _draw(sd, steps=6)
    finally:
        for one in hooks:
            one.__dict__.pop("forward")
    assert {count for path, count in runs.items() if path.startswith("up_blocks")} == {3}
    assert {count for path, count in runs.items() if not path.startswith("up_blocks")} <= {6}


def test_rules_hold_within_their_levels(sd: Any):
    plain = _draw(sd)
    with fastdiff.accelerate(sd, UnitMask((("resnet", "*", 0.0, 1e-6),), warm_up=1)) as handle:
        assert torch.equal(_draw(sd), plain)
        assert "accelerated none of 6 calls" in str(handle.report())
    with pytest.raises(ValueError, match="kind='conv' is not known"):
        UnitMask((("conv", "*", 0.0, 1.0),))
    with pytest.raises(ValueError, match="a rule is"):
        UnitMask((("resnet", "*", 0.0),))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_blocks_left_out_of_the_same_input_add_what_they_added(name: str):
    from fastdiff.anatomy import anatomy, capture

    pipe = family(name)
    denoiser, args, kwargs = capture(pipe, 32, 32)
    runs: list[int] = []
    watch = anatomy(pipe).denoiser.transformer_blocks[-1].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        plain = denoiser(*args, **kwargs)
        with fastdiff.accelerate(pipe, BlockResidual(keep=0, interval=9, warm_up=1)) as handle, handle.request():
            first = denoiser(*args, **kwargs)
            again = denoiser(*args, **kwargs)
            row = handle.report().rows[0]
    watch.remove()
    first, again, plain = (one[0] if isinstance(one, tuple) else one.sample for one in (first, again, plain))
    assert torch.equal(first, plain)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert (row.seen, row.accelerated) == (2, 1)


def test_what_writes_into_a_unit_s_output_does_not_write_into_what_is_kept(sd: Any):
    """FreeU scales what comes out of the middle in place."""
    kept: list[float] = []
    middle = sd.unet.mid_block.resnets[-1]
    with fastdiff.accelerate(sd, UnitMask((("resnet", "mid_block.*", 0.0, 1.0),), interval=9, warm_up=1, tail=0)):
        outer = middle.forward

        def scaled(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = outer(*args, **kwargs)
            kept.append(float(output.abs().mean()))
            return output.mul_(1.5)

        middle.forward = scaled
        try:
            _draw(sd, steps=5)
        finally:
            middle.forward = outer
    assert len(set(kept[1:])) == 1, kept
