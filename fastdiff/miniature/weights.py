"""The shipped weights: where they lie, how they are written, and how they become a pipeline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor, nn

from . import flow, models

FOLDER = Path(__file__).parent / "weights"


def path(name: str = "mini-sd") -> Path:
    """The folder of an embedded model, an ordinary diffusers folder.

    Raises FileNotFoundError, naming the training command, where this model has not been trained.
    """
    folder = FOLDER / name
    if not (folder / "model_index.json").exists():
        known = sorted(p.parent.name for p in FOLDER.glob("*/model_index.json"))
        runs = {"mini-wan": "mini-wan --images 205000", "mini-dit": "mini-dit --images 184000"}
        run = runs.get(name, "autoencoder --images 300000`, then `mini-sd")
        raise FileNotFoundError(
            f"no embedded model {name!r} (there are: {', '.join(known) or 'none'}); train it with "
            f"`python -m fastdiff.miniature.train {run}`"
        )
    return folder


def load_autoencoder() -> AutoencoderTiny:
    """The trained autoencoder in float32, with the scaling factor that gives latents unit variance."""
    return AutoencoderTiny.from_pretrained(FOLDER / "mini-sd" / "vae", dtype=torch.float32).eval()


def load_parts() -> dict[str, Any]:
    """`mini-sd`'s trained text encoder and UNet in float32, by diffusers' names."""
    parts: dict[str, Any] = {"text_encoder": models.text_encoder(), "unet": models.unet()}
    for name, part in parts.items():
        part.load_state_dict({key: value.float() for key, value in _state(FOLDER / "mini-sd" / name).items()})
    return parts


def _state(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no weights in {folder.name}; train mini-sd first")
    return load_file(files[0])


def load_into(name: str, module: nn.Module) -> bool:
    """Fills a module being trained from the shipped weights; False where there are none."""
    if "wan" in name:
        from . import wan_weights

        return wan_weights.load_into(name, module)
    folder = FOLDER / ("mini-dit" if name == "mini-dit" else "mini-sd")
    parts = {
        "mini-sd": {"text_encoder": "text_encoder", "unet": "unet"},
        "mini-dit": {"": "transformer"},
    }.get(name, {"": "vae"})
    for attribute, part in parts.items():
        files = sorted((folder / part).glob("*.safetensors"))
        if not files:
            return False
        target = getattr(module, attribute) if attribute else module
        target.load_state_dict({key: value.float() for key, value in load_file(files[0]).items()})
    return True


def export(name: str, state: dict[str, Tensor]) -> None:
    """Writes trained weights as float16 into the shipped folder, keeping the parts that are already there."""
    if "wan" in name:
        from . import wan_weights

        return wan_weights.export(name, state)
    {"mini-sd": _export_text_to_image, "mini-dit": _export_flow}.get(name, _export_autoencoder)(state)


@torch.inference_mode()
def _latent_deviation(vae: AutoencoderTiny) -> float:
    import numpy as np

    from . import losses, world

    rng = np.random.default_rng(2024)
    return float(vae.encoder(losses.pixels([world.random_scene(rng) for _ in range(512)])).std())


def _export_autoencoder(state: dict[str, Tensor]) -> None:
    vae = models.autoencoder()
    vae.load_state_dict(state)
    vae.register_to_config(scaling_factor=1 / _latent_deviation(vae))
    vae.half().save_pretrained(FOLDER / "mini-sd" / "vae")


def _export_text_to_image(state: dict[str, Tensor]) -> None:
    text, denoiser = models.text_encoder(), models.unet()
    text.load_state_dict({key.removeprefix("text_encoder."): v for key, v in state.items() if key.startswith("text_")})
    denoiser.load_state_dict({key.removeprefix("unet."): v for key, v in state.items() if key.startswith("unet.")})
    save(models.pipeline(load_autoencoder(), text, denoiser), FOLDER / "mini-sd")


def _export_flow(state: dict[str, Tensor]) -> None:
    denoiser = flow.transformer()
    denoiser.load_state_dict(state)
    save(flow.pipeline(load_autoencoder(), load_parts()["text_encoder"], denoiser), FOLDER / "mini-dit")


def save(pipe: Any, folder: Path) -> None:
    """Writes a pipeline as float16."""
    pipe.to(torch.float16).save_pretrained(folder)
    config = folder / "vae" / "config.json"
    # Where it was loaded from is nobody's business, and AutoencoderTiny warns of the other on every load.
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("_name_or_path", "block_out_channels")}
    config.write_text(json.dumps(kept, indent=2) + "\n")
