"""The accelerations: what they put in place, known answers on layers, settings, and what they refuse."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

import fastdiff
from fastdiff.anatomy import anatomy, capture
from fastdiff.miniature.families import family
from fastdiff.quantization.formats import FORMATS
from fastdiff.quantization.layer_precision import SCHEMES, LayerPrecision, build
from fastdiff.quantization.layers import QuantisedLinear, places
from fastdiff.quantization.statistics import Statistics, collect
from fastdiff.quantization.stored import StoredLinear, StoredWeights, rounded_activations
from fastdiff.quantization.torchao_layers import KINDS
from fastdiff.quantization.transforms import hadamard_rotation
from fastdiff.quantization.w8a8 import W8A8, W8A8Linear
from fastdiff_kernels.w8a8 import has_compiler

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
SMALL: dict[str, Any] = {"minimum_features": 8}


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = family("sdxl")
    made.set_progress_bar_config(disable=True)
    return made


def layer(inputs: int = 64, outputs: int = 48) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs).requires_grad_(False)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def forward(pipe: Any) -> Tensor:
    denoiser, args, kwargs = capture(pipe, 32, 32)
    with torch.no_grad():
        output = denoiser(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output.sample


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_layer_is_a_linear_layer_of_what_was_stored(name: str):
    plain = layer()
    stored = StoredLinear(plain, FORMATS[name])
    x = torch.randn(2, 5, 64)
    expected = torch.nn.functional.linear(x, stored.stored_weight(), plain.bias)
    torch.testing.assert_close(stored(x), expected)
    assert distance(stored(x), plain(x)) < 0.5
    assert stored(x.bfloat16()).dtype == torch.bfloat16
    assert stored.weight.shape == plain.weight.shape


@pytest.mark.parametrize(
    "make",
    [lambda one, **by: W8A8Linear(one, path="eager", **by), lambda one, **by: StoredLinear(one, FORMATS["int8"], **by)],
)
def test_a_change_of_basis_is_not_seen_outside(make):
    plain = layer()
    x = torch.randn(7, 64)
    smooth = torch.rand(64) + 0.5
    for settings in (
        {"smooth": smooth},
        {"rotation": hadamard_rotation(64)},
        {"smooth": smooth, "rotation": hadamard_rotation(64)},
    ):
        changed = make(plain, **settings)
        assert distance(changed(x), plain(x)) < 0.02
        assert distance(changed.weight, plain.weight) < 0.01


def test_casting_and_moving_leave_scales_alone():
    plain = layer()
    quantised = W8A8Linear(plain, smooth=torch.rand(64) + 0.5, path="eager")
    x = torch.randn(3, 64)
    before = quantised(x)
    quantised.to(torch.bfloat16)
    assert torch.equal(quantised.read("scale"), W8A8Linear(plain, quantised.smooth, path="eager").read("scale"))
    assert distance(quantised(x), before) < 0.01  # the bias is a parameter and was cast


def test_rounded_activations():
    x = torch.randn(3, 5, 70)
    assert torch.equal(rounded_activations(rounded_activations(x, 4), 4), rounded_activations(x, 4))
    assert distance(rounded_activations(x, 8), x) < 0.01
    assert distance(rounded_activations(x, 4), x) < 0.15


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
def test_a_rotated_8_bit_layer_compiles_into_one_graph():
    plain = layer()
    quantised = W8A8Linear(plain, smooth=torch.rand(64) + 0.5, rotation=hadamard_rotation(64))
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(quantised, fullgraph=True, backend=counted)
    with torch.no_grad():
        for seed in range(2):
            x = torch.randn(9, 64, generator=torch.Generator().manual_seed(seed))
            assert distance(compiled(x), quantised(x)) < 2e-3
    assert len(graphs) == 1


@pytest.mark.parametrize("rotate", ["none", "hadamard", "found"])
def test_w8a8_stays_near_on_a_pipeline(pipe: Any, rotate: str):
    truth = forward(pipe)
    with fastdiff.accelerate(pipe, W8A8(rotate=rotate, smooth=0.5, path="eager", **SMALL)) as handle:
        assert distance(forward(pipe), truth) < 0.02
        notes = " ".join(handle.report().rows[0].notes)
        assert "linear layers" in notes
        assert ("folded into value projections" in notes) == (rotate == "hadamard")
    assert torch.equal(forward(pipe), truth)


def test_an_image_prompt_attached_later_is_not_ignored(pipe: Any):
    with fastdiff.accelerate(pipe, W8A8(rotate="hadamard", path="eager", **SMALL)):
        denoiser, args, kwargs = capture(pipe, 32, 32)
        processor = next(iter(denoiser.attn_processors.values()))
        attention: Any = next(part for part in denoiser.modules() if getattr(part, "processor", None) is processor)
        attention.processor.to_v_ip = torch.nn.Linear(8, 8)
        try:
            with pytest.raises(fastdiff.Unsupported, match="IP-Adapter"):
                denoiser(*args, **kwargs)
        finally:
            del attention.processor.to_v_ip


def test_4_bit_systems_keep_their_order_on_real_inputs(pipe: Any):
    """Low rank beside four bits is nearer than four bits alone, weights alone nearer than with activations."""
    truth = forward(pipe)
    found = {}
    for name, one in {
        "int4": StoredWeights("int4", **SMALL),
        "svdquant": StoredWeights("int4", rank=8, rounds=3, **SMALL),
        "svdquant-w4a4": StoredWeights("int4", rank=8, rounds=3, activations=4, **SMALL),
        "w4a4": StoredWeights("int4", activations=4, **SMALL),
    }.items():
        with fastdiff.accelerate(pipe, one):
            found[name] = distance(forward(pipe), truth)
    assert found["svdquant"] < found["int4"] < found["w4a4"]
    assert found["svdquant-w4a4"] < found["w4a4"]


def test_statistics_travel_in_a_file(pipe: Any, tmp_path):
    found = places(pipe, 8)
    statistics = collect(found, lambda: forward(pipe))
    assert set(statistics.peaks) == {place.name for place in found}
    path = tmp_path / "inputs.safetensors"
    statistics.save(path)
    again = Statistics.load(path)
    name = found[0].name
    assert torch.equal(again.peaks[name], statistics.peaks[name])
    assert (again.samples[name].abs().amax(0) <= again.peaks[name]).all()
    one = StoredWeights("codebook2", smooth=0.5, fit=True, statistics=str(path), **SMALL)
    few = StoredWeights("int4", smooth=0.5, statistics=str(path), minimum_features=32)
    with fastdiff.accelerate(pipe, few) as handle:
        assert "trial" not in str(handle.report())
    assert one.settings()["statistics"] == str(path)
    other = family("flux")
    with pytest.raises(fastdiff.Unsupported, match="knows nothing of transformer"):
        fastdiff.accelerate(other, few)


def test_keeping_every_layer_is_bit_exact(pipe: Any):
    truth = forward(pipe)
    one = LayerPrecision((("*", "keep"),), **SMALL)
    assert one.exact
    with fastdiff.accelerate(pipe, one):
        assert torch.equal(forward(pipe), truth)
        assert not any(isinstance(part, QuantisedLinear) for part in anatomy(pipe).denoiser.modules())


def test_the_first_pattern_decides(pipe: Any):
    one = LayerPrecision((("*to_q", "keep"), ("*attn1*", "int8"), ("*", "w8a8")), path="eager", **SMALL)
    names = [place.name for place in places(pipe, 8)]
    with fastdiff.accelerate(pipe, one):
        kinds = {name: type(dict(pipe.unet.named_modules())[name.removeprefix("unet.")]) for name in names}
    for name, kind in kinds.items():
        expected = torch.nn.Linear if name.endswith("to_q") else StoredLinear if "attn1" in name else W8A8Linear
        assert kind is expected, name
    unused = LayerPrecision((("*nothing*", "w8a8"), ("*", "int8")), **SMALL).supports(pipe)
    assert unused
    assert "nothing" in unused.reason


def test_what_cannot_be_is_refused(pipe: Any):
    with pytest.raises(fastdiff.Unsupported, match="minimum_features"):
        fastdiff.accelerate(pipe, W8A8())
    with pytest.raises(ValueError, match="LayerPrecision"):
        LayerPrecision((("*", "int2"),))
    with pytest.raises(ValueError, match="activations=1"):
        StoredWeights(activations=1)
    with pytest.raises(ValueError, match="format"):
        StoredWeights("fp2")
    with pytest.raises(ValueError, match="keep one"):
        fastdiff.Plan((W8A8(), StoredWeights()))
    assert set(KINDS) < set(SCHEMES)


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_without_torchao_the_remedy_is_said(pipe: Any):
    verdict = LayerPrecision((("*", "torchao-int8"),), **SMALL).supports(pipe)
    assert not verdict
    assert "pip install 'torchao" in verdict.reason
    with pytest.raises(fastdiff.Unsupported, match="pip install"):
        build(layer(), "torchao-int8")


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao: pip install 'torchao>=0.15'")
@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int8-weight", "torchao-fp8-weight"])
def test_torchao_layers(pipe: Any, kind: str):
    plain = layer()
    x = torch.randn(20, 64)
    weight = plain.weight.data_ptr()
    found = build(plain, kind)
    assert distance(found(x), plain(x)) < 0.05
    assert plain.weight.data_ptr() == weight
    truth = forward(pipe)
    with fastdiff.accelerate(pipe, LayerPrecision((("*", kind),), **SMALL)):
        assert 0 < distance(forward(pipe), truth) < 0.1
    assert torch.equal(forward(pipe), truth)


@pytest.mark.skipif(not HAS_TORCHAO or torch.cuda.is_available(), reason="needs torchao and no GPU")
def test_torchao_on_a_machine_without_its_gpu_is_refused_in_words(pipe: Any):
    verdict = LayerPrecision((("*", "torchao-fp8"),), **SMALL).supports(pipe)
    assert "8.9" in verdict.reason
