"""Blending, ramps, LoRA from a saved copy, ControlNet and IP-Adapter rows: known answers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig

from fastdiff.acceleration import Unsupported
from fastdiff_pipelines import Stream
from fastdiff_pipelines.blending import blend, blend_conditioning, slerp
from fastdiff_pipelines.conditions import Picture, resized
from fastdiff_pipelines.denoiser import UNet
from fastdiff_pipelines.live import Controls, IdentityStream, LiveLora, LiveSession
from fastdiff_pipelines.settings import Settings


def test_slerp_is_the_arc_between_two_directions() -> None:
    a, b = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for share in (0.1, 0.5, 0.9):
        angle = torch.tensor(share * np.pi / 2, dtype=torch.float64)
        expected = 2 * torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(slerp(a, b, share)[0], expected, rtol=1e-12, atol=1e-12)
    assert slerp(a, b, 0) is a
    assert slerp(a, b, 1) is b
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, -a, 0.5), torch.zeros_like(a))


def test_blended_noise_stays_noise() -> None:
    a, b = torch.randn(2, 4, 64, 64).chunk(2)
    for share in (0.25, 0.5):
        assert float(slerp(a, b, share, dims=4).std()) == pytest.approx(1, abs=0.02)
    # what a straight line would do, and why it is not taken
    assert float((0.5 * a + 0.5 * b).std()) < 0.75
    assert float(blend([a, b, a], [1, 1, 1], dims=4).std()) == pytest.approx(1, abs=0.1)


def test_masks_are_united_and_lengths_must_agree() -> None:
    one = {"states": torch.randn(1, 2, 4), "mask": torch.tensor([[1, 0]])}
    other = {"states": torch.randn(1, 2, 4), "mask": torch.tensor([[0, 1]])}
    assert blend_conditioning([one, other], [1, 1])["mask"].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="differ in length"):
        blend_conditioning([one, {**other, "states": torch.randn(1, 3, 4)}], [1, 1])


def test_a_blend_of_equal_prompts_and_seeds_changes_nothing(make_toy, clip, toy_size) -> None:
    plain = list(Stream(make_toy(), "a", seed=3, **toy_size).run(clip))
    stream = Stream(make_toy(), "a", seed=3, **toy_size)
    stream.update(prompts=(("a", 0.4), ("a", 0.6)), seeds=((3, 1.0), (3, 2.0)))
    for one, other in zip(plain, stream.run(clip), strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-12)


def test_a_ramp_encodes_its_ends_once_and_arrives_where_a_plain_change_does(make_toy, clip, toy_size) -> None:
    pipe = make_toy()
    stream = Stream(pipe, "a", steps=2, **toy_size)
    pipe.encoded.clear()
    for share in (0.25, 0.5, 0.75):
        stream.update(prompts=(("a", 1 - share), ("b", share)))
    assert pipe.encoded == ["b"]
    stream.update(prompt="b")
    assert stream.settings.prompts == ()
    assert pipe.encoded == ["b"]
    fresh = list(Stream(make_toy(), "b", steps=2, **toy_size).run(clip))
    for one, other in zip(fresh, stream.run(clip), strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "pairs", [(("a", -1.0),), ((3, 1.0),), (("a", float("nan")),), (("a", 0.0),), "ab", (("a", 1.0),) * 17]
)
def test_impossible_blends_are_refused(pairs: Any) -> None:
    with pytest.raises(ValueError, match="prompts must be"):
        Settings("a", prompts=pairs)


def test_ramps_take_seconds_and_not_frames() -> None:
    controls = Controls(Settings("a", strength=0.2, guidance_scale=1.0), {"style": 0.0})
    controls.set(10.0, 4.0, strength=0.6, **{"lora:style": 1.0})
    assert controls.at(10.0)["strength"] == pytest.approx(0.2)
    assert controls.at(11.0)["strength"] == pytest.approx(0.3)
    assert controls.at(12.0)["lora:style"] == pytest.approx(0.5)
    assert controls.moving
    assert controls.at(20.0)["strength"] == 0.6
    assert not controls.moving
    assert controls.settings.strength == 0.6


def test_a_ramp_that_is_turned_starts_from_where_it_was() -> None:
    controls = Controls(Settings("a", seed=1))
    controls.set(0.0, 2.0, prompt="b", seed=9)
    assert dict(controls.at(1.0)["prompts"]) == {"a": 0.5, "b": 0.5}
    assert dict(controls.at(1.0)["seeds"]) == {1: 0.5, 9: 0.5}
    controls.set(1.0, 2.0, prompt="c")
    assert dict(controls.at(1.0)["prompts"]) == {"a": 0.5, "b": 0.5}
    assert dict(controls.at(2.0)["prompts"]) == {"a": 0.25, "b": 0.25, "c": 0.5}
    found = controls.at(3.0)
    assert (found["prompt"], found["prompts"]) == ("c", ())


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"height": 4}, TypeError), ({"lora:none": 1.0}, TypeError), ({"strength": 7}, ValueError),
     ({"seconds": -1}, ValueError), ({"seconds": 1e9}, ValueError)],
)  # fmt: skip
def test_a_wrong_change_changes_nothing(changes: dict[str, Any], error: type[Exception]) -> None:
    controls = Controls(Settings("a"))
    before = controls.at(0.0)
    with pytest.raises(error):
        controls.set(0.0, **{"prompt": "b", **changes})
    assert controls.at(1.0) == before
    assert controls.version == 0


def _lora_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    for name in ("style", "other"):
        unet.add_adapter(
            LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name=name
        )
    return unet.eval()


def _call(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, words = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([3.0, 9.0]), encoder_hidden_states=words).sample


def test_lora_scales_equal_pefts_and_a_thousand_changes_leave_no_drift() -> None:
    unet = _lora_unet()
    unet.set_adapters(["style", "other"], [0.3, 0.8])
    expected = _call(unet)
    unet.disable_adapters()
    bare = _call(unet)
    lora = LiveLora(unet)
    assert torch.equal(_call(unet), bare)
    weights = list(unet.parameters())
    for number in range(1000):
        lora.set({"style": (number % 17) / 10, "other": (number % 5) / 3})
    assert lora.set({"style": 0.3, "other": 0.8})
    assert not lora.set({"style": 0.3})
    torch.testing.assert_close(_call(unet), expected, rtol=1e-5, atol=1e-6)
    assert all(one is other for one, other in zip(weights, unet.parameters(), strict=True))
    lora.remove()
    assert torch.equal(_call(unet), bare)


def test_adding_and_subtracting_would_have_drifted() -> None:
    weight, update = torch.randn(64, 64), torch.randn(64, 64)
    drifted = weight.clone()
    for number in range(1000):
        scale = (number % 17) / 10
        drifted += scale * update
        drifted -= scale * update
    assert not torch.equal(drifted, weight)


def test_without_an_adapter_live_lora_says_so() -> None:
    with pytest.raises(Unsupported, match="load_lora_weights"):
        LiveLora(torch.nn.Linear(2, 2))
    lora = LiveLora(_lora_unet())
    with pytest.raises(ValueError, match="style"):
        lora.set({"absent": 1.0})


def _controlled() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8)).eval()
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.get_parameter("weight"), std=0.3)
    pipe = SimpleNamespace(unet=unet.eval(), controlnet=net)
    pipe.encode_prompt = lambda prompt, **_: (torch.full((1, 3, 8), float(len(prompt))),)
    return pipe


def test_every_row_has_its_own_control_picture_and_scale() -> None:
    pipe = _controlled()
    denoiser = UNet(pipe, 64, 64)
    rng = np.random.default_rng(0)
    pictures = [Picture(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), scale) for scale in (0.0, 0.4, 1.3)]
    settings = [Settings("abc", control=one) for one in pictures]
    conditions = [{**denoiser.encode("abc", 1.0), **denoiser.pictures(one)} for one in settings]
    x, times = torch.randn(3, 4, 8, 8), torch.tensor([5.0, 9.0, 20.0])
    joined = {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
    with torch.no_grad():
        together = denoiser(x, times, joined)
        for row, (condition, picture) in enumerate(zip(conditions, pictures, strict=True)):
            here = slice(row, row + 1)
            image = torch.from_numpy(picture.image).permute(2, 0, 1)[None] / 255
            down, middle = pipe.controlnet(
                x[here], times[here], condition["encoder_hidden_states"], image, picture.scale, return_dict=False
            )
            expected = pipe.unet(
                x[here], times[here], condition["encoder_hidden_states"],
                down_block_additional_residuals=down, mid_block_additional_residual=middle,
            ).sample  # fmt: skip
            torch.testing.assert_close(together[here], expected, rtol=1e-4, atol=1e-5)
        bare = pipe.unet(x[:1], times[:1], conditions[0]["encoder_hidden_states"]).sample
        torch.testing.assert_close(together[:1], bare, rtol=1e-4, atol=1e-5)


def _with_image_prompt() -> Any:
    pipe = _controlled()
    pipe.controlnet = None
    state: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    state["image_proj"] = {
        "proj.weight": torch.randn(4 * 8, 6), "proj.bias": torch.randn(32), "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }  # fmt: skip
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for number in range(len(cross)):
        key = 2 * number + 1
        state["ip_adapter"][f"{key}.to_k_ip.weight"] = torch.randn(8, 8)
        state["ip_adapter"][f"{key}.to_v_ip.weight"] = torch.randn(8, 8)
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    pipe.prepare_ip_adapter_image_embeds = lambda image, *_: [torch.full((1, 1, 6), float(image))]
    return pipe


def test_every_row_has_its_own_image_prompt_and_scale() -> None:
    pipe = _with_image_prompt()
    denoiser = UNet(pipe, 64, 64)
    scales = (0.0, 0.5, 1.5)
    conditions = [
        {**denoiser.encode("ab", 1.0), **denoiser.pictures(Settings("ab", image_prompt=Picture(1 + k, scale)))}
        for k, scale in enumerate(scales)
    ]
    x, times = torch.randn(3, 4, 8, 8), torch.tensor([5.0, 9.0, 20.0])
    joined = {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
    adapted = [one for one in pipe.unet.attn_processors.values() if hasattr(one, "to_k_ip")]
    before = [list(one.scale) for one in adapted]
    with torch.no_grad():
        together = denoiser(x, times, joined)
        assert [list(one.scale) for one in adapted] == before
        for row, (condition, scale) in enumerate(zip(conditions, scales, strict=True)):
            for one in adapted:
                one.scale = [scale]
            here = slice(row, row + 1)
            expected = pipe.unet(
                x[here], times[here], condition["encoder_hidden_states"],
                added_cond_kwargs={"image_embeds": [condition["image_embeds"]]},
            ).sample  # fmt: skip
            torch.testing.assert_close(together[here], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1:2], together[2:3])


def test_pictures_without_a_model_for_them_are_refused() -> None:
    pipe = _controlled()
    pipe.controlnet = None
    denoiser = UNet(pipe, 64, 64)
    picture = Picture(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(Unsupported, match="no ControlNet"):
        denoiser.pictures(Settings("a", control=picture))
    with pytest.raises(Unsupported, match="load_ip_adapter"):
        denoiser.pictures(Settings("a", image_prompt=picture))
    with pytest.raises(ValueError, match="0 to 2"):
        Picture(None, 3.0)


def test_a_control_picture_follows_the_size_of_the_stream() -> None:
    picture = Picture(np.full((64, 32, 3), 77, np.uint8), 0.5)
    assert resized(picture, 64, 32) is picture
    small = resized(picture, 32, 16)
    assert small.image.shape == (32, 16, 3)
    assert small.scale == 0.5
    assert set(small.image.reshape(-1)) == {77}
    seen: list[Picture] = []

    class Watching(IdentityStream):
        def update(self, **changes: Any) -> None:
            seen.extend(changes[name] for name in ("control",) if changes.get(name) is not None)
            super().update(**changes)

    session = LiveSession(lambda scale, plan: Watching(16, 16), Controls(Settings("", control=picture)))
    for number in range(3):
        session.offer(np.zeros((16, 16, 3), np.uint8), number)
        session.step()
    assert [one.image.shape for one in seen] == [(16, 16, 3)]
