"""Caches and fewer bits on models where diffusers' caches crash, mix branches or idle: Wan, Flux2, Z-Image, Kandinsky5.

Each is the real transformer from config with random weights, called the way its pipeline calls it, text left out.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import fastdiff
from fastdiff.anatomy import Anatomy
from fastdiff.audit import _silent
from fastdiff.caching.block_residual import BlockResidual
from fastdiff.caching.cachequant import CacheQuant
from fastdiff.caching.forecast import Forecast
from fastdiff.caching.units import UnitMask
from fastdiff.hooks import MISSING
from fastdiff.quantization.layer_precision import LayerPrecision
from fastdiff.quantization.stored import StoredWeights
from fastdiff.quantization.w8a8 import W8A8
from fastdiff.runtime.compile import Compile

STEPS = 6
NAMES = ("wan", "flux2", "z-image", "kandinsky5")
MEMBERS = {
    "repeat": Forecast(warm_up=2),
    "linear": Forecast(order=1, warm_up=2, quantity="output"),
    "adaptive": Forecast("adaptive", threshold=0.5, warm_up=2, max_run=2),
    "residual": BlockResidual(keep=0, warm_up=2),
    "attention": UnitMask((("self-attention", "*", 0.0, 1.0),), warm_up=2),
    "cachequant": CacheQuant((1.0, 0.8, 0.4)),
    "w8a8": W8A8(rotate="hadamard", minimum_features=8, path="eager"),
    "int4": StoredWeights("int4", minimum_features=8),
    "layers": LayerPrecision((("*attn*", "int8"), ("*", "mxfp4")), minimum_features=8),
}
# of weights: act on every call; what rounds activations may round the last bit of an input to another step
EVERY = ("w8a8", "int4", "layers")
ROUNDS = ("w8a8",)


def _nothing(step: int) -> None:
    pass


class Tiny:
    """A loop over one transformer with guidance in two calls, in one, or inside, as its pipeline does."""

    def __init__(self, name: str):
        self.name = name
        torch.manual_seed(4)
        self.transformer = _transformer(name).eval()
        generator = torch.Generator().manual_seed(5)
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.data.normal_(0, 0.05, generator=generator)
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, seeds: tuple[int, ...] = (0,), steps: int = STEPS, after: Callable = lambda step: None
    ) -> Tensor:
        shape = (16, 16) if self.name == "flux2" else (4, 1, 8, 8) if self.name == "z-image" else (4, 2, 8, 8)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(shape, generator=one) for one in noise])
        text = torch.stack([torch.randn(6, 16, generator=one) for one in noise])
        nothing = torch.zeros_like(text)
        self.scheduler.set_timesteps(steps)
        self._num_timesteps = steps
        for step, time in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self._velocity(x, time, text, nothing), time, x, return_dict=False)[0]
            after(step)
        return x

    def _velocity(self, x: Tensor, time: Tensor, text: Tensor, nothing: Tensor) -> Tensor:
        count = len(x)
        if self.name == "flux2":
            ids = torch.zeros(16, 4)
            ids[:, 1] = torch.arange(16)
            return self.transformer(
                hidden_states=x, timestep=time.expand(count) / 1000, guidance=torch.full((count,), 4.0),
                encoder_hidden_states=text, txt_ids=torch.zeros(6, 4), img_ids=ids, return_dict=False,
            )[0]  # fmt: skip
        if self.name == "z-image":
            both = list(x.repeat(2, 1, 1, 1, 1).unbind(0))
            at = ((1000 - time) / 1000).expand(2 * count)
            words = [*text.unbind(0), *nothing.unbind(0)]
            told = torch.stack(self.transformer(both, at, words, return_dict=False)[0])
            return -(told[:count] + 3 * (told[:count] - told[count:]))
        told, other = (self._call(x, time, words) for words in (text, nothing))
        return other + 5 * (told - other)

    def _call(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        if self.name == "wan":
            return self.transformer(
                hidden_states=x, timestep=time.expand(len(x)), encoder_hidden_states=words, return_dict=False
            )[0]
        positions = (torch.arange(2), torch.arange(4), torch.arange(4))
        return (
            self.transformer(
                hidden_states=x.permute(0, 2, 3, 4, 1), encoder_hidden_states=words, timestep=time.expand(len(x)),
                pooled_projections=words[:, 0], visual_rope_pos=positions, text_rope_pos=torch.arange(6),
            ).sample.permute(0, 4, 1, 2, 3)
        )  # fmt: skip


def _transformer(name: str) -> Any:
    if name == "wan":
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3,
        )  # fmt: skip
    if name == "flux2":
        return diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip
    if name == "z-image":
        return diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
        )  # fmt: skip
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
    )  # fmt: skip


@cache
def _pipe(name: str) -> Tiny:
    pipe = Tiny(name)
    pipe()
    return pipe


everywhere = pytest.mark.parametrize("name", NAMES)
each = pytest.mark.parametrize("kind", MEMBERS)


def _able(name: str, kind: str) -> tuple[Tiny, Any]:
    pipe, one = _pipe(name), MEMBERS[kind]
    verdict = one.supports(pipe)
    if not verdict:
        assert kind in ("attention", *EVERY)
        pytest.skip(verdict.reason)
    return pipe, one


@everywhere
@each
def test_it_engages_repeats_itself_and_is_removed_bit_for_bit(name: str, kind: str):
    pipe, one = _able(name, kind)
    plain = pipe()
    marks = {path: dict(vars(part)) for path, part in pipe.transformer.named_modules()}
    with fastdiff.accelerate(pipe, one, strict=True) as handle:
        first, second = pipe(), pipe()
        row = handle.report().rows[0]
        assert handle._requests.bytes_held == 0
    assert 0 < row.accelerated <= row.seen
    assert (row.accelerated == row.seen) == (kind in EVERY)
    assert not row.misses
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    for path, part in pipe.transformer.named_modules():
        for key in ("forward", "_diffusers_hook"):
            assert vars(part).get(key, MISSING) is marks[path].get(key, MISSING)
    assert torch.equal(pipe(), plain)


@everywhere
@each
def test_requests_that_overlap_or_break_off_do_not_meet(name: str, kind: str):
    pipe, one = _able(name, kind)
    with fastdiff.accelerate(pipe, one):
        solo = pipe((0,)), pipe((7,))
        inside: list[Tensor] = []

        def nested(step: int) -> None:
            if step == 2:
                inside.append(pipe((7,)))

        assert torch.equal(pipe((0,), after=nested), solo[0])
        assert torch.equal(inside[0], solo[1])
        barrier = threading.Barrier(2, timeout=60)
        found: dict[int, Tensor] = {}

        def work(seed: int) -> None:
            found[seed] = pipe((seed,), after=lambda step: barrier.wait())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(found[0], solo[0])
        assert torch.equal(found[7], solo[1])

        def fail(step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipe((7,), after=fail)
        assert torch.equal(pipe((0,)), solo[0])


@everywhere
@each
def test_a_row_does_not_depend_on_its_batch_mates_nor_a_run_on_the_last(name: str, kind: str):
    pipe, one = _able(name, kind)
    with fastdiff.accelerate(pipe, one):
        together = pipe((0, 3))
        alone = torch.cat([pipe((0,)), pipe((3,))])
        pipe((1,), steps=STEPS + 2)
        again = pipe((0, 3))
    torch.testing.assert_close(together, alone, rtol=0, atol=0.1 if kind in ROUNDS else 2e-4)
    assert torch.equal(together, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux2"])
def test_a_compiled_transformer_stays_one_graph(name: str):
    pipe, one = _able(name, "linear")
    with fastdiff.accelerate(pipe, one):
        expected = pipe()
    with fastdiff.accelerate(pipe, (one, Compile(backend="eager"))) as handle:
        for _ in range(2):
            torch.testing.assert_close(pipe(), expected, rtol=0, atol=1e-4)
        rows = {row.name: row for row in handle.report().rows}
    assert rows["Compile"].accelerated == rows["Compile"].seen > 0
    assert rows["Forecast"].accelerated > 0


@pytest.mark.parametrize(
    ("name", "silences"),
    [
        ("wan", ("TaylorSeer with its default patterns matches no module", "TextKVCache", "FasterCache")),
        ("flux2", ("FirstBlockCache on the transformer", "TextKVCache", "FasterCache")),
        ("z-image", ("FirstBlockCache on the transformer", "has no enable_cache")),
        ("kandinsky5", ("FirstBlockCache on the transformer", "TaylorSeer with its default", "TextKVCache")),
    ],
)
def test_the_audit_names_what_diffusers_would_do_in_silence(name: str, silences: tuple[str, ...]):
    said = " | ".join(_silent(_pipe(name)))
    for silence in (*silences, "opens no cache context", "tells caches no sigma", "ends in an exception"):
        assert silence in said, said


def test_the_parts_are_what_their_pipelines_have():
    from fastdiff.anatomy import anatomy

    for name in NAMES:
        pipe = _pipe(name)
        found = anatomy(pipe)
        assert isinstance(found, Anatomy)
        assert found.denoiser is pipe.transformer
