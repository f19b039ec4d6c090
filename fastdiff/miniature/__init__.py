"""A world with known truth, and the models trained on it that ship with the package.

`world` describes scenes, `render` draws them, `detector` reads them back, `models` and `weights` are the networks,
`train` is how they were made.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


MODELS = ("mini-sd", "mini-dit", "mini-wan")
"""The models that ship: a UNet on Stable Diffusion's schedule, a flow shaped like Stable Diffusion 3, and a video model
shaped like Wan."""


def path(name: str = "mini-sd") -> Path:
    """Folder of an embedded model; see `weights.path`."""
    from .weights import path

    return path(name)


def untrained(seed: int = 0) -> "StableDiffusionPipeline":
    """The embedded architecture with random weights; see `models.untrained`."""
    from .models import untrained

    return untrained(seed)
