"""Sequence parallelism for the transformers that diffusers can split: it does the work, this switches it on and off."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice
from fastdiff.anatomy import anatomy, clear_parallel_config, context_plan, parallel_config
from fastdiff.hooks import Hooks
from fastdiff.parallel.communicator import current

MODES = ("ulysses", "ring")


@dataclass(frozen=True)
class ContextParallel(Acceleration):
    """Turn on diffusers' context parallelism over all ranks.

    Args:
        mode: "ulysses" (all-to-all by heads; needs heads divisible by ranks) or "ring" (all keys and values gathered).
    """

    stage: ClassVar[str] = "devices"

    mode: str = "ulysses"

    def __post_init__(self):
        check_choice(type(self).__name__, "mode", self.mode, MODES)

    @property
    def exact(self) -> bool:
        """Up to rounding, both modes."""
        return True

    def conflict(self, other: Acceleration) -> str:
        if type(other).__name__ in ("PatchParallel", "ClipParallel"):
            return "both cut the same model; use one of them"
        return ""

    def supports(self, pipe: Any) -> Verdict:
        for name, denoiser in anatomy(pipe).denoisers.items():
            if context_plan(denoiser) is None:
                return Verdict(
                    False, f"diffusers has no plan to split {name} ({type(denoiser).__name__}); use PatchParallel"
                )
            if parallel_config(denoiser) is not None:
                return Verdict(False, f"{name} runs in parallel already")
            heads = getattr(denoiser.config, "num_attention_heads", None)
            if self.mode == "ulysses" and heads and heads % current().size:
                return Verdict(
                    False, f"{name} has {heads} heads, not divisible by {current().size} ranks; use mode='ring'"
                )
        if current().size == 1:
            return Verdict(True, "one rank: nothing was installed; launch more with torchrun")
        if not torch.accelerator.device_count():
            return Verdict(False, "diffusers' context parallelism needs one accelerator a rank, and none is here")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        from diffusers import ContextParallelConfig

        ranks = current().size
        # diffusers' own hooks do the work, and their calls cannot be seen from here
        hooks.counter.expects = "nothing"
        if ranks == 1:
            return
        config: dict[str, Any] = {f"{self.mode}_degree": ranks}
        for name, denoiser in anatomy(pipe).denoisers.items():
            try:
                denoiser.enable_parallelism(config=ContextParallelConfig(**config))
            except (ValueError, RuntimeError) as error:
                clear_parallel_config(denoiser)
                raise Unsupported(f"diffusers could not split {name}: {error}") from error
            hooks.on_undo(lambda denoiser=denoiser: _undo(denoiser))
            hooks.counter.note(f"{name}: diffusers' {self.mode} over {ranks} ranks")


def _undo(denoiser: Any) -> None:
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(denoiser, context_plan(denoiser))
    clear_parallel_config(denoiser)
