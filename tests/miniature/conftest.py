"""The video model whose every weight acts, and students' homes under a temporary folder."""

import copy

import pytest
import torch

from fastdiff.miniature import wan, wan_buffer, wan_student, wan_weights
from fastdiff.miniature.families import _awake


@pytest.fixture(scope="module")
def pipe():
    pipe = wan.untrained()
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        _awake(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def homes(monkeypatch, tmp_path, pipe):
    """Weights go under ``tmp_path``; pools are small, and there is an autoencoder but no teacher."""
    for module in (wan_buffer, wan_student):
        monkeypatch.setattr(module, "_POOL", 8)
    monkeypatch.setattr(wan_weights, "load_autoencoder", lambda: copy.deepcopy(pipe.vae))
    monkeypatch.setattr(wan_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(wan_weights, "STUDENT", tmp_path / "student")
    monkeypatch.setattr(wan_weights, "BUFFER_STUDENT", tmp_path / "buffer")


@pytest.fixture
def teach(homes, pipe):
    """Make the video model the teacher that ships."""
    parts = {"text_encoder": pipe.text_encoder, "transformer": pipe.transformer}
    return lambda: wan_weights.export("mini-wan", torch.nn.ModuleDict(parts).state_dict())


@pytest.fixture
def learned():
    """Names of the parameters that some of these losses teach."""

    def names(module, losses):
        torch.stack(losses).sum().backward()
        return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    return names
