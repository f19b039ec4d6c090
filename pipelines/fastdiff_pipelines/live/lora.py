"""LoRA scales that move while frames flow: weights in place, always made anew from a saved copy.

Adding and subtracting a scaled update drifts, because every addition rounds; writing ``saved + scale * update`` does
not, and at scale 0 the saved weights are back bit for bit. The tensors stay the same objects, so nothing compiles anew
and a step costs what it cost without an adapter. Scales act on the model: frames in flight get them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.acceleration import Unsupported


class LiveLora:
    """The adapters of a pipeline's denoiser, merged into its weights at scales that may change at any time.

    Args:
        module: the denoiser, with adapters loaded by diffusers (`pipe.load_lora_weights`, through peft). They are
            switched off there, as they act through the weights from now on.

    Raises:
        Unsupported: no adapter is loaded, or one changes more than a layer's weight.
    """

    def __init__(self, module: torch.nn.Module):
        layers = _adapted(module)
        if not layers:
            raise Unsupported("no LoRA is loaded on this model; call pipe.load_lora_weights first")
        self.names = tuple(dict.fromkeys(name for layer in layers.values() for name in layer.lora_A))
        self._parts: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        for path, layer in layers.items():
            weight = layer.get_base_layer().weight
            updates = {}
            for name in layer.lora_A:
                if name in getattr(layer, "lora_magnitude_vector", {}):
                    raise Unsupported(f"{path}: DoRA does not scale as a sum; load a plain LoRA")
                layer.set_scale(name, 1.0)
                updates[name] = layer.get_delta_weight(name).detach().to(weight.device)
            self._parts.append((weight, weight.detach().clone(), updates))
            layer.enable_adapters(False)
        self._scales = dict.fromkeys(self.names, 0.0)

    @property
    def scales(self) -> dict[str, float]:
        """What is in the weights now."""
        return dict(self._scales)

    def set(self, scales: Mapping[str, float]) -> bool:
        """Write weights for these scales; adapters not named keep theirs. Whether anything had to change.

        Raises:
            ValueError: an adapter that is not loaded.
        """
        unknown = [name for name in scales if name not in self._scales]
        if unknown:
            raise ValueError(f"no adapter is called {', '.join(unknown)}; loaded are {', '.join(self.names)}")
        wanted = self._scales | {name: float(scale) for name, scale in scales.items()}
        if wanted == self._scales:
            return False
        with torch.no_grad():
            for weight, saved, updates in self._parts:
                made = saved
                for name, update in updates.items():
                    if wanted[name]:
                        made = made + wanted[name] * update
                weight.data.copy_(made)
        self._scales = wanted
        return True

    def remove(self) -> None:
        """The weights as they were, bit for bit; the adapters stay switched off."""
        self.set(dict.fromkeys(self.names, 0.0))


def _adapted(module: torch.nn.Module) -> dict[str, Any]:
    return {path: one for path, one in module.named_modules() if len(getattr(one, "lora_A", ()))}
