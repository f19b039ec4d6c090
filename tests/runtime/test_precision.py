"""Precision: what is converted, what is spared, and how the measured choice is made and remembered."""

import json

import pytest
import torch

import fastdiff
from fastdiff.anatomy import capture
from fastdiff.miniature.families import family
from fastdiff.runtime import precision
from fastdiff.runtime.precision import Precision


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.set_num_threads(1)
    pipe = family("flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_inside_is_short_and_outside_is_not(pipe):
    denoiser, args, kwargs = capture(pipe, 32, 32)
    seen = {}
    denoiser.x_embedder.register_forward_pre_hook(lambda part, inputs: seen.update(latents=inputs[0].dtype))
    denoiser.pos_embed.register_forward_pre_hook(lambda part, inputs: seen.update(positions=inputs[0].dtype))
    with torch.no_grad():
        plain = denoiser(*args, **kwargs)[0]
        with fastdiff.accelerate(pipe, Precision("bfloat16")):
            short = denoiser(*args, **kwargs)[0]
            assert denoiser.dtype == torch.bfloat16
            assert pipe.vae.decoder.conv_in.weight.dtype == torch.bfloat16
            assert pipe.vae.encoder.conv_in.weight.dtype == torch.float32
    assert seen == {"latents": torch.bfloat16, "positions": torch.float32}
    assert short.dtype == plain.dtype == torch.float32
    assert 0 < (short - plain).norm() / plain.norm() < 0.05
    assert denoiser.dtype == torch.float32


def test_times_are_never_shortened(pipe):
    denoiser, args, kwargs = capture(pipe, 32, 32)
    seen = []
    denoiser.time_text_embed.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].float().item()))
    with torch.no_grad(), fastdiff.accelerate(pipe, Precision("bfloat16")):
        denoiser(*args, **{**kwargs, "timestep": torch.tensor([0.501])})
    # Flux itself shortens time to its own dtype inside; it is handed the exact one
    assert seen[0] == pytest.approx(501, abs=2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([1.0, 0.5], ("bfloat16", "contiguous")), ([1.0, 0.97], ("float32", "contiguous")), ([1.0, 2.0], None)],
)
def test_only_what_is_clearly_faster_is_taken(pipe, monkeypatch, seconds, expected):
    monkeypatch.setattr(precision, "_probe", lambda *arguments: list(seconds))
    with fastdiff.accelerate(pipe, Precision(components=("denoiser",))) as handle:
        assert str(pipe.transformer.dtype) == f"torch.{(expected or ('float32',))[0]}"
        note = handle.report().rows[0].notes[0]
    assert ("measured 2.00x over float32" in note) == (seconds[1] == 0.5)
    assert ("left in float32" in note) == (seconds[1] != 0.5)


def test_a_probe_is_made_once_and_a_damaged_notebook_is_made_again(pipe, tmp_path, monkeypatch):
    probes = []
    monkeypatch.setattr(precision, "_probe", lambda *arguments: probes.append(1) or [1.0, 2.0])
    plan = Precision(components=("denoiser",))
    for _ in range(2):
        fastdiff.accelerate(pipe, plan).remove()
    assert len(probes) == 1
    notebook = tmp_path / "fastdiff" / "precision.json"
    assert list(json.loads(notebook.read_text()).values()) == [[1.0, 2.0]]
    notebook.write_text("{")
    fastdiff.accelerate(pipe, plan).remove()
    assert len(probes) == 2


def test_the_real_probe_gives_a_time_for_every_option_and_leaves_no_trace(pipe):
    before = dict(pipe.transformer.__dict__)
    pointers = [parameter.data_ptr() for parameter in pipe.transformer.parameters()]
    options = [("float32", "contiguous"), ("bfloat16", "contiguous")]
    times = precision._probe(pipe, "transformer", pipe.transformer, options, 32)
    assert len(times) == 2
    assert all(0 < seconds < 60 for seconds in times)
    assert pipe.transformer.__dict__ == before
    assert [parameter.data_ptr() for parameter in pipe.transformer.parameters()] == pointers


def test_channels_last_is_exact_per_forward_and_restored(pipe):
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        plain = pipe.vae.decode(latents).sample
        with fastdiff.accelerate(pipe, Precision("keep", "channels_last")):
            assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            laid_out = pipe.vae.decode(latents).sample
        assert (laid_out - plain).norm() / plain.norm() < 1e-5
        assert torch.equal(pipe.vae.decode(latents).sample, plain)
