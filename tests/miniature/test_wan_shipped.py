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
        assert means["colour"] > 0.5, (mark, means)
        assert means["direction"] > 0.5, (mark, means)
        assert means["background"] > 0.6, (mark, means)
