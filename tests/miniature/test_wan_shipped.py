"""The video model that ships keeps to its words, by its student and without end in sight."""

import numpy as np
import pytest
import torch

from benchmarks import drift
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
        chance = {"background": 0.2, "colour": 0.2, "shape": 0.3, "direction": 0.35, "pace": 0.6}
        assert all(means[name] > least for name, least in chance.items()), (mark, means)
        assert np.mean(seen["attribute"]) > 0.65, (mark, means)
