"""`bench cache` and `bench tune` run end to end on the untrained model: their rows are there and add up."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import cache, tune
from benchmarks.peers.environments import FOLDER
from benchmarks.peers.pipelines import PeerFailed, PipelinePeer
from benchmarks.record import Row
from fastdiff.miniature import untrained
from fastdiff.plan import Plan

WAYS = ("fewer-steps", "uniform", "deepcache", "diffusers", "cache-dit", "fastdiff-static", "fastdiff-planned")


@pytest.fixture
def pipe():
    """The embedded architecture with random weights."""
    made = untrained(0)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.slow
def test_every_row_is_there_with_its_figures_or_its_reason(pipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "STEPS", {"ddim": 8, "dpm": 8})
    own = pipe.scheduler
    record = cache.run(prompts=2, batch=2, searched=2, samplers=("dpm",), peers=False, pipe=pipe)
    assert pipe.scheduler is own
    expected = ["baseline-dpm", *(f"{way}-{speed}x-dpm" for speed in (2, 3) for way in WAYS)]
    assert [row.method for row in record.rows] == expected
    for row in record.rows[1:]:
        planned = "planned" in row.method
        if row.ms_median is None or row.note.startswith("not reachable"):
            assert row.note
            assert "psnr" not in row.quality
        else:
            assert {"psnr", "psnr_p10", "ssim", "attribute_drop"} <= set(row.quality)
            assert ("planned_ahead" in row.quality) != planned
            assert ("search_generations" in row.quality) == planned
    assert record.row("deepcache-2x-dpm").note == "left out"


@pytest.mark.slow
def test_a_plans_word_stands_beside_what_it_did(pipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "STEPS", 8)
    record = tune.run(prompts=2, searched=2, batch=2, pipe=pipe)
    names = [row.method for row in record.rows]
    assert names == ["baseline", "plan-2x", "plan-2x-expected", "plan-3x", "plan-3x-expected"]
    for speed in (2, 3):
        said, did = record.row(f"plan-{speed}x-expected"), record.row(f"plan-{speed}x")
        off = did.quality["psnr"].value - said.quality["psnr"].value
        assert said.quality["psnr_off"].value == pytest.approx(off)
        assert said.quality["search_generations"].value <= 10


def test_rows_off_the_planned_latency_carry_no_figure():
    import torch

    from fastdiff.planning.tune import Tuned

    scenes = cache.scenes_of("test", 3)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 64, 64, generator=generator)

    def contender(name: str, ms: float, speed: int, off: float) -> cache.Contender:
        drawn = (pictures + off * torch.rand(pictures.shape, generator=generator)).clamp(0, 1)
        return cache.Contender(name, lambda some, noise: (drawn, ms), speed, 4, "", [ms] * 3, [drawn])

    tuned: dict[int, Tuned] = {}
    ways = [
        contender("baseline", 100.0, 0, 0.0),
        contender("fewer-steps-2x", 50.0, 2, 0.2),
        contender("uniform-2x", 60.0, 2, 0.2),
        contender("fastdiff-planned-2x", 51.0, 2, 0.1),
    ]
    best: Any = SimpleNamespace(quality={"psnr": cache.Interval.exact(30.0)})
    tuned[2] = Tuned(Plan(), 50, [best], [], spent=3.0, heldout=2.0, baseline=0.1)
    rows: dict[str, Row] = {row.method: row for row in cache._rows(ways, scenes, tuned)}
    assert "psnr" in rows["fewer-steps-2x"].quality
    assert rows["fewer-steps-2x"].quality["planned_ahead"].low > 0
    assert rows["uniform-2x"].note == "not reachable: its nearest setting is +18 % off the planned row's latency"
    assert not rows["uniform-2x"].quality


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "deepcache" / "complete").exists(), reason="make peers")
def test_a_peer_draws_our_picture_and_says_what_is_wrong(pipe):
    import torch

    plain = cache.plain(pipe, 4)(["a red circle"], [3])[0]
    with PipelinePeer("deepcache", pipe) as peer:
        theirs, taken = peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, None)
        once, _ = peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, {"cache_interval": 1, "cache_branch_id": 0})
        with pytest.raises(PeerFailed, match="TypeError"):
            peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, {"colour": "red"})
    assert taken > 0
    torch.testing.assert_close(theirs, plain, rtol=0, atol=1e-4)
    assert torch.equal(once, theirs)
