"""Metrics and intervals with known answers."""

import math

import numpy as np
import pytest
import torch

from fastdiff.quality import Interval, mean_interval, paired_difference, paired_median_difference, psnr, ssim


def test_psnr_of_a_constant_offset():
    a = torch.rand(3, 3, 20, 24) * 0.5
    for offset in (0.5, 0.1, 0.003):
        torch.testing.assert_close(
            psnr(a, a + offset), torch.full((3,), -20 * math.log10(offset)).double(), atol=1e-4, rtol=0
        )
    assert torch.isinf(psnr(a, a)).all()


def test_ssim_against_its_definition_at_one_window():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 11, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = (-axis.square() / 4.5).exp()
    weights = torch.outer(line, line) / line.sum() ** 2

    def mean(x):
        return (weights * x[0, 0]).sum()

    va, vb, cov = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
    light = (2 * mean(a) * mean(b) + 1e-4) / (mean(a) ** 2 + mean(b) ** 2 + 1e-4)
    truth = light * (2 * cov + 9e-4) / (va + vb + 9e-4)
    torch.testing.assert_close(ssim(a, b)[0], truth, atol=1e-12, rtol=0)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    a = torch.rand(2, 3, 33, 40)
    torch.testing.assert_close(ssim(a, a), torch.ones(2).double())
    little, much = (ssim(a, (a + s * torch.randn_like(a)).clamp(0, 1)) for s in (0.05, 0.4))
    assert (much < little).all() and (little < 1).all()


def test_pictures_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))
    with pytest.raises(ValueError, match="divide uint8"):
        psnr(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = mean_interval(rng.normal(0.3, 1, 100), seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, 300)
    x, y = shared + rng.normal(0.5, 0.1, 300), shared + rng.normal(0, 0.1, 300)
    paired = paired_difference(x, y)
    assert paired.low < 0.5 < paired.high and paired.high - paired.low < 0.05
    alone = mean_interval(x)
    assert alone.high - alone.low > 1
    assert abs(paired_median_difference(x, y).value - np.median(x - y)) < 1e-12


def test_missing_and_infinite_samples():
    assert paired_difference([1, np.nan, 0], [0, 1, 0]).n == 2
    assert math.isnan(mean_interval([]).value)
    infinite = mean_interval([np.inf, 30.0])
    assert infinite.value == infinite.low == infinite.high == np.inf
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1, 2], [1])
    assert Interval.exact(3).as_json() == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1}


def test_same_seed_same_interval():
    values = np.random.default_rng(5).random(50)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)
