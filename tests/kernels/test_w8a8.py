"""The 8-bit linear layer: exact integers before the epilogue, every path the same, and what must not happen."""

import pytest
import torch

from fastdiff_kernels.w8a8 import PATHS, linear, quantise_rows, quantise_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = [path for path in PATHS if path not in ("reference", "compiled")]


def layer(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(DEVICE)
    bias = torch.randn(outputs, generator=generator).to(DEVICE)
    return x, weight, bias


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 8, 5), (33, 100, 72), (130, 65, 140)])
def test_integers_are_exact(path: str, tokens: int, inputs: int, outputs: int):
    """With x and weights that are integers already, and scales of one, the layer is the integer product."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (tokens, inputs), generator=generator).float()
    x[:, 0] = 127
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    expected = x.double() @ weight.double().mT
    found = linear(x.to(DEVICE), weight.to(DEVICE), torch.ones(outputs, device=DEVICE), path=path)
    assert torch.equal(found.cpu().double(), expected)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_paths_agree_with_the_reference(path: str, dtype: torch.dtype, extras: bool):
    x, weight, bias = layer(37, 96, 50, dtype)
    smooth = torch.rand(96, device=DEVICE) + 0.5
    given = {"bias": bias, "smooth": smooth} if extras else {}
    whole, scale = quantise_weight(weight / smooth if extras else weight)
    expected = linear(x, whole, scale, path="reference", **given)
    found = linear(x, whole, scale, path=path, **given)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    truth = torch.nn.functional.linear(x.float(), weight, bias if extras else None)
    assert (found.float() - truth).norm() / truth.norm() < 0.02


@pytest.mark.slow
def test_fused_agrees_with_the_reference_at_any_size():
    for tokens, inputs, outputs in ((5, 64, 48), (70, 96, 33), (1, 24, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = layer(tokens, inputs, outputs, dtype)
            whole, scale = quantise_weight(weight)
            expected = linear(x, whole, scale, bias, path="eager")
            torch.testing.assert_close(linear(x, whole, scale, bias, path="compiled"), expected, rtol=1e-2, atol=1e-5)


def test_rounding_is_within_half_a_step_and_repeats():
    x = torch.randn(20, 64) * torch.logspace(-3, 3, 20)[:, None]
    whole, scale = quantise_rows(x)
    assert (x - whole * scale).abs().le(scale * 0.5001).all()
    again, _ = quantise_rows(whole * scale)
    assert torch.equal(again, whole)
    zeros, one = quantise_rows(torch.zeros(2, 8))
    assert not zeros.any()
    assert torch.equal(one, torch.ones(2, 1))


@pytest.mark.parametrize("path", ["reference", *FAST])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token_and_shows(path: str, bad: float):
    x, weight, _ = layer(4, 16, 8)
    whole, scale = quantise_weight(weight)
    clean = linear(x, whole, scale, path=path)
    x[2, 5] = bad
    found = linear(x, whole, scale, path=path)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_leading_axes_views_and_nothing():
    x, weight, bias = layer(24, 16, 8)
    whole, scale = quantise_weight(weight)
    flat = linear(x, whole, scale, bias, path="eager")
    assert torch.equal(linear(x.view(2, 3, 4, 16), whole, scale, bias, path="eager"), flat.view(2, 3, 4, 8))
    assert torch.equal(linear(x.T.contiguous().T, whole, scale, bias, path="eager"), flat)
    assert linear(x[:0], whole, scale, bias).shape == (0, 8)


def test_wrong_input_is_named():
    x, weight, _ = layer(2, 16, 8)
    whole, scale = quantise_weight(weight)
    with pytest.raises(ValueError, match="int8"):
        linear(x, weight, scale)
    with pytest.raises(ValueError, match=r"\[\.\.\., 16\]"):
        linear(x[:, :8], whole, scale)
    with pytest.raises(ValueError, match="scale"):
        linear(x, whole, scale[:4])
    with pytest.raises(ValueError, match="path"):
        linear(x, whole, scale, path="fast")
    with pytest.raises(ValueError, match="no gradient"):
        linear(x.requires_grad_(), whole, scale)
