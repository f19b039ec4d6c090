"""The moving buffer in training: its levels, the very buffer that streams, and the student of its shares."""

import numpy as np
import pytest
import torch

from fastdiff.miniature import train, wan, wan_buffer, wan_rollout, wan_training, wan_weights
from fastdiff.video.causal import CausalWan
from fastdiff_pipelines.rollout.buffer import MovingBuffer, Partition

SHARES = wan_training.SHARES


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=noise(seed), dtype=torch.float64)


@pytest.mark.parametrize("under_way", [1, 2, 3, 4])
def test_every_frame_has_a_level_of_its_own_share(under_way):
    sigma, weight = wan_training.buffer_levels(200, under_way, np.random.default_rng(0))
    edges = wan_rollout.shifted(np.arange(SHARES + 1) / SHARES)
    if under_way == SHARES:
        assert (sigma[:, 0] <= 0.1).all()
        assert not weight[:, 0].any()
        sigma, weight = sigma[:, 1:], weight[:, 1:]
    assert sigma.shape == (200, under_way)
    assert weight.all()
    for frame, share in enumerate(range(SHARES - under_way, SHARES)):
        assert (sigma[:, frame] >= edges[share]).all()
        assert (sigma[:, frame] <= edges[share + 1]).all()
        assert np.ptp(sigma[:, frame]) > 0.9 * (edges[share + 1] - edges[share])


def test_windows_of_all_kinds_are_met():
    latents = drawn(8, 16, 9, 4, 4)
    seen = set()
    for seed in range(200):
        made, sigma, weight, causal = wan_training._window(latents, latents + 1, np.random.default_rng(seed))
        assert made.shape[2] == sigma.shape[1] == weight.shape[1]
        assert weight.any(1).all()
        seen.add((made.shape[2], causal))
    assert seen == {(5, True), (5, False), (1, False), (2, False), (3, False)}


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_it_is_the_buffer_that_streams(micro_steps):
    """Chunk for chunk, with any network: `MovingBuffer` with one clean reference."""
    mix = drawn(16, 16, seed=5) / 4

    def velocity(x, told):
        seen = x.flip(2) * 0.3 + x * (1 + told[:, None, :, None, None] / 1000)
        return torch.einsum("oc,bcfhw->bofhw", mix, seen)

    entering = [drawn(2, 16, 1, 4, 4, seed=10 + number) for number in range(10)]
    partition = Partition(chunks=SHARES, micro_steps=micro_steps, references=1)
    streamed = MovingBuffer(velocity, entering.__getitem__, partition, shift=wan.SHIFT)
    leaving = [done for _ in range(9) if (done := streamed.advance()) is not None]
    buffer, made = wan_buffer.Buffer(entering[0][:, :, :0], entering[0]), []
    for number in range(1, 10):
        crossed = buffer.crossed(velocity, micro_steps)
        if crossed.shape[2] == SHARES:
            made.append(crossed[:, :, :1])
        buffer = buffer.after(crossed, entering[number])
    assert len(made) == len(leaving) == 6
    torch.testing.assert_close(torch.cat(made, 2), torch.cat(leaving, 2), atol=1e-6, rtol=0)


def test_a_straight_flow_is_crossed_exactly_from_true_frames():
    """x = (1 - sigma) frame + sigma noise has the velocity noise - frame: the oldest frame comes out as it is."""
    frames = drawn(2, 16, 5, 4, 4)
    buffer = wan_buffer.Buffer.of(frames, True, noise(3))
    assert torch.equal(buffer.clean, frames[:, :, :1])
    assert torch.equal(
        buffer.noisy[:, :, -1:], torch.randn(frames[:, :, 1:].shape, generator=noise(3)).double()[:, :, -1:]
    )
    told = torch.randn(frames[:, :, 1:].shape, generator=noise(3)).double()

    def velocity(x, _told):
        return torch.cat([x[:, :, :1], told - frames[:, :, 1:]], dim=2)

    crossed = buffer.crossed(velocity, 2)
    torch.testing.assert_close(crossed[:, :, :1], frames[:, :, 1:2], atol=1e-6, rtol=0)
    lower = wan_buffer.levels(SHARES, 0.0).double()[:, None, None]
    torch.testing.assert_close(crossed, (1 - lower) * frames[:, :, 1:] + lower * told, atol=1e-6, rtol=0)


def test_guidance_by_the_same_words_is_none(pipe):
    words = torch.randn(2, 5, wan.TEXT_WIDTH, generator=noise())
    x, told = drawn(2, wan.CHANNELS, 3, 4, 4).float(), torch.tensor([[0.0, 500.0, 900.0]] * 2)
    with CausalWan(pipe.transformer) as causal, torch.no_grad():
        same = torch.cat([words[:1]] * 2)
        guided = wan_buffer.guided(causal, same, words[:1], 4.0)(x, told)
        far = wan_buffer.guided(causal, same, words[1:], 4.0)(x, told)
        from fastdiff.video.text import Text

        plain = causal(x, told, Text(same))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)
    assert (far - plain).abs().max() > 1e-3


def test_the_student_learns_its_teacher_does_not_and_it_loads(teach, learned, tmp_path, pipe):
    run = train.Run("mini-wan-buffer", images=40, batch=2, processes=1, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="train mini-wan first"):
        wan_buffer.mini_wan_buffer(run)
    teach()
    torch.manual_seed(0)
    module, loss = wan_buffer.mini_wan_buffer(run)
    values = [loss(step, 0, 2) for step in range(3)]
    assert values[1].item() == loss(1, 0, 2).item() > 0
    names = learned(module, values)
    assert names
    assert all("lora_" in name for name in names)
    wan_weights.export("mini-wan-buffer", module.state_dict())
    again = wan.pipeline(pipe.vae, pipe.text_encoder, wan.transformer())
    again.load_lora_weights(str(wan_weights.BUFFER_STUDENT))
    assert any("lora_" in name for name, _ in again.transformer.named_parameters())
