"""Scores and choice of key blocks: known answers, and kernels against their references."""

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.attention import Selection, attention
from fastdiff_kernels.selection import (
    antidiagonal_scores,
    block_mass,
    count_of,
    pooled_scores,
    self_similarity,
    top_k,
    top_p,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mass(q: Tensor, k: Tensor, path: str = "reference") -> Tensor:
    _, lse = attention(q, k, k, path="reference")
    return block_mass(q, k, lse, 16, 16, path=path)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_mass_is_the_share_of_attention(path: str):
    q, k = torch.randn(2, 4, 40, 24, device=DEVICE), torch.randn(2, 2, 55, 24, device=DEVICE)
    keys = k.double().repeat_interleave(2, 1)
    weights = (q.double() @ keys.mT / 24**0.5).softmax(-1)
    expected = torch.stack(
        [torch.stack([part.sum(-1).mean(-1) for part in rows.split(16, 3)], -1) for rows in weights.split(16, 2)], 2
    )
    found = mass(q, k, path)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)


def test_constant_inputs_give_uniform_scores_and_top_p_keeps_its_share():
    q = torch.ones(1, 2, 64, 16)
    for scores in (mass(q, q), pooled_scores(q, q, 16, 16)[0], antidiagonal_scores(q, q, 16, 16)):
        torch.testing.assert_close(scores, torch.full_like(scores, 0.25), rtol=0, atol=1e-6)
        assert (top_p(scores, 0.6).sum(-1) == 3).all()
        assert (top_p(scores, 0.0).sum(-1) == 1).all()
        assert top_p(scores, 1.0).all()


def test_diagonal_attention_is_found_by_every_score():
    # each block of 16 tokens has a direction of its own
    q = 12 * torch.eye(4).repeat_interleave(16, 0).view(1, 1, 64, 4)
    for scores in (mass(q, q), pooled_scores(q, q, 16, 16)[0], antidiagonal_scores(q, q, 16, 16, 4)):
        assert torch.equal(top_k(scores, 1, 16, 16).blocks.flatten(), torch.arange(4, dtype=torch.int32))


def test_antidiagonals_of_one_token_are_the_exact_mass():
    q, k = torch.randn(2, 1, 2, 48, 16)
    torch.testing.assert_close(antidiagonal_scores(q, k, 16, 16, stride=1), mass(q, k), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of stride"):
        antidiagonal_scores(q, k, 16, 12)


def test_a_larger_share_contains_a_smaller_one():
    scores = torch.rand(2, 3, 5, 20)
    smaller, larger = top_p(scores, 0.4), top_p(scores, 0.7)
    assert (larger | ~smaller).all()
    assert (scores.where(larger, 0).sum(-1) >= 0.7 * scores.sum(-1) - 1e-5).all()


def test_blocks_whose_mean_says_nothing_are_always_computed():
    same = torch.ones(1, 1, 16, 16)
    orthogonal = torch.eye(16).view(1, 1, 16, 16)
    assert torch.allclose(self_similarity(same, 16), torch.ones(1))
    torch.testing.assert_close(self_similarity(orthogonal, 16), torch.full((1, 1, 1), 1 / 16))
    tokens = torch.cat([same, orthogonal], 2)
    _, forced = pooled_scores(tokens, tokens, 16, 16, similar=0.5)
    assert forced[0, 0, 1].all()
    assert forced[0, 0, :, 1].any()


@pytest.mark.parametrize("count", [1, 3, 13])
def test_bisection_finds_what_sorting_finds(count: int):
    scores = torch.randn(2, 3, 4, 13, device=DEVICE)
    scores[0] = scores[0].round()  # ties: the first ones win
    scores[1, 0, 0] = 0
    expected = top_k(scores, count, 16, 16, path="reference")
    assert torch.equal(top_k(scores, count, 16, 16, path="triton").blocks, expected.blocks)


def test_count_is_checked_and_a_density_keeps_one_block():
    with pytest.raises(ValueError, match="count=5 must be from 1 to the 4"):
        top_k(torch.rand(1, 1, 1, 4), 5, 16, 16)
    assert count_of(0.0, 64, 16) == 1
    assert count_of(0.25, 4096, 128) == 8


def test_selections_convert_without_loss():
    mask = torch.rand(2, 2, 5, 7) < 0.4
    chosen = Selection.from_mask(mask, 16, 8)
    assert torch.equal(chosen.mask(7), mask)
    assert torch.equal(chosen.complement(7).mask(7), ~mask)
    assert torch.equal(chosen.transposed(7).mask(5), mask.mT)
    assert chosen.density(7) == pytest.approx(float(mask.double().mean()))
    for row, count, expected in zip(chosen.blocks.view(-1, chosen.blocks.shape[-1]), chosen.counts.view(-1),
                                    mask.view(-1, 7), strict=True):  # fmt: skip
        assert row[:count].tolist() == expected.nonzero().flatten().tolist()
