"""`bench cache` and `bench tune` run end to end on the untrained model: their rows are there and add up."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from benchmarks import cache, contenders, kept, tune
from benchmarks.peers.caches import DeepCache
from benchmarks.peers.environments import FOLDER
from benchmarks.peers.pipelines import PeerFailed, PipelinePeer
from benchmarks.record import Row
from fastdiff.miniature import untrained
from fastdiff.planning import measure

CALLS = [f"calls of 2: {name}" for name in ("plain computed", "forecast computed", "forecast left out")]
WAYS = ("fewer-steps", "uniform", "deepcache", "diffusers", "cache-dit", "fastdiff-static", "fastdiff-planned")


@pytest.fixture
def pipe():
    """The embedded architecture with random weights."""
    made = untrained(0)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bench keeps between runs goes into the test's own folder."""
    monkeypatch.setattr(kept, "ROOT", tmp_path)


def _count_calls(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for the planner that counts calls of the denoiser, or the machine's load would choose the plan."""
    calls = [0]
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(calls.pop() + 1))
    monkeypatch.setattr(measure, "perf_counter", lambda: float(calls[0]))


@pytest.mark.slow
def test_every_row_is_there_with_its_figures_or_its_reason(pipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "STEPS", {"ddim": 8, "dpm": 8})
    monkeypatch.setattr(cache, "FULL", 5)
    _count_calls(pipe, monkeypatch)
    own = pipe.scheduler
    bench = partial(cache.run, prompts=2, batch=2, searched=2, samplers=("dpm",), peers=False, pipe=pipe)
    record = bench()
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
    _goes_on(bench, record, monkeypatch)


def _goes_on(bench, record, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--full` takes the times that were kept, draws the prompts that are missing, and is as good when interrupted."""
    drawn = []
    own = contenders.plain

    def counted(pipe, steps):
        draw = own(pipe, steps)

        def draw_and_count(prompts, seeds):
            drawn.append(seeds)
            if len(drawn) == 2:
                raise KeyboardInterrupt
            return draw(prompts, seeds)

        return draw_and_count

    monkeypatch.setattr(contenders, "plain", counted)
    ended = bench(full=True)
    monkeypatch.setattr(contenders, "plain", own)
    whole = bench(full=True)
    for one in (ended, whole):
        assert [row.ms_median for row in one.rows] == [row.ms_median for row in record.rows]
    name = "fastdiff-planned-3x-dpm"
    assert {row.quality["psnr"].n for row in ended.rows if "psnr" in row.quality} == {2}
    assert [whole.row(one).quality["attribute_drop"].n for one in (name, "fastdiff-planned-2x-dpm")] == [5, 2]
    assert "timed" in whole.row("baseline-dpm").note
    known = json.loads((kept.ROOT / "out" / "bench-cache-dpm.json").read_text())
    assert {one["name"] for one in known["contenders"] if len(one["figures"].get("right", ())) == 5} == set(
        cache.DRAWN_ON
    )


@pytest.mark.slow
def test_a_plans_word_stands_beside_what_it_did(pipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "STEPS", 8)
    monkeypatch.setattr(tune, "CALLS", (2,))
    monkeypatch.setattr(
        tune,
        "load_pipeline",
        lambda name, task: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
    )
    _count_calls(pipe, monkeypatch)
    record = tune.run(prompts=2, searched=2, batch=2, pipe=pipe)
    names = [row.method for row in record.rows]
    assert names == ["baseline", "plan-2x", "plan-2x-expected", "plan-3x", "plan-3x-expected", *CALLS]
    for speed in (2, 3):
        said, did = record.row(f"plan-{speed}x-expected"), record.row(f"plan-{speed}x")
        off = did.quality["psnr"].value - said.quality["psnr"].value
        assert said.quality["psnr_off"].value == pytest.approx(off)
        assert said.quality["search_generations"].value <= 10


def test_rows_off_the_planned_latency_carry_no_figure():
    scenes = cache.scenes_of("test", 3)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 64, 64, generator=generator)

    def contender(name: str, ms: float, speed: int, off: float) -> cache.Contender:
        drawn = (pictures + off * torch.rand(pictures.shape, generator=generator)).clamp(0, 1)
        made = cache.Contender(name, lambda some, noise: (drawn, ms), speed, 4, "", [ms] * 3)
        made.add(drawn, pictures, scenes)
        return made

    ways = [
        contender("baseline", 100.0, 0, 0.0),
        contender("fewer-steps-2x", 50.0, 2, 0.2),
        contender("uniform-2x", 60.0, 2, 0.2),
        contender("fastdiff-planned-2x", 51.0, 2, 0.1),
        cache.Contender("deepcache-2x", None, 2, note="left out"),
    ]
    costs = {"2": {"expected_psnr": cache.Interval.exact(30.0)}}
    stage = cache.Stage(ways, {"2": ""}, costs, "timed then")
    rows: dict[str, Row] = {row.method: row for row in cache._rows(stage)}
    assert "psnr" in rows["fewer-steps-2x"].quality
    assert rows["fewer-steps-2x"].quality["planned_ahead"].low > 0
    assert rows["uniform-2x"].note == "not reachable: its nearest setting is +18 % off the planned row's latency"
    assert not rows["uniform-2x"].quality
    assert rows["fastdiff-planned-2x"].quality["expected_psnr"].value == 30.0
    assert rows["deepcache-2x"].note == "left out"
    assert rows["deepcache-2x"].ms_median is None


def test_a_control_that_missed_the_latency_is_asked_again_with_what_was_measured():
    def draw(some: list[str], noise: list[int]) -> tuple[torch.Tensor, float]:
        return torch.zeros(len(some), 3, 8, 8), 1.0

    def begun(taken: float) -> tuple[cache.Stage, list[list[cache.Contender]]]:
        baseline = cache.Contender("baseline", None, milliseconds=[100.0] * 3)
        best = cache.Contender("fastdiff-planned-2x", draw, 2, 20, milliseconds=[50.0] * 3)
        one = cache._counted("fewer-steps-2x", lambda count: draw, 2, 10, 50)
        one.milliseconds = [taken] * 3
        return cache.Stage([baseline, one, best], {}, {}), []

    def measure(measured: list[list[cache.Contender]], slower: float, some: list[cache.Contender]) -> None:
        """Later turns, when the machine was twice as slow."""
        measured.append(some)
        for one, taken in zip(some, (200.0, 100.0, 2 * slower), strict=True):
            one.milliseconds += [taken] * 3

    stage, measured = begun(51.0)
    cache._once_more(stage, partial(measure, measured, 50.0))
    assert measured == [], "near enough"
    stage, measured = begun(40.0)
    far = stage.contenders[1]
    cache._once_more(stage, partial(measure, measured, 62.0))
    assert stage.contenders[1] is far, "the nearer one stays"
    stage, measured = begun(40.0)
    cache._once_more(stage, partial(measure, measured, 51.0))
    assert [one.name for one in measured[0]] == ["baseline", "fastdiff-planned-2x", "fewer-steps-2x"]
    other = stage.contenders[1]
    # a quarter more time, so 12 steps for 10
    assert (other.nfe, other.milliseconds, other.since) == (24, [102.0] * 3, 3)
    assert other.times(stage.contenders[2]) == pytest.approx(1.02)
    assert 1 / other.times(stage.contenders[0]) == pytest.approx(200 / 102)


def test_what_was_kept_is_of_the_same_settings_and_sources(tmp_path: Path):
    (tmp_path / "one.py").write_text("1")
    key = kept.digest("settings", sources=("*.py",))
    kept.write("bench", key, {"rows": [1]})
    assert kept.read("bench", key) == {"key": key, "rows": [1]}
    (tmp_path / "one.py").write_text("2")
    assert kept.read("bench", kept.digest("settings", sources=("*.py",))) is None
    assert kept.read("other", key) is None
    (tmp_path / "out" / "bench.json").write_text("{")
    assert kept.read("bench", key) is None


def test_the_peer_is_set_to_what_takes_as_long():
    asked = []

    class Peer:
        """5 ms for a whole step, 1 for a cached one."""

        def draw(self, some, noise, steps, guidance, settings):
            asked.append(settings["cache_interval"])
            whole = -(-steps // settings["cache_interval"])
            return torch.zeros(1), 5.0 * whole + (steps - whole)

    found = DeepCache.measured(Peer(), 20, 5.0, (["a"], [0]))  # type: ignore[arg-type]
    assert (found.whole, found.cached) == (5.0, 1.0)
    draw, note = found.nearest(40.0, 0.05)
    assert draw is not None
    assert draw(["a"], [0])[1] == 40.0
    assert note == "interval 4, branch 0"
    assert len(set(asked)) < 8
    none, note = found.nearest(10.0, 0.05)
    assert none is None
    assert note.startswith("not reachable: at most 4.17 times faster")


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "deepcache" / "complete").exists(), reason="make peers")
def test_a_peer_draws_our_picture_and_says_what_is_wrong(pipe):
    plain = cache.plain(pipe, 4)(["a red circle"], [3])[0]
    with PipelinePeer("deepcache", pipe) as peer:
        theirs, taken = peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, None)
        once, _ = peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, {"cache_interval": 1, "cache_branch_id": 0})
        with pytest.raises(PeerFailed, match="TypeError"):
            peer.draw(["a red circle"], [3], 4, cache.GUIDANCE, {"colour": "red"})
    assert taken > 0
    torch.testing.assert_close(theirs, plain, rtol=0, atol=1e-4)
    assert torch.equal(once, theirs)
