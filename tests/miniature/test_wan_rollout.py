"""The plain causal rollout, and the student that learns from its own."""

from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.miniature import train, wan, wan_forward, wan_rollout, wan_student, wan_weights
from fastdiff.video.causal import CausalWan
from fastdiff.video.streaming_vae import StreamingVAE


def prompts(seed=0, rows=2):
    return torch.randn(rows, 5, wan.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def test_levels_are_shifted_towards_noise():
    assert wan_rollout.sigmas(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert wan_rollout.sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25]


def test_a_rollout_is_what_the_causal_model_says_of_noise_after_clean_frames(pipe):
    text = prompts()
    with CausalWan(pipe.transformer) as causal:
        made = wan_rollout.Rollout(causal, text, noise()).clip(3, [1.0])
    generator, clean = noise(), torch.empty(2, wan.CHANNELS, 0, 4, 4)
    for frame in range(3):
        x = torch.randn(2, wan.CHANNELS, 1, 4, 4, generator=generator)
        told = torch.tensor([0.0] * frame + [1000.0]).expand(2, -1)
        mask = wan_forward.block_causal(frame + 1, 16)
        with torch.no_grad():
            whole = torch.cat([clean, x], dim=2)
            velocity = wan_forward.forward(pipe.transformer, whole, told, text, None, mask)
        clean = torch.cat([clean, x - velocity[:, :, -1:]], dim=2)
    torch.testing.assert_close(made, clean, atol=1e-4, rtol=0)


def test_guidance_by_the_same_words_changes_nothing(pipe):
    text = prompts(rows=1)
    with CausalWan(pipe.transformer) as causal:
        plain = wan_rollout.Rollout(causal, text, noise()).clip(2, wan_rollout.sigmas(2))
        guided = wan_rollout.Rollout(causal, text, noise(), text, 3.0).clip(2, wan_rollout.sigmas(2))
        with pytest.raises(ValueError, match="empty prompt"):
            wan_rollout.Rollout(causal, text, noise(), None, 3.0)
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def test_pixels_are_the_autoencoders(pipe):
    latents = torch.randn(1, wan.CHANNELS, 2, 4, 4, generator=noise())
    made = wan_rollout.pixels(pipe.vae, latents)
    with torch.no_grad():
        expected = pipe.vae.decode(StreamingVAE(pipe.vae).unscaled(latents)).sample
    assert made.shape == (1, 5, 32, 32, 3)
    assert np.abs(made.float() / 127.5 - 1 - expected.permute(0, 2, 3, 4, 1)).max() <= 1 / 255 + 1e-5


def test_a_context_from_the_middle_of_a_clip_says_where_things_go():
    rng = np.random.default_rng(0)
    for first, true, own in (wan_student.starts(4, rng) for _ in range(300)):
        assert 0 <= true <= wan_rollout.CONTEXT
        assert own >= 0
        assert first == 0 or (true >= 2 and first + true <= 9)


def test_the_flow_ends_where_a_straight_one_does():
    class Straight:
        def velocity(self, x, level):
            return torch.full_like(x, 2.0)

    x = torch.zeros(1, 1, 1, 2, 2)
    for level in (1.0, 0.9, 0.5, 0.2):
        end = wan_student.flow_end(Straight(), x, level)  # type: ignore[arg-type]
        torch.testing.assert_close(end, torch.full_like(x, -2 * level))


def test_the_student_learns_and_its_teacher_does_not(teach, learned, tmp_path):
    run = train.Run("mini-wan-student", images=40, batch=2, processes=1, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="train mini-wan first"):
        wan_student.mini_wan_student(run)
    teach()
    torch.manual_seed(0)
    module, loss = wan_student.mini_wan_student(run)
    values = [loss(step, 0, 2) for step in range(3)]
    assert values[1].item() == loss(1, 0, 2).item()
    names = learned(module, values)
    assert names
    assert all("lora_" in name for name in names)


def test_the_students_lora_loads_into_a_pipeline(homes, pipe):
    student: Any = wan_student.Student(pipe.transformer)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.02)
    wan_weights.export("mini-wan-student", student.state_dict())
    again = wan.pipeline(pipe.vae, pipe.text_encoder, wan.transformer())
    again.transformer.load_state_dict(pipe.transformer.state_dict())
    again.load_lora_weights(str(wan_weights.STUDENT))
    x, text = torch.randn(1, wan.CHANNELS, 1, 4, 4), prompts(rows=1)
    told = torch.tensor([500.0])
    with torch.no_grad():
        made = again.transformer(x, told, text, return_dict=False)[0]
        expected = student.transformer(x, told, text, return_dict=False)[0]
        plain = pipe.transformer(x, told, text, return_dict=False)[0]
    torch.testing.assert_close(made, expected, atol=2e-3, rtol=0)
    assert (made - plain).abs().max() > 0.01
