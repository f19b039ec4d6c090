"""The video model that ships keeps to its words, by its student and without end in sight."""

import numpy as np
import pytest
import torch

from benchmarks import drift, switch
from benchmarks.video import embedded
from fastdiff.miniature import moving_detector


@pytest.mark.slow
def test_rollouts_show_what_the_caption_says():
    pipe, missing = embedded()
    assert not missing
    scenes = drift.scenes_of(24)
    torch.manual_seed(0)
    found = drift.followed(pipe, scenes, (5, 40))
    for mark, seen in found.items():
        means = {name: float(np.mean(seen[name])) for name in moving_detector.ATTRIBUTES}
        assert all(mean > 0.6 for mean in means.values()), (mark, means)
        assert np.mean(seen["attribute"]) > 0.8, (mark, means)
    assert np.mean(found[40]["attribute"]) > np.mean(found[5]["attribute"]) - 0.1


@pytest.mark.slow
def test_words_that_change_are_seen_within_two_chunks():
    pipe, _ = embedded()
    before = drift.scenes_of(24)
    after = switch.recoloured(before)
    _, chunks = switch.switched(pipe, before, after, {})
    found = switch.read(chunks[1], before, after)
    assert found["new_colour"].value > 0.5, found
    assert found["old_colour"].value < 0.15, found
