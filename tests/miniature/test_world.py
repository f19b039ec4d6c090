"""The miniature world: deterministic, resolution-free, and read back without error."""

import numpy as np
import pytest

from fastdiff.miniature import detector, render, tokenizer, world


def scenes(count: int, seed: int, kinds=(0.6, 0.2, 0.2)) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, kinds) for _ in range(count)]


def test_a_seed_names_a_scene_and_its_pixels():
    first, second = scenes(20, 3), scenes(20, 3)
    assert first == second
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(render.render(a), render.render(b))


@pytest.mark.parametrize("size", [48, 64, 100, 256])
def test_the_detector_reads_every_attribute_of_a_render(size):
    truth = scenes(120, size)
    accuracy = detector.score([render.render(scene, size) for scene in truth], truth)
    assert set(detector.ATTRIBUTES) <= set(accuracy)
    assert {key: np.nanmean(values) for key, values in accuracy.items()} == dict.fromkeys(accuracy, 1.0)


def test_shuffled_captions_score_at_chance():
    truth = scenes(400, 11, kinds=(1, 0, 0))
    images = [render.render(scene) for scene in truth]
    shuffled = [truth[i] for i in np.random.default_rng(0).permutation(len(truth))]
    accuracy = detector.score(images, shuffled)
    chance = {"background": 1 / 6, "colour": 1 / 8, "position": 1 / 5, "shape": 1 / 6, "size": 1 / 2}
    for key, level in chance.items():
        # Four standard errors of a coin of that bias.
        assert abs(accuracy[key].mean() - level) < 4 * np.sqrt(level * (1 - level) / 400) + 0.02, key


def test_larger_pictures_show_the_same_scene():
    for scene in scenes(20, 5):
        small, large = render.render(scene, 64).astype(float), render.render(scene, 256).astype(float)
        pooled = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(pooled - small).mean() < 3


def test_the_object_and_the_background_never_share_a_colour():
    assert all(thing.colour != scene.background for scene in scenes(500, 1, (1, 1, 0)) for thing in scene.things)
    with pytest.raises(ValueError, match="cannot be seen"):
        world.object_scene(np.random.default_rng(0), background="blue", colour="blue")


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"outside 8\.\.4096"):
        render.render(scenes(1, 0)[0], size)


def test_a_moving_object_follows_its_caption_and_stays_inside():
    rng = np.random.default_rng(4)
    for direction, (dx, dy) in world.DIRECTIONS.items():
        for pace, speed in world.PACES.items():
            scene = world.moving_scene(rng, direction, pace)
            assert f"moving {direction} {pace}" in world.caption(scene)
            assert scene.attributes.keys() == {"background", "texture", "colour", "shape", "size"}
            track = np.array([render.centre_at(scene, frame) for frame in range(200)])
            np.testing.assert_allclose(track[1] - track[0], [dx * speed, dy * speed], atol=1e-9)
            assert track.min() > 0 and track.max() < 1
            clip = render.render_clip(scene, 3)
            assert clip.shape == (3, 64, 64, 3) and clip.dtype == np.uint8
            for frame, image in enumerate(clip):
                assert np.abs(np.array(detector.locate(image)) - track[frame]).max() < 1.5 / 64


def test_a_clip_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        render.render_clip(scenes(1, 0)[0], 0)


def test_captions_can_leave_words_out_but_never_the_thing():
    rng = np.random.default_rng(2)
    scene = world.object_scene(np.random.default_rng(9), background="blue", colour="red", shape="circle")
    assert world.caption(scene, rng, drop=1.0) == "a red circle on a blue background"
    full = world.caption(scene)
    assert scene.things[0].size in full.split() and scene.texture in full.split()


def test_every_caption_word_is_one_token_and_strangers_are_spelled():
    tokenize = tokenizer.build()
    assert all(len(tokenize(word).input_ids) == 3 for word in world.vocabulary())
    words = {word for scene in scenes(500, 8) for word in world.caption(scene).split()}
    words |= set(world.caption(world.moving_scene(np.random.default_rng(0))).split())
    assert words <= set(world.vocabulary())
    assert max(len(world.caption(scene).split()) for scene in scenes(500, 8)) + 2 <= tokenizer.LENGTH
    assert len(tokenize("zebra").input_ids) > 3
    assert str(tokenize.decode(tokenize("zebra").input_ids, skip_special_tokens=True)).strip() == "zebra"


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import CLIPTokenizer

    built = tokenizer.build()
    built.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    text = [world.caption(scene) for scene in scenes(30, 6)] + ["", "a strange zebra"]
    assert loaded(text, padding="max_length").input_ids == built(text, padding="max_length").input_ids
    assert loaded.model_max_length == tokenizer.LENGTH


def test_the_detector_refuses_what_is_not_a_picture():
    with pytest.raises(ValueError, match="uint8"):
        detector.detect(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="images for"):
        detector.score([], scenes(1, 0))
    assert "colour" not in detector.detect(render.render(world.Scene("white")))
