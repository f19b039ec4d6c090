"""Step Rehash (Streamlined Inference, https://arxiv.org/abs/2411.01171): steps whose features hardly differ share one.

The layer whose features are most alike from step to step says which steps to compute: each is held against the last
computed one, and computed itself when it is less alike than a threshold. What comes out is a schedule, for `Forecast`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported, check_number
from fastdiff.anatomy import anatomy
from fastdiff.anatomy import blocks as transformer_blocks
from fastdiff.caching.forecast import Forecast
from fastdiff.caching.levels import run_of


def similarities(features: Tensor) -> Tensor:
    """float64 [T, T]: the cosine between the features [T, ...] of every two steps."""
    flat = torch.nn.functional.normalize(features.flatten(1).double(), dim=1)
    return flat @ flat.mT


def rehash(similar: Tensor, threshold: float, longest: int | None = None) -> tuple[int, ...]:
    """The steps to compute: the first, the last, and every one less like the last computed one than a threshold.

    Args:
        similar: [T, T] as `similarities` gives it.
        threshold: from -1, which computes as little as it may, to 1, which shares only what is equal.
        longest: most steps that share one computation, its own included.
    """
    check_number("rehash", "threshold", threshold, -1, 1)
    computed = [0]
    for step in range(1, len(similar)):
        # not below a threshold is not alike: NaN is neither
        worn = longest is not None and step - computed[-1] >= longest
        if worn or step == len(similar) - 1 or not similar[step, computed[-1]] >= threshold:
            computed.append(step)
    return tuple(computed)


def layer_features(pipe: Any, generate: Callable[[], Any]) -> dict[str, Tensor]:
    """Features [T, ...] of every block of the denoiser by name, while `generate` calls the pipeline once."""
    denoiser = anatomy(pipe).denoiser
    ups = getattr(denoiser, "up_blocks", None)
    found = transformer_blocks(denoiser) if ups is None else [(f"up_blocks.{i}", part) for i, part in enumerate(ups)]
    if not found:
        raise Unsupported("the denoiser has no list of blocks to watch; give Forecast an interval instead")
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in found}
    watching = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[-1] if isinstance(output, (tuple, list)) else output
            seen[name].append(value.detach().float())

        return hook

    try:
        watching += [part.register_forward_hook(watch(name)) for name, part in found]
        with torch.no_grad():
            generate()
    finally:
        for handle in watching:
            handle.remove()
    return {name: torch.stack(values) for name, values in seen.items() if values}


def steadiest(features: dict[str, Tensor]) -> str:
    """The name of the layer whose features are most alike from one step to the next, on average."""
    return max(features, key=lambda name: float(similarities(features[name]).diagonal(1).mean()))


def step_rehash(
    pipe: Any, generate: Callable[[], Any], threshold: float = 0.99, longest: int | None = None
) -> Forecast:
    """A `Forecast` that repeats outputs on the schedule that Step Rehash finds in one call of the pipeline."""
    features = layer_features(pipe, generate)
    levels = run_of(pipe.scheduler).levels
    chosen = features[steadiest(features)]
    # separate guidance calls the blocks more than once a step
    chosen = chosen.unflatten(0, (len(levels), -1)) if len(chosen) % len(levels) == 0 else chosen
    if len(chosen) != len(levels):
        raise Unsupported(f"{len(chosen)} calls do not make {len(levels)} steps; give Forecast an interval instead")
    computed = rehash(similarities(chosen), threshold, longest)
    return Forecast("levels", levels=tuple(levels[step] for step in computed), order=0, quantity="output", warm_up=1)
