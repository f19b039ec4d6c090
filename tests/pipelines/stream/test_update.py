"""Live changes: frames in flight finish as they came, or are moved; no junk, no new shapes."""

from functools import partial
from typing import Any

import pytest
import torch

from fastdiff_pipelines import SequentialStream, Stream

exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

CHANGES: list[dict[str, Any]] = [
    dict(prompt="blue"),
    dict(strength=0.9),
    dict(guidance_scale=2.5),
    dict(delta=0.5),
    dict(seed=7),
    dict(timesteps=[900, 500, 100]),
    dict(negative_prompt="dark"),
    dict(guidance="self"),
    dict(sampler="tcd"),
    dict(noise="fresh"),
    dict(steps=2),
    dict(steps=5),
    dict(guidance="full", steps=4, prompt="blue", seed=3),
]
FIRST: dict[str, Any] = dict(steps=3, strength=0.6, guidance="onetime", guidance_scale=1.5, negative_prompt="grey")


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_finishing_frames_keep_the_settings_they_came_with(make_toy, clip, toy_size, change, pad):
    pipe = make_toy()
    stream = Stream(pipe, "red", pad=pad, **FIRST, **toy_size)
    reference = SequentialStream(make_toy(), "red", **FIRST, **toy_size)
    found, expected = [], []
    for k, frame in enumerate(clip):
        if k == 5:
            stream.update(**change)
            reference.update(**change)
        found += stream.push(frame)
        expected += reference.push(frame)
    found += stream.flush()
    assert [output.frame_id for output in found] == list(range(len(clip)))
    for one, other in zip(found, expected, strict=True):
        exactly(one.pixels, other.pixels)
        assert one.settings == other.settings
    if pad:
        assert set(pipe.unet.batches) == {4}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_retargeted_frames_all_come_out_with_the_new_settings(make_toy, clip, toy_size, change):
    pipe = make_toy()
    stream = Stream(pipe, "red", pad=True, on_update="retarget", **FIRST, **toy_size)
    found = [output for frame in clip[:5] for output in stream.push(frame)]
    stream.update(**change)
    settings = stream.settings
    later = [output for frame in clip[5:] for output in stream.push(frame)] + stream.flush()
    assert [output.frame_id for output in found + later] == list(range(len(clip)))
    assert all(output.settings == settings for output in later)
    assert all(bool(torch.isfinite(output.pixels).all()) for output in later)
    assert set(pipe.unet.batches) == {4}
    # frames that entered after the change never saw the old settings
    alone = SequentialStream(make_toy(), "red", **FIRST, **toy_size)
    alone.update(**change)
    for output in later[-5:]:
        alone._count = output.frame_id
        exactly(output.pixels, alone.push(clip[output.frame_id])[0].pixels)


def test_retargeting_changes_the_picture_at_once(make_toy, clip, toy_size):
    """Prompt to pixel: the next picture out under "retarget", n pictures later under "finish"."""
    delays = {}
    for policy in ("finish", "retarget"):
        plain, changed = (Stream(make_toy(), "red", steps=4, on_update=policy, **toy_size) for _ in range(2))
        for frame in clip[:5]:
            plain.push(frame)
            changed.push(frame)
        changed.update(prompt="blue")
        same = [torch.equal(plain.push(f)[0].pixels, changed.push(f)[0].pixels) for f in clip[5:]]
        delays[policy] = same.index(False)
    assert delays == {"finish": 3, "retarget": 0}


@pytest.mark.parametrize(
    ("prediction", "sampler"), [("epsilon", "lcm"), ("v_prediction", "ddim"), ("flow_prediction", "euler")]
)
def test_retargeting_to_the_same_settings_changes_nothing(make_toy, clip, toy_size, prediction, sampler):
    options: dict[str, Any] = dict(sampler=sampler, steps=3, guidance="onetime", guidance_scale=1.5)
    still, moved = (Stream(make_toy(prediction), "red", **options, **toy_size) for _ in range(2))
    for frame in clip:
        moved.update(on_update="retarget", prompt="red")
        for one, other in zip(still.push(frame), moved.push(frame), strict=True):
            assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_a_retargeted_frame_keeps_its_clean_estimate(make_toy, clip, toy_size, sampler):
    """With a network that always sees the frame itself behind the noise, no change of schedule can lose it."""
    latent = torch.nn.functional.pixel_unshuffle(torch.from_numpy(clip[0]).permute(2, 0, 1)[None] / 127.5 - 1.0, 2)
    pipe = make_toy("sample", network=lambda x, t, words: (latent.double() * 1.25).expand_as(x))
    stream = Stream(pipe, "red", steps=4, sampler=sampler, **toy_size)
    for _ in range(3):
        stream.push(clip[0])
    stream.update(on_update="retarget", strength=0.9, steps=6)
    outputs = stream.flush()
    assert len(outputs) == 3
    for output in outputs:
        # LCM's boundary keeps 1e-6 of a noisy state
        frame = torch.from_numpy(clip[0]).permute(2, 0, 1).double() / 255
        torch.testing.assert_close(output.pixels, frame, rtol=0, atol=1e-5)


LOOSE: dict[str, Any] = {
    "rtol": 0,
    "atol": 2e-3,
    "check_dtype": False,
}  # LCM's boundary keeps 1e-6 of a noisy state; DDIM nothing


def test_a_retargeted_state_stands_at_the_new_noise_level(make_toy, clip, toy_size):
    """Between two consistency steps a state is clean estimate plus fixed noise, before and after the change."""
    stream = Stream(make_toy(), "red", steps=4, **toy_size)
    for frame in clip[:3]:
        stream.push(frame)
    before = [(slot.step, slot.call.clean()[slot.row : slot.row + 1]) for slot in stream._flying if slot.call]
    stream.update(on_update="retarget", strength=0.9)
    table = stream._session.prepared.table
    assert [step for step, _ in before] == [3, 2, 1]
    for slot, (step, clean) in zip(stream._flying, before, strict=True):
        exactly(slot.latent, table.signal[step] * clean + table.noise[step] * slot.noises[step])


def test_waiting_frames_of_a_buffer_keep_their_settings_too(make_toy, clip, toy_size):
    stream = Stream(make_toy(), "red", steps=2, frame_buffer=3, **toy_size)
    stream.push(clip[0])
    stream.update(prompt="blue")
    outputs = [*stream.push(clip[1]), *stream.push(clip[2]), *stream.flush()]
    assert [output.settings.prompt for output in outputs] == ["red", "blue", "blue"]


def test_embeddings_are_made_once_per_prompt(make_toy, clip, toy_size):
    pipe = make_toy()
    stream = Stream(pipe, "red", **toy_size)
    list(stream.run(clip))
    stream.update(strength=0.8, seed=4)
    list(stream.run(clip))
    assert pipe.encoded == ["red"]
    stream.update(guidance="full", guidance_scale=2.0, negative_prompt="grey")
    stream.update(prompt="blue")
    assert sorted(set(pipe.encoded)) == ["", "blue", "grey", "red"] and pipe.encoded.count("grey") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(promt="blue"), "promt cannot be changed live"),
        (dict(frame_buffer=2), "frame_buffer cannot be changed live"),
        (dict(strength=0.0), "strength must be above 0"),
        (dict(strength=float("nan")), "strength must be a finite number"),
        (dict(steps=0), "steps must be 1 to"),
        (dict(steps=40, strength=0.3), "fewer than the"),
        (dict(guidance="cfg"), "guidance must be one of none, full, self, onetime"),
        (dict(guidance_scale=-1), "guidance_scale must be 0 to 100"),
        (dict(timesteps=[100, 900]), "timesteps must fall strictly"),
        (dict(sampler="euler"), "does not fit this model"),
        (dict(seed=-1), "seed must be"),
        (dict(prompt=3), "prompt must be a string"),
        (dict(on_update="now"), "on_update must be one of"),
    ],
    ids=str,
)
def test_a_refused_update_changes_nothing(make_toy, clip, toy_size, change, message):
    stream = Stream(make_toy(), "red", **toy_size)
    untouched = list(Stream(make_toy(), "red", **toy_size).run(clip[:4]))
    found = stream.push(clip[0])
    with pytest.raises((TypeError, ValueError), match=message):
        stream.update(**change)
    found += [*stream.push(clip[1]), *stream.push(clip[2]), *stream.push(clip[3]), *stream.flush()]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, untouched, strict=True))


def _compiled(pipe):
    """Compile the toy's denoiser with a backend that counts graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend=backend, dynamic=False, fullgraph=True)
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["none", "onetime", "full"])
@pytest.mark.parametrize("buffer", [1, 2])
def test_nothing_recompiles_between_warm_up_and_flush(make_toy, clip, toy_size, guidance, buffer):
    pipe = make_toy()
    options: dict[str, Any] = dict(steps=3, guidance=guidance, guidance_scale=1.0 if guidance == "none" else 1.5)
    expected = list(SequentialStream(make_toy(), "red", **options, **toy_size).run(clip[:4]))
    pipe.unet.batches = type("Deaf", (list,), {"append": lambda self, size: None})()
    graphs = _compiled(pipe)
    stream = Stream(pipe, "red", frame_buffer=buffer, **options, **toy_size)
    stream.warmup()
    assert len(graphs) == 1
    found = list(stream.run(clip[:4]))
    for one, other in zip(found, expected, strict=True):
        exactly(one.pixels, other.pixels)
    for change in (
        dict(prompt="blue"),
        dict(steps=2),
        dict(steps=5, strength=0.9),
        dict(guidance="full", guidance_scale=2.0),
    ):
        for policy in ("finish", "retarget"):
            for frame in clip[:3]:
                stream.push(frame)
            stream.update(on_update=policy, **change)
    stream.flush()
    assert len(graphs) == 1
    report = stream.report()
    assert report.padded and report.shapes == 1 and report.recompiles == 0
    assert report.frames_in == report.frames_out == 4 + 24
