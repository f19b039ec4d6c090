"""Sparse-linear attention: learns, is written and read, is taken off bit for bit, and refuses what is not its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastdiff
from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import capture
from fastdiff.attention.linear import FineTune, Linear, SparseLinear, load
from fastdiff.miniature.families import family

SETTINGS = Linear(density=0.1, query_block=4, key_block=4, minimum_tokens=48)


def inputs(pipe: Any) -> dict[str, Any]:
    _, args, kwargs = capture(pipe, 32, 32)
    given = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
    return {name: given[name] for name in ("sample", "timestep", "encoder_hidden_states")}


def picture(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = dict(num_inference_steps=2, height=32, width=32, generator=generator, output_type="latent")
    return pipe("a red circle", **given).images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[float]]:
    """A pipeline, a file trained for it, and the errors on the way."""
    torch.manual_seed(0)
    pipe: Any = family("sd")
    pipe.set_progress_bar_config(disable=True)
    before = [value.clone() for value in pipe.unet.parameters()]
    tuned = FineTune(pipe.unet, SETTINGS, inputs(pipe), rate=3e-3, steps=12)
    errors = [tuned.step(inputs(pipe)) for _ in range(12)]
    assert all(torch.equal(*pair) for pair in zip(before, pipe.unet.parameters(), strict=True))
    path = tmp_path_factory.mktemp("linear") / "weights.safetensors"
    tuned.save(path)
    return pipe, path, errors


def test_it_learns_and_is_taken_off_bit_for_bit(trained: tuple[Any, Path, list[float]]):
    pipe, path, errors = trained
    assert errors[-1] < 0.5 * errors[0]
    expected = picture(pipe)
    one = SparseLinear(str(path))
    assert one.supports(pipe)
    with fastdiff.accelerate(pipe, one) as handle:
        changed = picture(pipe)
        row = handle.report().rows[0]
    assert row.accelerated == row.seen > 0
    assert row.bytes_held > 0
    assert "0.10 of key blocks exact" in str(row.notes)
    assert not torch.equal(changed, expected)
    assert torch.equal(picture(pipe), expected)


def test_a_plan_keeps_the_settings(trained: tuple[Any, Path, list[float]]):
    _, path, _ = trained
    settings, values = load(path)
    assert settings == SETTINGS
    assert all(":" in name for name in values)
    plan = fastdiff.Plan([SparseLinear(str(path), density=0.5)])
    assert fastdiff.Plan.from_json(plan.to_json()) == plan


def test_a_run_goes_on_where_it_stood():
    pipe: Any = family("sd")
    given = inputs(pipe)
    whole, first = (FineTune(pipe.unet, SETTINGS, given, steps=4) for _ in range(2))
    for _ in range(4):
        whole.step(given)
    first.step(given)
    second = FineTune(pipe.unet, SETTINGS, given, steps=4)
    second.resume(first.state())
    for _ in range(3):
        second.step(given)
    for name, value in whole.trained.items():
        torch.testing.assert_close(second.trained[name], value, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused(trained: tuple[Any, Path, list[float]], tmp_path: Path):
    pipe, path, _ = trained
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for wrong, words in ((tmp_path, "no file"), (other, "FineTune.save"), (broken, "no safetensors file")):
        assert words in SparseLinear(str(wrong)).supports(pipe).reason
    assert "another denoiser" in SparseLinear(str(path)).supports(family("flux")).reason
    with pytest.raises(Unsupported, match="no self-attention"):
        FineTune(pipe.unet, Linear(), inputs(pipe))
    with pytest.raises(ValueError, match="density=0"):
        Linear(density=0)
    with pytest.raises(ValueError, match="features='cosine'"):
        Linear(features="cosine")
