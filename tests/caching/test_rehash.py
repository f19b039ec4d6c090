"""Step Rehash: which steps share a computation, by known similarities and on pipelines."""

from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.caching.rehash import layer_features, rehash, similarities, steadiest, step_rehash
from fastdiff.miniature.families import family


def turning(degrees: list[float]) -> torch.Tensor:
    angles = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_steps_are_held_against_the_last_computed_one():
    similar = similarities(turning([0, 10, 20, 30, 40, 50, 51]))
    assert similar[0, 3] == pytest.approx(3**0.5 / 2)
    # 25 degrees: 0 serves 10 and 20, 30 serves 40 and 50, and the last is computed always
    assert rehash(similar, float(torch.tensor(25.0).deg2rad().cos())) == (0, 3, 6)
    assert rehash(similar, 1.0) == (0, 1, 2, 3, 4, 5, 6)
    assert rehash(similar, -1.0) == (0, 6)
    assert rehash(similar, -1.0, longest=2) == (0, 2, 4, 6)
    assert rehash(torch.full((4, 4), torch.nan), 0.9) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="threshold"):
        rehash(similar, 1.5)


def test_a_higher_threshold_never_computes_less():
    similar = similarities(torch.randn(12, 5).cumsum(0) + 3)
    counts = [len(rehash(similar, threshold)) for threshold in (0.0, 0.5, 0.9, 0.99, 1.0)]
    assert counts == sorted(counts)


def test_the_steadiest_layer_is_asked():
    assert steadiest({"wild": turning([0, 80, 10]), "calm": turning([0, 1, 2])}) == "calm"


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_schedule_for_forecast_comes_out(name: str):
    pipe: Any = family(name)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Any:
        more = {"max_sequence_length": 24} if name == "flux" else {}
        generator = torch.Generator().manual_seed(0)
        settings = {"height": 32, "width": 32, "num_inference_steps": 5, "output_type": "latent"}
        return pipe("a red circle", generator=generator, **settings, **more).images

    plain = generate()
    features = layer_features(pipe, generate)
    assert all(len(values) == 5 for values in features.values())
    with fastdiff.accelerate(pipe, step_rehash(pipe, generate, threshold=1.0)) as handle:
        torch.testing.assert_close(generate(), plain, rtol=0, atol=1e-5)
    sparse = step_rehash(pipe, generate, threshold=-1.0, longest=2)
    assert len(sparse.levels) == 3
    with fastdiff.accelerate(pipe, sparse, strict=True) as handle:
        generate()
        row = handle.report().rows[0]
        assert (row.seen, row.accelerated) == (5, 2)
