"""Moving scenes and the detector that reads them back."""

import numpy as np
import pytest

from fastdiff.miniature import moving, moving_detector, world


def scenes(count, seed=0, **fixed):
    rng = np.random.default_rng(seed)
    return [moving.scene(rng, **fixed) for _ in range(count)]


def test_scenes_come_back_by_seed_and_keep_what_is_fixed():
    assert scenes(3) == scenes(3)
    assert scenes(3) != scenes(3, seed=1)
    for scene in scenes(8, colour="red", shape="ring", direction="up", pace="slowly", background="white"):
        assert world.caption(scene) == "a big red ring moving up slowly on a plain white background"


def test_what_leaves_on_one_side_enters_on_the_other():
    scene = scenes(1, direction="right", pace="quickly")[0]
    period = round(1 / world.PACES["quickly"])
    assert np.array_equal(moving.render(scene, 3), moving.render(scene, 3, first=period))
    one, later = moving.render(scene, 1)[0], moving.render(scene, 1, size=32, first=period // 2)[0]
    assert np.array_equal(np.roll(one, 16, axis=1), later)


def test_a_clip_is_a_part_of_a_longer_one():
    scene = scenes(1)[0]
    assert np.array_equal(moving.render(scene, 9)[4:], moving.render(scene, 5, first=4))


def test_wrong_scenes_and_sizes_are_refused():
    still = world.object_scene(np.random.default_rng(0))
    with pytest.raises(ValueError, match="no moving scene"):
        moving.render(still)
    with pytest.raises(ValueError, match="at least one frame"):
        moving.render(scenes(1)[0], frames=0)


def test_the_detector_reads_every_word_of_a_render_back():
    drawn = scenes(60)
    found = moving_detector.score([moving.render(scene) for scene in drawn], drawn)
    for name in moving_detector.ATTRIBUTES:
        assert found[name].all(), name
    assert found["track_error_px"].max() < 0.25
    assert found["permanence"].all()
    assert found["flicker"].max() < 1e-3


def test_the_detector_is_at_chance_on_other_captions():
    drawn = scenes(120)
    found = moving_detector.score([moving.render(scene) for scene in drawn], drawn[1:] + drawn[:1])
    assert found["direction"].mean() < 0.5
    assert found["shape"].mean() < 0.4
    assert found["colour"].mean() < 0.4
    assert found["track_error_px"].mean() > 1


def test_track_error_is_a_distance_in_pixels():
    scene = scenes(1, direction="right", pace="quickly")[0]
    frames = moving.render(scene, 16)
    jumped = frames.copy()
    jumped[::2] = np.roll(frames[::2], 2, axis=2)  # to and fro by two pixels: one from the middle
    assert moving_detector.read(jumped, scene)["track_error_px"] == pytest.approx(1.0, abs=0.1)
    standing = np.repeat(frames[:1], 16, axis=0)
    speed = 32 * world.PACES["quickly"]
    expected = speed * np.sqrt((16**2 - 1) / 12)
    assert moving_detector.read(standing, scene)["track_error_px"] == pytest.approx(expected, rel=0.02)


def test_an_object_that_goes_is_missed_and_a_ground_that_flickers_is_seen():
    scene = scenes(1, background="gray")[0]
    frames = moving.render(scene, 16)
    gone = frames.copy()
    gone[12:] = np.array(world.BACKGROUNDS["gray"][0], np.uint8)
    assert moving_detector.read(gone, scene)["permanence"] == 0.75
    noisy = frames.astype(int)
    noisy[1::2] += 3
    assert moving_detector.read(noisy.astype(np.uint8), scene)["flicker"] == pytest.approx(3 / 255, rel=0.05)


def test_an_empty_picture_has_no_object():
    empty = np.full((4, 32, 32, 3), world.BACKGROUNDS["pink"][0], np.uint8)
    seen = moving_detector.look(empty)
    assert seen.words == {"background": "pink", "colour": "", "shape": ""}
    assert seen.permanence == 0.0
    assert np.isnan(seen.places).all()
    with pytest.raises(ValueError, match="two frames or more"):
        moving_detector.look(empty[:1])


def test_another_scene_moves_alike_in_other_words():
    rng, changed = np.random.default_rng(0), []
    for _ in range(100):
        seen = moving.scene(rng)
        other = moving.otherwise(seen, rng)
        assert np.array_equal(moving.centres(seen, 9), moving.centres(other, 9))
        assert other.things[0].colour != other.background
        was, now = moving.truth(seen), moving.truth(other)
        changed.append({name for name in was if was[name] != now[name]})
    assert set().union(*changed) == {"background", "colour", "shape"}
    assert {len(names) for names in changed} == {1, 2, 3}
