"""`bench quantization`: what 8-bit products bring on this machine, and what storage formats cost.

Rows of layers, at 1,536 x 6,144 and, with a suffix, at shapes of SDXL (1,024 pixels) and FLUX (512 pixels):
    bf16: torch's linear layer, in bfloat16; each shape's own is what `ratio` is against.
    torchao-int8: torchao 0.18's int8 dynamic quantisation, compiled, in its own environment (`make peers`).
    fastdiff-w8a8: ours. fastdiff-w8a8-hadamard: with inputs rotated while it runs.
Their `output_error` is the relative error on Gaussian inputs and weights, `bytes` those of the weight. Methods take
turns, so that a busy moment of the machine falls on all alike.

Rows `stored-...` put every linear layer of the embedded model into a format: `weight_error` and `output_error` are
relative, over all layers, on inputs of real generations; `psnr` (median) is of pictures against those of the model as
it is, same seeds, 20 steps; `bytes` are those of the weights. They make nothing faster and have no time.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastdiff
from benchmarks.peers.child import Child
from benchmarks.record import Record, Row, could_not_run
from fastdiff.acceleration import Acceleration
from fastdiff.miniature import world
from fastdiff.quality import Interval, median_interval, psnr
from fastdiff.quantization.layers import QuantisedLinear, held_bytes, places
from fastdiff.quantization.statistics import Statistics, collect
from fastdiff.quantization.stored import StoredWeights
from fastdiff.quantization.transforms import hadamard_rotation
from fastdiff.quantization.w8a8 import W8A8, W8A8Linear
from fastdiff_app.engine import load_pipeline

WORKER = Path(__file__).resolve().parent / "peers" / "torchao_worker.py"
# name: tokens, inputs, outputs
LAYERS = {
    "": (1024, 1536, 6144),
    "-sdxl-attention-640": (4096, 640, 640),
    "-sdxl-feed-in-640": (4096, 640, 5120),
    "-sdxl-attention-1280": (1024, 1280, 1280),
    "-sdxl-feed-in-1280": (1024, 1280, 10240),
    "-sdxl-feed-out-1280": (1024, 5120, 1280),
    "-flux-attention": (1536, 3072, 3072),
    "-flux-feed-in": (1536, 3072, 12288),
    "-flux-feed-out": (1536, 12288, 3072),
    "-flux-single-out": (1536, 15360, 3072),
}
TURNS, RUNS = 5, 3
FEATURES = 48
SEED = 3_000_017
GENERATION = {"num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "pt"}
_ALL: dict[str, Any] = {"minimum_features": FEATURES}
STORED: dict[str, Callable[[str], Acceleration]] = {
    "int8": lambda path: StoredWeights("int8", **_ALL),
    "int4": lambda path: StoredWeights("int4", **_ALL),
    "int3": lambda path: StoredWeights("int3", **_ALL),
    "twin-log4": lambda path: StoredWeights("twin-log4", **_ALL),
    "twin-log3": lambda path: StoredWeights("twin-log3", **_ALL),
    "mxfp4": lambda path: StoredWeights("mxfp4", **_ALL),
    "mxfp4-hadamard": lambda path: StoredWeights("mxfp4", rotate="hadamard", **_ALL),
    "nvfp4": lambda path: StoredWeights("nvfp4", **_ALL),
    "nvfp4-hadamard": lambda path: StoredWeights("nvfp4", rotate="hadamard", **_ALL),
    "codebook2": lambda path: StoredWeights("codebook2", **_ALL),
    "vq4dit": lambda path: StoredWeights("codebook2", fit=True, statistics=path, **_ALL),
    "svdquant": lambda path: StoredWeights("int4", rank=8, statistics=path, smooth=0.5, **_ALL),
    "svdquant-w4a4": lambda path: StoredWeights("int4", rank=8, statistics=path, smooth=0.5, activations=4, **_ALL),
    "lrq-dit-w3a4": lambda path: StoredWeights(
        "twin-log3", rotate="found", smooth=0.5, activations=4, statistics=path, **_ALL
    ),
    "w8a8": lambda path: W8A8(path="eager", **_ALL),
    "w8a8-smooth-hadamard": lambda path: W8A8(rotate="hadamard", smooth=0.5, statistics=path, path="eager", **_ALL),
}


def run(full: bool = False, prompts: int = 0, pipe: Any = None, layers: dict[str, Any] | None = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: pictures a format is judged on; 0 chooses.
        pipe: the pipeline whose weights are stored; the embedded one where None.
        layers: shapes to time; None takes all.
    """
    record = Record("quantization")
    with ExitStack() as stack:
        peer = _peer(stack)
        for suffix, shape in (LAYERS if layers is None else layers).items():
            record.rows += _timed(suffix, shape, peer)
    record.rows += _stored(pipe or load_pipeline(None, "text-to-image"), prompts or (64 if full else 16))
    return record.finish()


def _peer(stack: ExitStack) -> Child | FileNotFoundError:
    """The process that runs torchao, or why there is none."""
    try:
        peer = stack.enter_context(Child("torchao", WORKER))
    except FileNotFoundError as missing:
        return missing
    peer.start(str(torch.get_num_threads()))
    return peer


def _ask(peer: Child, **asked: Any) -> dict[str, Any]:
    peer.ask(json.dumps(asked).encode() + b"\n")
    return json.loads(peer.line())


def _timed(suffix: str, shape: tuple[int, int, int], peer: Child | FileNotFoundError) -> list[Row]:
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator)
    truth = torch.nn.functional.linear(x, weight, bias)
    plain = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    plain.weight.copy_(weight)
    plain.bias.copy_(bias)
    plain = plain.bfloat16()
    short = x.bfloat16()
    made: dict[str, torch.nn.Module] = {
        "bf16": plain,
        "fastdiff-w8a8": W8A8Linear(plain),
        "fastdiff-w8a8-hadamard": W8A8Linear(plain, rotation=hadamard_rotation(inputs)),
    }
    taken: dict[str, list[float]] = {name: [] for name in made}
    quality = {}
    with torch.no_grad():
        for name, module in made.items():
            quality[name] = _figures((module(short).float() - truth).norm() / truth.norm(), held_bytes([module]))
            module(short)
        failed: Exception | None = None if isinstance(peer, Child) else peer
        if isinstance(peer, Child):
            try:
                about = _ask(peer, tokens=tokens, inputs=inputs, outputs=outputs)
                quality["torchao-int8"] = _figures(about["error"], about["bytes"])
                taken["torchao-int8"] = []
            except (ChildProcessError, OSError) as error:
                failed = error
        for _ in range(TURNS):
            for name, module in made.items():
                for _ in range(RUNS):
                    start = perf_counter()
                    module(short)
                    taken[name].append(1000 * (perf_counter() - start))
            if isinstance(peer, Child) and failed is None:
                try:
                    taken["torchao-int8"] += _ask(peer, runs=RUNS)["ms"]
                except (ChildProcessError, OSError) as error:
                    failed = error
                    del taken["torchao-int8"]
    rows = [Row.timed(name + suffix, times, quality=quality[name]) for name, times in taken.items()]
    first = rows[0].ms_median
    for row in rows:
        row.ratio = first / row.ms_median if first and row.ms_median else None
        row.note = f"{tokens} tokens, {inputs} to {outputs}"
    if failed is not None:
        rows.append(could_not_run("torchao-int8" + suffix, failed))
    order = ["bf16", "torchao-int8", "fastdiff-w8a8", "fastdiff-w8a8-hadamard"]
    return sorted(rows, key=lambda row: order.index(row.method.removesuffix(suffix)))


def _figures(error: Any, size: int) -> dict[str, Interval]:
    return {"output_error": _exact(float(error)), "bytes": _exact(size)}


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _stored(pipe: Any, prompts: int) -> list[Row]:
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(SEED)
    captions = [world.caption(world.object_scene(rng)) for _ in range(prompts)]
    found = places(pipe, FEATURES)
    # formats are fitted to inputs of other prompts than those that judge them
    others = [world.caption(world.object_scene(rng)) for _ in range(4)]
    known = collect(found, lambda: _pictures(pipe, others, 90_000))
    pictures: list[torch.Tensor] = []
    seen = collect(found, lambda: pictures.append(_pictures(pipe, captions, 0)))
    truth = pictures[0]
    plain = Row("stored-not-at-all", quality={"bytes": _exact(held_bytes(place.linear for place in found))})
    rows = [plain]
    with tempfile.TemporaryDirectory(prefix="fastdiff-statistics-") as folder:
        path = str(Path(folder) / "inputs.safetensors")
        known.save(path)
        for name, make in STORED.items():
            try:
                rows.append(_stored_row(pipe, f"stored-{name}", make(path), found, seen, captions, truth))
            except (fastdiff.Unsupported, RuntimeError) as error:
                rows.append(could_not_run(f"stored-{name}", error))
    return rows


def _stored_row(
    pipe: Any, name: str, one: Acceleration, found: Any, seen: Statistics, captions: list[str], truth: torch.Tensor
) -> Row:
    modules = {place.name: (place.parent, place.attribute) for place in found}
    with fastdiff.accelerate(pipe, one):
        made = {key: parent._modules[attribute] for key, (parent, attribute) in modules.items()}
        missed, output = [], []
        for place in found:
            module, x = made[place.name], seen.samples[place.name]
            # a rotation folded into two layers is not one of either, so only their product is comparable
            folded = isinstance(module, QuantisedLinear) and _is_folded(one, place.name)
            if not folded:
                weight = place.linear.weight.detach().float()
                missed.append(float((module.weight - weight).square().sum() / weight.square().sum()))
                with torch.no_grad():
                    expected = place.linear(x)
                    output.append(float((module(x) - expected).square().sum() / expected.square().sum()))
        quality = {
            "psnr": median_interval(psnr(_pictures(pipe, captions, 0), truth).numpy()),
            "weight_error": _exact(float(np.mean(missed)) ** 0.5),
            "output_error": _exact(float(np.mean(output)) ** 0.5),
            "bytes": _exact(held_bytes(made.values())),
        }
    return Row(name, quality=quality)


def _is_folded(one: Acceleration, name: str) -> bool:
    return getattr(one, "rotate", "") == "hadamard" and isinstance(one, W8A8) and name.endswith((".to_v", ".to_out.0"))


def _pictures(pipe: Any, captions: list[str], seed: int) -> torch.Tensor:
    """[B, 3, H, W] in 0..1."""
    generators = [torch.Generator().manual_seed(seed + place) for place in range(len(captions))]
    with torch.no_grad():
        return pipe(prompt=captions, generator=generators, **GENERATION).images.clone()
