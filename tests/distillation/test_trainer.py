"""The trainer on an untrained miniature: resumes bit for bit, leaves the teacher alone, diffusers loads the rest."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.distillation.consistency import LatentConsistency
from fastdiff.distillation.continuous import ContinuousConsistency
from fastdiff.distillation.diffusers_networks import student_of
from fastdiff.distillation.networks import Levels
from fastdiff.distillation.objective import Objective
from fastdiff.distillation.phased import Phased
from fastdiff.distillation.students import levels_of, sampling_of, scheduler_of, steps_of
from fastdiff.distillation.trainer import Clock, Settings, distil
from fastdiff.miniature import untrained
from fastdiff.miniature.families import family

SETTINGS = Settings(steps=4, batch=2, rank=2, learning_rate=1e-3, warmup=1, save_every=2, seed=3)


class Noise:
    """Latents without a world: enough for mechanics."""

    def take(self, step: int, rank: int, batch: int) -> tuple[Tensor, Sequence[str], torch.Generator]:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        return torch.randn(batch, 4, 16, 16, generator=generator), ["a red circle", ""][:batch], generator


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("objective", [Phased(substeps=2), LatentConsistency()])
@pytest.mark.parametrize("killed_at", [0, 2])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(objective: Objective, killed_at: int, tmp_path: Path):
    def kill(step: int, loss: float) -> None:
        if step == killed_at:
            raise Killed

    distil(untrained(), objective, Noise(), SETTINGS, tmp_path / "whole")
    with pytest.raises(Killed):
        distil(untrained(), objective, Noise(), SETTINGS, tmp_path / "parts", kill)
    done: list[int] = []
    distil(untrained(), objective, Noise(), SETTINGS, tmp_path / "parts", lambda step, loss: done.append(step))
    assert done == list(range(killed_at // 2 * 2, 4))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(value.any() for key, value in whole.items() if "lora_B" in key or "up" in key)


def test_the_teacher_is_left_alone_and_the_student_is_a_lora_diffusers_loads(tmp_path: Path):
    pipe = untrained()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    folder = distil(pipe, Phased(substeps=1), Noise(), replace(SETTINGS, learning_rate=0.05), tmp_path / "student")
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    plain: Any = untrained()
    plain.set_progress_bar_config(disable=True)
    given = steps_of(folder, plain.scheduler.config, None, ("timesteps", "eta"))
    assert given == {"num_inference_steps": 4, "timesteps": [999, 749, 499, 249], "eta": 0.0}
    plain.scheduler = scheduler_of(folder, plain.scheduler.config)
    options = {**given, "guidance_scale": 1.0, "output_type": "latent"}

    def draw() -> Tensor:
        return plain("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    alone = draw()
    plain.load_lora_weights(str(folder))
    assert (draw() - alone).abs().max() > 1e-3
    # every layer of the file is in use, attention and convolutions alike
    student = student_of(pipe.unet, SETTINGS.rank, 0, start=folder).eval()
    given = {"timestep": torch.tensor([7, 500]), "encoder_hidden_states": torch.randn(2, 24, 128)}
    x = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(plain.unet(x, **given).sample, student(x, **given).sample, rtol=0, atol=1e-5)
    assert (plain.unet(x, **given).sample - pipe.unet(x, **given).sample).abs().max() > 1e-2
    plain.unload_lora_weights()
    assert torch.equal(draw(), alone)
    assert "Phased" in (folder / "README.md").read_text()


def test_a_student_begins_with_another_and_learns_from_it(tmp_path: Path):
    """A student that begins as its teacher has nothing to learn in one step over the same phases."""
    pipe = untrained()
    first = distil(pipe, Phased(substeps=1), Noise(), replace(SETTINGS, learning_rate=0.05), tmp_path / "first")
    losses: dict[str, float] = {}

    def run(name: str, **options: Any) -> None:
        objective = Phased(substeps=1, order=1, scale=1.0)
        settings = replace(SETTINGS, steps=1)

        def keep(step: int, loss: float) -> None:
            losses.setdefault(name, loss)

        distil(pipe, objective, Noise(), settings, tmp_path / name, keep, **options)

    run("both", start=first, teacher=first)
    run("teacher", teacher=first)
    card = (tmp_path / "both" / "README.md").read_text()
    assert "It began as the student first. It learned from the student first." in card
    assert losses["both"] < 1e-5 < 1e-3 < losses["teacher"]
    with pytest.raises(ValueError, match="gone on from"):
        distil(pipe, Phased(), Noise(), replace(SETTINGS, rank=3), tmp_path / "other", start=first)


def test_a_whole_denoiser_can_be_trained(tmp_path: Path):
    folder = distil(untrained(), Phased(substeps=1), Noise(), replace(SETTINGS, rank=0, steps=1), tmp_path)
    assert (folder / "unet" / "config.json").exists()
    assert sampling_of(folder)["sampler"] == "phased"


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path):
    distil(untrained(), Phased(substeps=1), Noise(), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="another run"):
        distil(untrained(), Phased(substeps=2), Noise(), SETTINGS, tmp_path)


def test_what_cannot_be_distilled_is_one_clear_error(tmp_path: Path):
    with pytest.raises(Unsupported, match="FluxPipeline"):
        distil(family("flux"), Phased(), Noise(), SETTINGS, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"student\.json"):
        sampling_of(tmp_path)
    with pytest.raises(ValueError, match="steps"):
        Settings(steps=0)


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    settings = Settings(steps=100, warmup=10, learning_rate=1.0)
    assert [settings.rate(step) for step in (0, 4, 9, 50, 80)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert 0 < settings.rate(99) <= 0.05


def test_the_clock_says_how_far_it_is():
    lines: list[str] = []
    clock = Clock(2, every_s=1e9, show=lines.append)
    clock(0, 1.0)
    clock(1, 0.5)
    assert len(lines) == 1 and lines[0].startswith("step 2 of 2, loss 0.99")


def test_where_students_are_called(tmp_path: Path):
    """sCM takes SANA-Sprint's two angles; what takes any number of steps takes even ones, on a flow too."""
    flow = Levels.of({"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "shift": 3.0})
    (first,), two = levels_of(ContinuousConsistency(), flow).values()
    assert (first, two[0]) == (1000, 1000)
    assert two[1] / 1000 == pytest.approx(math.tan(1.3) / (1 + math.tan(1.3)), abs=1e-3)
    assert levels_of(LatentConsistency(), flow) == {}
    (tmp_path / "student.json").write_text('{"levels": {}, "sampler": "consistency"}')
    config = {"prediction_type": "flow_prediction", "shift": 3.0}
    assert steps_of(tmp_path, config, 2, ()) == {"num_inference_steps": 2, "sigmas": [1.0, 0.5]}
    assert steps_of(tmp_path, {"prediction_type": "epsilon"}, 2, ()) == {"num_inference_steps": 2}
