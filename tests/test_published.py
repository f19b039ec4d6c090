"""Published few-step models are known by name and by config, and run as their cards say, on random weights."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import published
from fastdiff.miniature.families import family

IDS = {
    "stabilityai/sd-turbo": ("SD-Turbo", 1, 0.0),
    "stabilityai/sdxl-turbo": ("SDXL-Turbo", 1, 0.0),
    "ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors": ("SDXL-Lightning", 8, 0.0),
    "ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors": ("SDXL-Lightning 1-step", 1, 0.0),
    "ByteDance/SDXL-Lightning": ("SDXL-Lightning", 4, 0.0),
    "tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors": ("DMD2", 4, 0.0),
    "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin": ("DMD2 1-step", 1, 0.0),
    "ByteDance/Hyper-SD/Hyper-SDXL-2steps-lora.safetensors": ("Hyper-SD", 2, 0.0),
    "ByteDance/Hyper-SD/Hyper-SD15-1step-lora.safetensors": ("Hyper-SD 1-step", 1, 0.0),
    "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors": ("Hyper-SDXL 1-step UNet", 1, 0.0),
    "ByteDance/Hyper-SD/Hyper-SDXL-12steps-CFG-lora.safetensors": ("Hyper-SD CFG", 12, 5.0),
    "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-16steps-lora.safetensors": ("Hyper-FLUX", 16, 3.5),
    "latent-consistency/lcm-lora-sdv1-5": ("LCM-LoRA", 4, 1.0),
    "SimianLuo/LCM_Dreamshaper_v7": ("LCM", 4, 8.0),
    "h1t/TCD-SDXL-LoRA": ("TCD", 4, 0.0),
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": ("PixArt-delta", 4, 0.0),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": ("SANA-Sprint", 2, 4.5),
    "black-forest-labs/FLUX.1-schnell": ("FLUX.1-schnell", 4, 0.0),
    "stabilityai/stable-diffusion-3.5-large-turbo": ("SD3.5-Turbo", 4, 0.0),
    "Tongyi-MAI/Z-Image-Turbo": ("Z-Image-Turbo", 8, 0.0),
}


@pytest.mark.parametrize("identity", IDS)
def test_a_model_is_known_by_its_id(identity: str):
    found = published.by_name(identity)
    assert found is not None
    assert (found.name, found.steps, found.guidance) == IDS[identity]
    again = published.by_name(published.adapter_name(identity))
    assert again == found


@pytest.mark.parametrize(
    "identity",
    [
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "black-forest-labs/FLUX.1-dev",
        "Tongyi-MAI/Z-Image",
        "stabilityai/stable-diffusion-3.5-large",
        "me/not-lcm-lorax",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "",
    ],
)
def test_a_teacher_is_not_taken_for_its_student(identity: str):
    assert published.by_name(identity) is None


def test_every_scheduler_and_argument_of_the_table_exists():
    for recipe in published.RECIPES:
        if recipe.scheduler:
            made = getattr(diffusers, recipe.scheduler).from_config({}, **dict(recipe.settings))
            assert all(made.config[name] == value for name, value in recipe.settings)
        assert recipe.timesteps == () or len(recipe.timesteps) == recipe.steps
        assert published.named(recipe.name) is recipe
        assert recipe.name in str(recipe)


def _saved(kind: str, folder: Path) -> Path:
    family(kind).save_pretrained(folder)
    return folder


def _timesteps(pipe: Any, arguments: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Timesteps a call visits and the rows of each denoiser call."""
    visited, rows = [], []
    part = getattr(pipe, "unet", None) or pipe.transformer
    part.register_forward_pre_hook(lambda module, args, kwargs: rows.append(_rows(args, kwargs)), with_kwargs=True)
    inner = pipe.scheduler.step

    def step(output: Any, timestep: Any, *others: Any, **named: Any) -> Any:
        visited.append(float(timestep))
        return inner(output, timestep, *others, **named)

    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    own = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(pipe).__name__ else {}
    made = pipe("a red circle", height=32, width=32, output_type="pt", **arguments, **own).images
    assert torch.isfinite(made).all()
    return visited, rows


def _rows(args: Any, kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else kwargs["hidden_states"])


MODELS = [
    ("sd", "sd-turbo", [999.0]),
    ("sdxl", "sdxl-turbo", [999.0]),
    ("sdxl", "SDXL-Lightning-4step", [999.0, 749.0, 499.0, 249.0]),
    ("sdxl", "dmd2_sdxl_4step", [999.0, 749.0, 499.0, 249.0]),
    ("sdxl", "Hyper-SDXL-1step-Unet", [800.0]),
    ("sdxl", "Hyper-SDXL-2steps-lora", [999.0, 499.0]),
    ("sd", "lcm-lora-sdv1-5", [999.0, 759.0, 499.0, 259.0]),
    ("sd", "TCD-SD15-LoRA", [999.0, 759.0, 499.0, 259.0]),
    ("pixart", "PixArt-LCM-XL-2-1024-MS", [999.0, 759.0, 499.0, 259.0]),
    ("flux", "FLUX.1-schnell", [1000.0, 750.0, 500.0, 250.0]),
]


@pytest.mark.parametrize(("kind", "name", "expected"), MODELS)
def test_a_loaded_model_visits_its_own_timesteps_with_one_row(
    kind: str, name: str, expected: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = _saved(kind, tmp_path / name)
    with caplog.at_level(logging.WARNING, "fastdiff.published"):
        pipe = fastdiff.load(folder, device="cpu")
    recipe = published.recipe_of(pipe)
    assert recipe is not None
    assert recipe.name in caplog.text
    visited, rows = _timesteps(pipe, recipe.arguments(pipe))
    assert visited == pytest.approx(expected)
    assert set(rows) == {1}  # no second guidance branch


def test_what_the_user_says_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = _saved("sd", tmp_path / "sd-turbo")
    plain = fastdiff.load(folder, device="cpu", recipe="none")
    assert type(plain.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert not [one for one in caplog.records if one.name.startswith("fastdiff")]
    other = fastdiff.load(folder, device="cpu", recipe="tcd")
    assert type(other.scheduler) is diffusers.TCDScheduler
    recipe = published.named("DMD2")
    assert recipe.arguments(other, steps=3, guidance=2.0) == {"num_inference_steps": 3, "guidance_scale": 2.0}
    assert recipe.arguments(other)["timesteps"] == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="use auto, none, Hyper-FLUX"):
        fastdiff.load(folder, recipe="turbo")


def test_a_lora_brings_its_own_scheduler(tmp_path: Path):
    folder = _saved("sd", tmp_path / "plain")
    source = family("sd")
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    lora = tmp_path / "lcm-lora-sdv1-5"
    source.save_lora_weights(lora, unet_lora_layers=get_peft_model_state_dict(source.unet))
    pipe = fastdiff.load(folder, device="cpu", lora=str(lora))
    recipe = published.recipe_of(pipe)
    assert recipe is not None
    assert recipe.name == "LCM-LoRA"
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    alone = next(lora.glob("*.safetensors"))
    assert published.recipe_of(fastdiff.load(folder, device="cpu", lora=str(alone))) == recipe
    with pytest.raises(OSError, match="the LoRA"):
        fastdiff.load(folder, lora=str(tmp_path / "nothing"))


def test_models_under_another_name_are_known_by_their_configs():
    plain = {kind: family(kind) for kind in ("sd", "sdxl", "sd3", "flux", "pixart")}
    assert {kind: published.recipe_of(pipe) for kind, pipe in plain.items()} == dict.fromkeys(plain)

    def config(pipe: Any) -> str:
        found = published.recipe_of(pipe)
        return found.name if found else ""

    plain["flux"].transformer.register_to_config(guidance_embeds=False)
    assert config(plain["flux"]) == "FLUX.1-schnell"
    euler = diffusers.EulerAncestralDiscreteScheduler
    plain["sdxl"].scheduler = euler.from_config(plain["sdxl"].scheduler.config)
    assert config(plain["sdxl"]) == "SDXL-Turbo"
    plain["pixart"].scheduler = diffusers.LCMScheduler()
    assert config(plain["pixart"]) == "PixArt-delta"
    plain["sd"].scheduler = diffusers.TCDScheduler()
    assert config(plain["sd"]) == "TCD"
    plain["sd"].scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    plain["sd"].unet.register_to_config(cross_attention_dim=1024)
    assert config(plain["sd"]) == "SD-Turbo"
    plain["sd"].scheduler = diffusers.LCMScheduler()
    plain["sd"].unet.register_to_config(time_cond_proj_dim=64)
    assert config(plain["sd"]) == "LCM"


def test_sana_sprint_takes_any_number_of_steps():
    class Sprint:
        def __call__(self, num_inference_steps: int, guidance_scale: float, intermediate_timesteps: float = 1.3):
            pass

    recipe = published.named("SANA-Sprint")
    assert "intermediate_timesteps" not in recipe.arguments(Sprint())
    for steps in (1, 4):
        arguments = recipe.arguments(Sprint(), steps)
        assert arguments["intermediate_timesteps"] is None
        made = diffusers.SCMScheduler()
        made.set_timesteps(steps, intermediate_timesteps=arguments["intermediate_timesteps"])  # type: ignore[arg-type]
        assert len(made.timesteps) == steps + 1
