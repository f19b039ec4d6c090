"""MMD² on fixed features: nothing between sets of one law, the known value between others."""

import numpy as np
import pytest
import torch

from fastdiff.miniature import render, world
from fastdiff.quality.distribution import features, mmd2, mmd2_difference


def _pictures(count: int, seed: int, **fixed: str) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    drawn = [render.render(world.object_scene(rng, **fixed), 32) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).double() / 255


def test_sets_of_one_law_are_not_told_apart_and_others_are():
    one, other = features(_pictures(200, 1)), features(_pictures(200, 2))
    same = mmd2(one, other)
    assert same.low < 0 < same.high
    red = features(_pictures(200, 3, colour="red", background="white"))
    assert mmd2(one, red).low > same.high


def test_a_shift_has_the_kernels_value():
    """Two points: every kernel value is known, so MMD² is k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = mmd2(a.expand(10, -1), b.expand(10, -1))
    assert found.value == pytest.approx(2**3 + 2**3 - 2 * 1**3)
    assert found.high - found.low == pytest.approx(0)


def test_it_is_unbiased_and_its_interval_holds_what_it_says():
    generator = torch.Generator().manual_seed(0)
    found = [mmd2(*torch.randn(2, 40, 3, generator=generator, dtype=torch.float64) * 0.5) for _ in range(400)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 4 * values.std() / 20
    shift = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    moved = []
    for _ in range(400):
        x, y = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64) * 0.5
        moved.append(mmd2(x + shift, y))
    truth = np.mean([one.value for one in moved])
    assert np.mean([one.low <= truth <= one.high for one in moved]) > 0.88


def test_a_difference_is_the_difference():
    generator = torch.Generator().manual_seed(1)
    x, y, z = torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    assert mmd2_difference(x, z, y).value == pytest.approx(mmd2(x, y).value - mmd2(z, y).value)
    assert mmd2_difference(x, x, y).high == pytest.approx(0)


def test_features_do_not_depend_on_the_size_of_a_plain_picture():
    plain = torch.full((1, 3, 16, 16), 0.3)
    larger = torch.full((1, 3, 40, 24), 0.3)
    torch.testing.assert_close(features(plain), features(larger))
    assert features(plain).shape == (1, 640)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="sides"):
        features(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="one shape"):
        mmd2(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 3"):
        mmd2(torch.zeros(2, 2), torch.zeros(2, 2))
