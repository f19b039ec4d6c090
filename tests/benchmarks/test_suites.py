"""The benchmarks run end to end on small shapes: their rows are there, and what is exact is exact."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from benchmarks import full_size, gpu, gpu_cache, miniature, readme, stream
from benchmarks.peers import environments
from benchmarks.peers.streamdiffusion import StreamDiffusionPeer
from benchmarks.record import Record, Row
from fastdiff.miniature import untrained
from fastdiff.quality import Interval
from fastdiff.runtime.compile import Compile
from fastdiff.sampling.schedule import consistency_timesteps
from fastdiff_app import bench
from fastdiff_app.methods import StreamLoop
from fastdiff_pipelines import SequentialStream
from fastdiff_pipelines.prepared import draw


@pytest.fixture
def untrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastdiff.load` gives the embedded architecture with random weights, which no training run can change."""
    from diffusers import StableDiffusionImg2ImgPipeline

    def load(name: str | None = None, task: str = "text-to-image", **_: Any) -> Any:
        pipe = untrained(0)
        if task == "text-to-image":
            return pipe
        return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)

    monkeypatch.setattr(fastdiff, "load", load)


@pytest.mark.slow
@pytest.mark.usefixtures("untrained_model")
def test_every_way_of_streaming_gives_the_pictures_of_the_sequential_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WARM_FRAMES", 1)
    record = stream.run(clips=1, frames=2, compiled=False, peer=False)
    assert [row.method for row in record.rows] == ["diffusers", "diffusers-equal", "sequential", "fastdiff"]
    for row in record.rows:
        assert row.note == ""
        expected = {"first_frame_ms", "max_abs_difference", *miniature.NAMES}
        assert set(row.quality) == expected
        assert row.quality["max_abs_difference"].n == 2
    # diffusers draws the noise of seed 0 in the same order, so even its pipeline agrees
    for method in ("diffusers-equal", "sequential", "fastdiff"):
        assert record.row(method).quality["max_abs_difference"].value <= 1e-4
    assert record.row("diffusers").quality["max_abs_difference"].value > 1e-3
    assert [row.nfe for row in record.rows] == [24, 4, 4, 4]


def test_a_method_that_cannot_start_stands_in_the_table_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", Path("nowhere"))
    with pytest.raises(FileNotFoundError, match="make peers"):
        environments.python_of("streamdiffusion")
    contender = stream.Contender("absent", stream._never, 4)
    stream._warm(contender, stream.demo(0, 2))
    row = stream._row(contender, contender, [])
    assert row.ms_median is None
    assert "did not start" in row.note


@pytest.mark.slow
def test_streamdiffusion_gives_the_pictures_of_the_sequential_loop() -> None:
    try:
        environments.python_of("streamdiffusion")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    pipe: Any = untrained(0)
    blank = torch.empty(4, 4, 16, 16)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    loop = StreamLoop(SequentialStream(pipe, "a red circle", steps=4, strength=0.5, height=64, width=64))
    timesteps = consistency_timesteps(pipe.scheduler, 4, 0.5)
    with StreamDiffusionPeer(pipe, timesteps, draw(0, 0, blank).numpy(), 64, 64) as peer, torch.no_grad():
        peer.prepare(pipe.encode_prompt("a red circle", "cpu", 1, False)[0].numpy())
        made = [ready for frame_id, frame in enumerate(frames) for ready in peer.push(frame, frame_id)] + peer.flush()
    assert [frame_id for frame_id, _ in made] == [0, 1, 2, 3, 4]
    for frame_id, image in made:
        ((_, expected),) = loop.push(frames[frame_id], frame_id)
        np.testing.assert_allclose(image, expected, atol=1e-4)


@pytest.mark.slow
def test_miniature_has_its_rows_and_reads_renders_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = untrained(0)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(miniature, "STEPS", 2)
    record = miniature.run(prompts=4, batch=4, pipe=pipe)
    assert [row.method for row in record.rows] == ["renders", "autoencoder", "mini-sd", "shuffled"]
    for name in miniature.NAMES:
        assert record.row("renders").quality[name] == Interval(1.0, 1.0, 1.0, 4)
        assert f"{name}_absolute" in record.row("mini-sd").quality


def test_relative_accuracy_is_a_share_of_the_ceiling() -> None:
    ceiling = np.array([1.0, 1.0, 1.0, 0.0] * 8)
    found = np.array([1.0, 0.0, 1.0, 0.0] * 8)
    figure = miniature._relative(found, ceiling)
    assert figure.value == pytest.approx(2 / 3)
    assert figure.low <= figure.value <= figure.high
    assert miniature._relative(ceiling, ceiling) == Interval(1.0, 1.0, 1.0, 32)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", full_size.SHRUNKEN, ids=lambda architecture: architecture.name)
def test_gpu_suite_runs_on_shrunken_shapes(
    architecture: full_size.Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SHRUNKEN", (architecture,))
    monkeypatch.setattr(gpu, "LOADS", ((2, 2),))
    monkeypatch.setattr(gpu, "WAYS", {"eager": (), "compiled": (Compile(backend="eager"),)})
    record = gpu.run(only="stream", shrunken=True)
    assert record.name == "gpu-stream"
    assert [row.note for row in record.rows] == [""] * 2
    eager, compiled = record.rows
    assert eager.ratio == 1.0
    assert eager.quality["tflop_per_frame"] == compiled.quality["tflop_per_frame"]
    assert eager.quality["tflop_per_frame"].value > 0


@pytest.mark.slow
def test_gpu_suite_of_skips_tells_computed_calls_from_those_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHRUNKEN", full_size.SHRUNKEN[:1])
    monkeypatch.setattr(gpu_cache, "WAYS", {"": (), "compiled ": (Compile(backend="eager"),)})
    rows = gpu.run(only="skips", shrunken=True).rows
    names = [row.method.split("px ")[1] for row in rows]
    once = ["plain computed", "forecast computed", "forecast left out"]
    assert names == [*once, *(f"compiled {name}" for name in once)]
    assert [row.note for row in rows] == [""] * 6
    for row in rows[2::3]:
        assert row.quality["of_step"].n == gpu_cache.STEPS - 3
        assert row.quality["of_step"].value < 0.5
    assert rows[4].quality["in_graph"].value == 1


def test_gpu_suite_of_linears_runs_on_shrunken_shapes() -> None:
    rows = {row.method: row for row in gpu.run(only="linears", shrunken=True).rows}
    ways = ("bf16", "int8-product", "fp8-product", "fastdiff-w8a8", "torchao-int8", "torchao-fp8")
    assert list(rows) == [f"small {way}" for way in ways]
    assert rows["small bf16"].quality["output_error"].value < 0.01
    for way in ("int8-product", "fastdiff-w8a8"):
        assert rows[f"small {way}"].quality["output_error"].value < 0.02
    for row in rows.values():
        assert row.note or row.quality["tflops"].value > 0


def test_gpu_suites_say_so_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = gpu.run()
    assert [row.method for row in record.rows] == list(gpu.SUITES)
    assert all("needs an NVIDIA GPU" in row.note for row in record.rows)
    with pytest.raises(ValueError, match="no suite"):
        gpu.run(only="unknown")


def test_gpu_suite_leaves_out_what_its_time_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SUITE_SECONDS", -1)
    monkeypatch.setattr(gpu, "SHRUNKEN", full_size.SHRUNKEN[:1])
    monkeypatch.setattr(gpu, "LOADS", ((1, 1),))
    rows = gpu.run(only="stream", shrunken=True).rows
    assert [row.note for row in rows] == ["left out: the suite's time was used up"] * len(gpu.WAYS)


def test_tables_come_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    row = Row.timed("fastdiff", [20.0], quality={"colour": Interval(0.9, 0.85, 0.95, 64)})
    record = Record("stream", [Row.timed("diffusers", [100.0]), row, Row("peer", note="make peers")]).finish()
    record.save(tmp_path / "stream.json")
    before = "a\n<!-- generated: stream -->\nold\n<!-- end -->\nb\n<!-- generated: gpu -->\n<!-- end -->\nc\n"
    after = readme.rewritten(before)
    assert "| fastdiff | 20.0 | 5.00 |" in after
    assert "0.9 ± 0.05" in after
    assert "make peers" in after
    assert "old" not in after
    assert "Not measured yet: `make bench NAME=gpu`." in after
    assert readme.rewritten(after) == after
    assert (after[0], after[-2]) == ("a", "c")


def test_readme_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    text = readme.README.read_text("utf-8")
    records = {path.stem for path in readme.RESULTS.glob("*.json")}
    assert all(f"generated: {name} " in text for name in records), records
    # tables and links only: nothing is drawn or copied
    for name in readme.PLOTS:
        monkeypatch.setattr(import_module(f"benchmarks.{name}"), "plot", lambda record, picture: None)
    monkeypatch.setattr(readme, "ROOT", Path("nowhere"))
    monkeypatch.setattr(
        readme, "_sheet", lambda: "![input, plain diffusers and fastdiff, row by row](benchmarks/results/stream.png)"
    )
    assert readme.rewritten(text) == text


def test_every_benchmark_that_is_offered_can_be_run() -> None:
    for name in bench.names():
        assert callable(import_module(f"benchmarks.{name}").run), name
