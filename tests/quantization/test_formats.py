"""Storage formats: grids and fixed points, half steps, round trips, size, and which is better on which weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from fastdiff.quantization.codebook import Codebook
from fastdiff.quantization.formats import FORMATS, stored_format
from fastdiff.quantization.integers import Integers
from fastdiff.quantization.low_rank import LowRank
from fastdiff.quantization.microscaled import E2M1, Microscaled
from fastdiff.quantization.packing import pack, size_of, unpack
from fastdiff.quantization.twin_log import TwinLog

KINDS = {"normal": 1.0, "outliers": 12.0}
# bits a weight of [64, 192], scales included, at most
BITS = {"int8": 8.1, "int4": 4.3, "int3": 3.3, "twin-log4": 4.3, "twin-log3": 3.3, "mxfp4": 4.3, "nvfp4": 4.6}


def weight(kind: str = "normal", rows: int = 64, columns: int = 192) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made[:, ::24] *= KINDS[kind]
    return made


def shape(made: Tensor) -> tuple[int, int]:
    return made.shape[0], made.shape[1]


def error(form, made: Tensor) -> float:
    kept = form.decode(form.encode(made), shape(made))
    return float((kept - made).norm() / made.norm())


@settings(max_examples=40, deadline=None)
@given(bits=some.integers(1, 8), count=some.integers(0, 70), seed=some.integers(0, 99))
def test_packing_is_a_round_trip_of_the_stated_size(bits: int, count: int, seed: int):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("name", [name for name in FORMATS if "codebook" not in name and "twin" not in name])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_again_changes_nothing(name: str, kind: str):
    form, made = FORMATS[name], weight(kind)
    once = form.decode(form.encode(made), shape(made))
    torch.testing.assert_close(form.decode(form.encode(once), shape(made)), once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BITS)
def test_size_is_what_the_name_says(name: str):
    made = weight()
    assert 8 * size_of(FORMATS[name].encode(made)) / made.numel() <= BITS[name]


@pytest.mark.parametrize("name", [*BITS, "codebook2"])
@pytest.mark.parametrize("columns", [1, 50, 97])
def test_any_width_zeros_and_dtypes(name: str, columns: int):
    form = FORMATS[name]
    made = weight(columns=columns)
    kept = form.decode(form.encode(made.bfloat16()), shape(made))
    assert kept.shape == made.shape
    assert kept.dtype == torch.float32
    assert kept.isfinite().all()
    nothing = torch.zeros(6, columns)
    assert form.decode(form.encode(nothing), shape(nothing)).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_integers_are_within_half_a_step(bits: int, group: int):
    form, made = Integers(bits, group), weight()
    stored = form.encode(made)
    step = stored["scale"].float().repeat_interleave(group or 192, 1)
    assert ((form.decode(stored, shape(made)) - made).abs() <= 0.501 * step).all()


def test_a_group_of_one_is_exact_up_to_its_scale():
    made = weight()
    assert error(Integers(2, group=1), made) < 5e-4  # float16 scales


def test_clipping_lowers_the_error_of_heavy_tails():
    made = torch.distributions.StudentT(3.0).sample((64, 192))
    assert error(Integers(4, clip="mse"), made) < 0.95 * error(Integers(4), made)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_values_of_the_grid_stay(kind: str):
    form = Microscaled(kind)
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    made = levels.repeat(4, 4) * torch.tensor([0.25, 1, 2, 4])[:, None]
    torch.testing.assert_close(form.decode(form.encode(made), shape(made)), made, rtol=2e-7, atol=0)


def test_microscaling_has_the_errors_of_the_literature():
    """Gaussian weights: MXFP4 about 0.12, NVFP4 about 0.095 before the scale is searched for."""
    made = torch.randn(256, 512)
    assert error(Microscaled("mxfp4", search=False), made) == pytest.approx(0.119, abs=0.006)
    assert error(Microscaled("nvfp4", search=False), made) == pytest.approx(0.095, abs=0.005)
    for kind in ("mxfp4", "nvfp4"):
        assert error(Microscaled(kind), made) < error(Microscaled(kind, search=False), made)


def test_twin_log_has_its_own_ladder_for_each_sign():
    made = torch.cat([torch.rand(8, 100) * 4, -torch.rand(8, 100) * 0.1], 1)
    form = TwinLog(4)
    kept = form.decode(form.encode(made), shape(made))
    assert torch.equal(kept[:, :100] >= 0, torch.ones(8, 100, dtype=torch.bool))
    positive, negative = (kept - made)[:, :100], (kept - made)[:, 100:]
    assert positive.norm() / made[:, :100].norm() < 0.12
    assert negative.norm() / made[:, 100:].norm() < 0.12
    one_scale = Integers(4).decode(Integers(4).encode(made), shape(made))
    assert (one_scale - made)[:, 100:].norm() / made[:, 100:].norm() > 0.9


def test_twin_log_beats_plain_integers_a_row():
    for kind, share in (("normal", 0.85), ("outliers", 0.5)):
        assert error(TwinLog(4), weight(kind)) < share * error(Integers(4), weight(kind))


def test_a_book_with_every_piece_is_exact():
    generator = torch.Generator().manual_seed(1)
    pieces = torch.randn(16, 4, generator=generator).half().float()
    made = pieces[torch.randint(0, 16, (24 * 8,), generator=generator)].view(24, 32)
    form = Codebook(4, 64)
    assert error(form, made) < 1e-6


def test_a_book_fitted_to_inputs_lowers_their_output_error():
    """Inputs that lie in few directions let errors of neighbouring pieces cancel, if pieces are chosen together."""
    made, form = weight(rows=48, columns=64), Codebook(4, 16, rounds=8, steps=100)
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(6, 64, generator=generator)
    inputs, unseen = (torch.randn(256, 6, generator=generator) @ mix for _ in range(2))

    def output_error(stored) -> float:
        return float((unseen @ (form.decode(stored, shape(made)) - made).mT).norm() / (unseen @ made.mT).norm())

    assert output_error(form.encode(made, inputs)) < 0.8 * output_error(form.encode(made))


def test_full_rank_leaves_nothing():
    made = weight(rows=24, columns=40)
    form = LowRank(Integers(4), rank=24, rounds=1)
    stored = form.encode(made)
    # bfloat16 factors leave a remainder of their rounding, which four bits then hold
    assert form.remainder(stored, (24, 40)).norm() < 0.01 * made.norm()
    assert error(form, made) < 1e-3


def test_more_rounds_and_more_rank_are_never_worse():
    made = weight("outliers")
    errors = [error(LowRank(Integers(4, 64), 8, rounds), made) for rounds in (1, 2, 4)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 0.95 * errors[0]
    ranks = [error(LowRank(Integers(4, 64), rank, 2), made) for rank in (2, 8, 32)]
    assert ranks[0] > ranks[1] > ranks[2]


def test_names_and_settings_are_checked():
    assert isinstance(stored_format("int4", rank=8), LowRank)
    with pytest.raises(ValueError, match="nvfp4"):
        stored_format("fp2")
    with pytest.raises(ValueError, match="bits"):
        Integers(9)
    with pytest.raises(ValueError, match="power of two"):
        Codebook(entries=100)
    with pytest.raises(ValueError, match="kind"):
        Microscaled("mxfp6")
