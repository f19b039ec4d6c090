"""Loading and auditing."""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff.anatomy import anatomy, capture
from fastdiff.audit import peak_bytes
from fastdiff.load import LoadError
from fastdiff.miniature.families import FAMILIES, family


def test_a_saved_folder_is_loaded_for_either_task(tmp_path):
    family("sd").save_pretrained(tmp_path)
    pipe = fastdiff.load(tmp_path, device="cpu")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.unet.dtype == torch.float32
    assert type(fastdiff.load(str(tmp_path), "image-to-image", "cpu")).__name__ == "StableDiffusionImg2ImgPipeline"
    assert fastdiff.load(tmp_path, device="cpu", dtype="bfloat16").unet.dtype == torch.bfloat16


def test_what_cannot_be_loaded_gives_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for name, message in [
        (tmp_path, "no model_index.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "absent", "there is no folder"),
        (tmp_path / "broken", "could not be loaded"),
        ("nobody/nothing", "go online once|has no model"),
    ]:
        with pytest.raises(LoadError, match=message) as error:
            fastdiff.load(name)
        assert "\n" not in str(error.value)


def test_unknown_tasks_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="text-to-image, image-to-image"):
        fastdiff.load(task="text-to-smell")
    with pytest.raises(ValueError, match="use float32, bfloat16"):
        fastdiff.load(dtype="int8", device="cpu")


def test_audit_names_what_acts_what_does_not_and_diffusers_silences():
    audit = fastdiff.audit(family("sd"))
    rows = {row.settings: row for row in audit.rows}
    assert not rows["DiffusersCache('first_block')"].ok
    assert "no list of transformer blocks" in rows["DiffusersCache('first_block')"].reason
    assert rows["PromptCache"].ok
    assert any("matches no module of the unet: a no-op" in warning for warning in audit.warnings)
    assert any("opens no cache context" in warning for warning in audit.warnings)
    assert audit.memory is not None
    assert "memory at 64x64" in str(audit)


def test_audit_of_a_pipeline_with_separate_guidance_warns_of_mixed_branches():
    audit = fastdiff.audit(family("flux"), 32, 32)
    assert any("attention of the other" in warning for warning in audit.warnings)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_memory_estimate_agrees_with_what_the_allocator_saw(name: str):
    torch.set_num_threads(1)
    pipe = family(name)
    denoiser, args, kwargs = capture(pipe, 64, 64)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    measured = _measured(denoiser, args, kwargs) + sum(tensor.nbytes for tensor in inputs)
    assert peak_bytes(denoiser, args, kwargs) == pytest.approx(measured, rel=0.15)


def _measured(module, args, kwargs) -> int:
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(*args, **kwargs)
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "guidance", "scale", "encoders"),
    [("sd", "batched", 4, 1), ("sdxl", "batched", 4, 2), ("sd3", "batched", 4, 2), ("flux", "separate", 4, 2)],
)
def test_anatomy_is_read_from_structure(name: str, guidance: str, scale: int, encoders: int):
    parts = anatomy(family(name))
    assert (parts.guidance, parts.scale, len(parts.text_encoders)) == (guidance, scale, encoders)
    assert parts.latent_channels == (16 if name == "sd3" else 4)
