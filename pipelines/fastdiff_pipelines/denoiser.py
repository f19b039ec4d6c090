"""One way to call any image denoiser: B rows, each at its own timestep, each with its own conditioning.

The only file that knows how architectures differ. Which one it is, is read from the arguments of the model's forward,
not from its class name, so compiled, wrapped and renamed models are the same to it. Conditioning is a dict of tensors
with one row each, concatenated along rows by the stream.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import COMPILED_CALL
from fastdiff.runtime.compile import MARK
from fastdiff.sampling import algebra, schedule
from fastdiff_pipelines.conditions import adapter_scales, control_residuals, picture_rows

Conditioning = dict[str, torch.Tensor]


class Denoiser:
    """A pipeline's denoiser, looked up on the pipeline at every call so that replacing it there works.

    Attributes:
        channels: latent channels.
    """

    name: ClassVar[str] = "unet"
    arguments: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, pipe: Any, height: int, width: int):
        self.pipe = pipe
        self.height, self.width = height, width
        self.channels = int(self.module.config.in_channels)

    @property
    def module(self) -> Any:
        """The model as the pipeline holds it now."""
        return getattr(self.pipe, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """What its inputs must be."""
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        return self.module.device

    def table_options(self, latent_height: int, latent_width: int) -> dict[str, Any]:
        """What this architecture adds to a sampler's arguments: the grid and shift of flow models."""
        return {}

    def encode(self, prompt: str, embedded_guidance: float) -> Conditioning:
        """Conditioning of a prompt, one row."""
        raise NotImplementedError

    def encode_negative(self, prompt: str, embedded_guidance: float) -> Conditioning:
        """Conditioning of a negative prompt, one row; "" is what the pipeline itself takes when none is given."""
        raise NotImplementedError

    def pictures(self, settings: Any) -> Conditioning:
        """Conditioning of the settings' pictures, one row."""
        if settings.control is not None or settings.image_prompt is not None:
            raise Unsupported(f"pictures as conditions work with UNets, not with {type(self.module).__name__}")
        return {}

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Output ``[B, C, h, w]`` for states ``x`` of that shape at ``timesteps`` ``[B]``."""
        raise NotImplementedError


class UNet(Denoiser):
    """Stable Diffusion 1.x, 2.x and SDXL, with their distilled variants."""

    arguments = frozenset({"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs"})

    def __init__(self, pipe: Any, height: int, width: int):
        super().__init__(pipe, height, width)
        kind = getattr(self.module.config, "addition_embed_type", None)
        # "text" pools the prompt's own states inside the UNet: nothing more to pass
        if kind not in (None, "text", "text_time"):
            raise Unsupported(f"the stream does not know the UNet conditioning {kind!r}; it knows plain and SDXL's")
        self.sizes = kind == "text_time"

    def encode(self, prompt: str, embedded_guidance: float) -> Conditioning:
        found = self.pipe.encode_prompt(
            prompt=prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return self._conditioning(found[0], found[2] if self.sizes else None, embedded_guidance)

    def encode_negative(self, prompt: str, embedded_guidance: float) -> Conditioning:
        found = self.pipe.encode_prompt(
            prompt="",
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=prompt or None,
        )
        return self._conditioning(found[1], found[3] if self.sizes else None, embedded_guidance)

    def _conditioning(self, text: torch.Tensor, pooled: torch.Tensor | None, guidance: float) -> Conditioning:
        found = {"encoder_hidden_states": text.to(self.device, self.dtype)}
        if self.sizes:
            assert pooled is not None
            found["text_embeds"] = pooled.to(self.device, self.dtype)
            found["time_ids"] = self._time_ids(int(pooled.shape[-1])).to(self.device, self.dtype)
        width = getattr(self.module.config, "time_cond_proj_dim", None)
        if width is not None:
            scale = torch.tensor([guidance - 1.0])
            embedded = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
            found["timestep_cond"] = embedded.to(self.device, self.dtype)
        return found

    def _time_ids(self, pooled_width: int) -> torch.Tensor:
        """SDXL's sizes and crop; its refiner takes an aesthetic score (diffusers' default 6) instead of the target."""
        config = self.module.config
        total = self.module.add_embedding.linear_1.in_features - pooled_width
        size = [float(self.height), float(self.width)]
        if total == 6 * config.addition_time_embed_dim:
            return torch.tensor([[*size, 0.0, 0.0, *size]])
        return torch.tensor([[*size, 0.0, 0.0, 6.0]])

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        added: dict[str, Any] | None = None
        if self.sizes:
            added = {"text_embeds": conditioning["text_embeds"], "time_ids": conditioning["time_ids"]}
        net = getattr(self.pipe, "controlnet", None)
        options = control_residuals(net, x, timesteps, conditioning, added)
        if "image_embeds" in conditioning:
            added = {**(added or {}), "image_embeds": [conditioning["image_embeds"]]}
        with adapter_scales(self.module, conditioning):
            return self.module(
                x,
                timesteps,
                encoder_hidden_states=conditioning["encoder_hidden_states"],
                timestep_cond=conditioning.get("timestep_cond"),
                added_cond_kwargs=added,
                return_dict=False,
                **options,
            )[0]

    def pictures(self, settings: Any) -> Conditioning:
        return picture_rows(self.pipe, self.module, self.height, self.width, settings)


class SD3(Denoiser):
    """Stable Diffusion 3 and 3.5."""

    name = "transformer"
    arguments = frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"})

    def table_options(self, latent_height: int, latent_width: int) -> dict[str, Any]:
        patch = self.module.config.patch_size
        return {"mu": dynamic_mu(self.pipe.scheduler, (latent_height // patch) * (latent_width // patch))}

    def encode(self, prompt: str, embedded_guidance: float) -> Conditioning:
        return self._encode(prompt, prompt, positive=True)

    def encode_negative(self, prompt: str, embedded_guidance: float) -> Conditioning:
        return self._encode("", prompt, positive=False)

    def _encode(self, prompt: str, negative: str, positive: bool) -> Conditioning:
        found = self.pipe.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=not positive,
            negative_prompt=None if positive else negative or None,
        )
        text, pooled = (found[0], found[2]) if positive else (found[1], found[3])
        return {
            "encoder_hidden_states": text.to(self.device, self.dtype),
            "pooled_projections": pooled.to(self.device, self.dtype),
        }

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.module(hidden_states=x, timestep=timesteps, return_dict=False, **conditioning)[0]


class Flux(Denoiser):
    """FLUX.1: latents packed two by two into tokens, positions as ids, guidance as an input of the -dev models."""

    name = "transformer"
    arguments = frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"})

    def __init__(self, pipe: Any, height: int, width: int):
        super().__init__(pipe, height, width)
        self.channels //= 4
        self._ids: dict[tuple[int, int], torch.Tensor] = {}
        self._text_ids: torch.Tensor | None = None

    def table_options(self, latent_height: int, latent_width: int) -> dict[str, Any]:
        tokens = (latent_height // 2) * (latent_width // 2)
        return {"mu": dynamic_mu(self.pipe.scheduler, tokens), "uniform": True}

    def encode(self, prompt: str, embedded_guidance: float) -> Conditioning:
        text, pooled, ids = self.pipe.encode_prompt(prompt=prompt, prompt_2=None, device=self.device)
        self._text_ids = ids.to(self.device, self.dtype)
        found = {
            "encoder_hidden_states": text.to(self.device, self.dtype),
            "pooled_projections": pooled.to(self.device, self.dtype),
        }
        if getattr(self.module.config, "guidance_embeds", False):
            found["guidance"] = torch.tensor([embedded_guidance], device=self.device, dtype=torch.float32)
        return found

    def encode_negative(self, prompt: str, embedded_guidance: float) -> Conditioning:
        return self.encode(prompt, embedded_guidance)

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        rows, channels, height, width = x.shape
        tokens = x.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        output = self.module(
            hidden_states=tokens.reshape(rows, (height // 2) * (width // 2), channels * 4),
            timestep=timesteps.to(x.dtype) / 1000,
            img_ids=self._image_ids(height // 2, width // 2),
            txt_ids=self._text_ids,
            return_dict=False,
            **conditioning,
        )[0]
        output = output.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(rows, channels, height, width)

    def _image_ids(self, height: int, width: int) -> torch.Tensor:
        """Rows ``(0, y, x)`` for every token, ``[height * width, 3]``."""
        if (height, width) not in self._ids:
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(height * width, 3)
            self._ids[height, width] = ids.to(self.device, self.dtype)
        return self._ids[height, width]


class Captioned(Denoiser):
    """PixArt and Sana: caption tokens with a mask; the former may predict a variance too, which is left out."""

    name = "transformer"
    arguments = frozenset({"hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"})

    def __init__(self, pipe: Any, height: int, width: int):
        super().__init__(pipe, height, width)
        config = self.module.config
        self.time_scale = float(getattr(config, "timestep_scale", None) or 1.0)
        self.guided = bool(getattr(config, "guidance_embeds", False))
        self.added = "added_cond_kwargs" in forward_names(self.module)
        self.sizes = self.added and bool(getattr(self.module, "use_additional_conditions", False))

    def encode(self, prompt: str, embedded_guidance: float) -> Conditioning:
        found = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=self.device)
        return self._conditioning(found[0], found[1], embedded_guidance)

    def encode_negative(self, prompt: str, embedded_guidance: float) -> Conditioning:
        found = self.pipe.encode_prompt(
            "", do_classifier_free_guidance=True, negative_prompt=prompt, device=self.device
        )
        return self._conditioning(found[2], found[3], embedded_guidance)

    def _conditioning(self, text: torch.Tensor, mask: torch.Tensor, guidance: float) -> Conditioning:
        found = {
            "encoder_hidden_states": text.to(self.device, self.dtype),
            "encoder_attention_mask": mask.to(self.device),
        }
        if self.guided:
            scale = float(getattr(self.module.config, "guidance_embeds_scale", None) or 1.0)
            found["guidance"] = torch.tensor([guidance * scale], device=self.device, dtype=self.dtype)
        if self.sizes:
            size = torch.tensor([[float(self.height), float(self.width)]])
            found["resolution"] = size.to(self.device, self.dtype)
            found["aspect_ratio"] = torch.tensor([[self.height / self.width]]).to(self.device, self.dtype)
        return found

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        options: dict[str, Any] = dict(conditioning)
        if self.added:
            sizes = {name: options.pop(name) if self.sizes else None for name in ("resolution", "aspect_ratio")}
            options["added_cond_kwargs"] = sizes
        times = timesteps * self.time_scale if self.time_scale != 1.0 else timesteps
        output = self.module(x, timestep=times, return_dict=False, **options)[0]
        return output[:, : x.shape[1]]


ARCHITECTURES: tuple[type[Denoiser], ...] = (UNet, Flux, SD3, Captioned)


def denoiser_for(pipe: Any, height: int, width: int) -> Denoiser:
    """The way to call this pipeline's denoiser, for images of this size.

    Raises:
        Unsupported: the architecture is unknown, or its input is not a latent alone (inpainting, image editing).
    """
    for kind in ARCHITECTURES:
        module = getattr(pipe, kind.name, None)
        if module is not None and kind.arguments <= forward_names(module):
            found = kind(pipe, height, width)
            latent = getattr(getattr(pipe, "vae", None), "config", None)
            channels = getattr(latent, "latent_channels", None)
            if channels is not None and channels != found.channels:
                raise Unsupported(
                    f"{type(pipe).__name__}'s denoiser takes {found.channels} channels and its autoencoder makes "
                    f"{channels}: inpainting and editing models need inputs that a stream does not have"
                )
            return found
    raise Unsupported(
        f"no stream for {type(pipe).__name__}: it needs a UNet of the Stable Diffusion family, or an SD3, FLUX, PixArt "
        "or Sana transformer"
    )


def forward_names(module: Any) -> frozenset[str]:
    """Argument names of a model's forward, seen through compilation and wrappers."""
    plain = getattr(module, "_orig_mod", module)
    return frozenset(inspect.signature(type(plain).forward).parameters)


def dynamic_mu(scheduler: Any, tokens: int) -> float | None:
    """The exponent of the resolution-dependent shift, None when the scheduler does not use it."""
    config = schedule.config_of(scheduler)
    if not config.get("use_dynamic_shifting"):
        return None
    return algebra.dynamic_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def is_compiled(module: Any) -> bool:
    """Whether torch.compile acts on a model or on any part of it."""
    if hasattr(module, "_orig_mod") or getattr(module, MARK, False):
        return True
    return any(
        hasattr(part, "_orig_mod") or getattr(part, COMPILED_CALL, None) is not None for part in module.modules()
    )
