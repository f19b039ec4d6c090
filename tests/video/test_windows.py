"""Windows of frames: exact where frames do not look at each other, bounded where they do."""

import inspect
import itertools

import pytest
import torch

import fastdiff
from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import anatomy, denoiser_arguments
from fastdiff.anatomy_video import FrameLayout, frame_axis, frame_layout
from fastdiff.miniature.video_families import inputs, video_family
from fastdiff.video.windows import FrameWindows, cut, window_starts, window_weights

CLIPS = ["wan", "ltx", "cogvideox", "hunyuan", "animatediff", "svd"]
AXES = {"wan": 2, "ltx": 1, "cogvideox": 1, "hunyuan": 2, "animatediff": 2, "svd": 1}
LONG = 25


def clip(pipe, name, frames):
    generator = torch.Generator().manual_seed(0)
    given = inputs(name, frames)
    return pipe(**given, num_inference_steps=2, generator=generator, output_type="pt").frames


@pytest.mark.parametrize(("count", "size", "overlap"), [(9, 4, 1), (16, 16, 4), (17, 16, 4), (5, 8, 2), (10, 3, 0)])
def test_windows_cover_the_clip_and_end_with_it(count, size, overlap):
    starts = window_starts(count, size, overlap)
    covered = {frame for start in starts for frame in range(start, min(start + size, count))}
    assert covered == set(range(count))
    assert starts[-1] == max(0, count - size)
    assert all(b - a <= size - overlap for a, b in itertools.pairwise(starts))


def test_weights_rise_over_the_overlap():
    assert window_weights(6, 2).tolist() == [1, 2, 3, 3, 2, 1]
    assert window_weights(3, 0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_found(name):
    assert frame_axis(anatomy(video_family(name)).denoiser) == AXES[name]


def test_a_denoiser_of_pictures_has_none():
    from fastdiff.miniature.families import family

    for name in ("sd", "flux"):
        verdict = FrameWindows().supports(family(name))
        assert not verdict
        assert "no frames" in verdict.reason
    with pytest.raises(Unsupported, match="no frames"):
        frame_layout(anatomy(family("sd")).denoiser, {})


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_of_one_window_is_unchanged_and_a_longer_one_is_cut(name):
    pipe = video_family(name)
    short, long = clip(pipe, name, 9), clip(pipe, name, LONG)
    denoiser = anatomy(pipe).denoiser
    latents = {"wan": 7, "cogvideox": 7, "hunyuan": 7, "ltx": 7}.get(name, LONG)
    size = 3 if latents < LONG else 9
    seen = []
    forward = denoiser.forward

    def noted(*args, **kwargs):
        seen.append(frame_layout(denoiser, denoiser_arguments(denoiser, args, kwargs)).count)
        return forward(*args, **kwargs)

    denoiser.forward = noted
    with fastdiff.accelerate(pipe, fastdiff.Plan([FrameWindows(size, size // 3)])) as handle:
        assert torch.equal(clip(pipe, name, 9), short)
        whole = len(seen)
        made = clip(pipe, name, LONG)
        assert made.shape == long.shape
        assert torch.isfinite(made).all()
        assert not torch.equal(made, long)
        counted = handle.report()
    assert set(seen[whole:]) == {size}, "no call sees more frames than a window has"
    assert "FrameWindows" in str(counted)
    assert torch.equal(clip(pipe, name, LONG), long)


class Framewise(torch.nn.Module):
    """A denoiser whose frames do not look at each other."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        num_frames = hidden_states.shape[2]
        assert num_frames
        return (torch.sin(3 * hidden_states) * timestep.view(-1, 1, 1, 1, 1) + encoder_hidden_states.mean(),)


@pytest.mark.parametrize(("size", "overlap"), [(3, 1), (4, 3), (5, 0), (10, 9)])
def test_windows_of_independent_frames_give_the_whole(size, overlap):
    from fastdiff.video.windows import _Windows

    class Counter:
        def count(self, engaged): ...

        def note(self, line): ...

    class Hooks:
        counter = Counter()

    net = Framewise()
    windows = _Windows(FrameWindows(size, overlap), Hooks(), net)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 11, 4, 4, generator=generator, dtype=torch.float64)
    told = {"timestep": torch.tensor([0.3, 0.7], dtype=torch.float64), "encoder_hidden_states": torch.randn(2, 5, 8)}
    expected = net(latents, **told)[0]
    torch.testing.assert_close(windows.around(net.forward, latents, **told)[0], expected, atol=1e-12, rtol=0)


def test_what_belongs_to_frames_is_cut_with_them():
    layout = FrameLayout("hidden_states", 2, 6, 1)
    given = {
        "hidden_states": torch.arange(12.0).view(2, 1, 6, 1, 1),
        "timestep": torch.arange(24).view(2, 12),
        "image_rotary_emb": (torch.arange(12.0)[:, None], torch.arange(12.0)[:, None]),
        "encoder_hidden_states": torch.arange(12.0)[:, None],
        "guidance": None,
    }
    made = cut(given, layout, 2, 3)
    assert made["hidden_states"].flatten().tolist() == [2, 3, 4, 8, 9, 10]
    assert made["timestep"].tolist() == [list(range(4, 10)), list(range(16, 22))]
    assert made["image_rotary_emb"][0].flatten().tolist() == list(range(6))
    assert made["encoder_hidden_states"].flatten().tolist() == [2, 3, 4, 8, 9, 10]
    assert made["guidance"] is None


def test_pictures_beside_the_latents_are_cut_too_or_refused():
    layout = FrameLayout("hidden_states", 2, 6, 1)
    given = {"hidden_states": torch.zeros(1, 4, 6, 2, 2), "control_hidden_states_scale": torch.ones(6)}
    control = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 3, 6, 2, 2)
    still = torch.ones(1, 3, 1, 2, 2)
    made = cut(given | {"control_hidden_states": control, "first_frame": still}, layout, 2, 3)
    assert made["control_hidden_states"][0, 0, :, 0, 0].tolist() == [2, 3, 4]
    assert made["control_hidden_states_scale"].shape == (6,) and made["first_frame"] is still
    with pytest.raises(Unsupported, match="pose_hidden_states: 5 frames beside 6"):
        cut(given | {"pose_hidden_states": control[:, :, :5]}, layout, 2, 3)


def test_settings_are_checked_and_helios_has_its_own_chunks():
    with pytest.raises(ValueError, match="overlap"):
        FrameWindows(4, 4)
    verdict = FrameWindows().supports(video_family("helios"))
    assert not verdict
    assert "helios.chunks" in verdict.reason
    assert inspect.signature(FrameWindows).parameters["frames"].default == 16
