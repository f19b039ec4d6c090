"""Metrics with a network that is brought along, the control row, medians and quantiles."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.quality import equal_latency, median_interval, quantile_interval
from fastdiff.quality.learned import clip_score, perceptual


def test_a_distance_is_the_networks_on_the_range_it_knows():
    a = torch.rand(3, 3, 8, 8)
    seen = []

    def network(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((float(x.min()), float(x.max())))
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    assert torch.equal(perceptual(a, a, network), torch.zeros(3, dtype=torch.float64))
    found = perceptual(a, a * 0.5, network)
    torch.testing.assert_close(found, (a * 0.5).double().mean((1, 2, 3)) * 2)
    assert all(-1 <= low < 0 < high <= 1 for low, high in seen)
    with pytest.raises(ValueError, match="of one shape"):
        perceptual(a, a[:2], network)


def test_clip_score_is_the_cosine_pair_by_pair():
    pictures = torch.rand(2, 3, 4, 4)

    def processor(text: list[str], images: list[np.ndarray], **_: Any) -> dict[str, Any]:
        assert images[0].shape == (4, 4, 3)
        assert images[0].dtype == np.uint8
        return {"count": len(text)}

    def model(count: int) -> Any:
        return SimpleNamespace(
            image_embeds=torch.tensor([[2.0, 0.0], [0.0, 3.0]]), text_embeds=torch.tensor([[1.0, 1.0], [0.0, -1.0]])
        )

    found = clip_score(pictures, ["a", "b"], model, processor)
    torch.testing.assert_close(found, torch.tensor([100 / 2**0.5, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="2 pictures for 1 texts"):
        clip_score(pictures, ["a"], model, processor)


def test_the_control_takes_as_long_as_what_it_is_held_against():
    row = equal_latency(1.0, lambda steps: 0.1 + 0.05 * steps, most=50)
    assert row.steps == 18
    assert row.equal
    assert row.off == pytest.approx(0)
    far = equal_latency(1.0, lambda steps: 0.4 * steps, most=50, least=2)
    assert far.steps == 2
    assert not far.equal
    with pytest.raises(ValueError, match="no range"):
        equal_latency(1.0, float, most=1, least=2)


def test_medians_and_quantiles_have_intervals_that_hold_them():
    samples = np.random.default_rng(0).normal(30, 2, 400)
    middle, tenth = median_interval(samples), quantile_interval(samples, 0.1)
    assert middle.value == np.median(samples)
    assert middle.low < middle.value < middle.high
    assert tenth.value == pytest.approx(np.quantile(samples, 0.1))
    assert tenth.high < middle.low
    # the known median lies in nearly all intervals of repeated draws
    held = 0
    for seed in range(40):
        found = median_interval(np.random.default_rng(seed).normal(30, 2, 100), seed)
        held += found.low <= 30 <= found.high
    assert held >= 34
    with pytest.raises(ValueError, match="from 0 to 1"):
        quantile_interval(samples, 1.1)
