"""Compile every kernel for one architecture and print registers, spills and matrix instructions as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastdiff_kernels.attention import triton as attention
from fastdiff_kernels.attention import triton_gradient as gradient
from fastdiff_kernels.quantise import triton as quantise
from fastdiff_kernels.selection import triton as selection
from fastdiff_kernels.sparse_linear import triton as linear
from fastdiff_kernels.w8a8 import triton as w8a8

POINTERS = {
    "lse_ptr": "*fp32", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32",
    "shift_ptr": "*fp32", "blocks_ptr": "*i32", "counts_ptr": "*i32", "lengths_ptr": "*i32", "far_lse_ptr": "*fp32",
    "delta_ptr": "*fp32", "mass_ptr": "*fp32", "parts_ptr": "*fp32", "scores_ptr": "*fp32", "q8_ptr": "*i8",
    "k8_ptr": "*i8", "q_pool_ptr": "*fp32", "k_pool_ptr": "*fp32",
}  # fmt: skip
FLOATS: dict[str, str] = dict.fromkeys(("w_ptr", "sums_ptr", "dx_ptr", "product_ptr"), "*fp32")
NOTHING = dict(SPARSE=False, INT8=False, FP8=False, FAR=False, LENGTHS=False, SKIP=False, Q_GROUP=1, K_GROUP=1)
LARGE = dict(HEAD=128, PADDED=128)


# bytes of shared memory that a block of threads may have
LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448}


def build(
    kernel: Any, architecture: int, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int = 2
) -> dict:
    """Compile one kernel; `types` overrides what names say of its arguments."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, POINTERS.get(name, "*bf16"))
        else:
            signature[name] = "fp32" if name in ("scale", "skip") else "i32"
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    # what Triton itself finds out of aligned tensors at a launch
    aligned = [name for name in signature if name.endswith(("_ptr", "_batch", "_head", "_token", "inputs", "_row"))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    text = made.asm["ptx"]
    kinds = set()
    for line in re.findall(r"^\s*(wgmma\.mma_async\S*|mma\.sync\S*)", text, flags=re.MULTILINE):
        kind = line.split(".")[0]
        kinds |= {kind, *(f"{kind}.{type_}" for type_ in ("s8", "e4m3", "bf16") if f".{type_}" in line)}
    name = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={name}",
            str(path),
            "-o",
            str(Path(folder, "kernel.cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared_bytes": made.metadata.shared,
        "instructions": sorted(kinds),
    }


def family(architecture: int, head: int, precision: str, sparse: bool) -> dict:
    """The attention kernel as it is launched on one architecture, with the blocks it takes there."""
    limit = LIMITS[architecture]
    blocks = (128, 64) if sparse and head <= 128 else attention.dense_blocks(head, precision != "exact", limit)
    constants = {**NOTHING, "HEAD": head, "PADDED": triton.next_power_of_2(head), "SPARSE": sparse, "FAR": sparse}
    constants |= {"BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "INT8": precision != "exact"}
    types, key_bytes, value_bytes = {}, 2, 2
    if precision != "exact":
        constants |= {"Q_GROUP": 128, "K_GROUP": 64}
        types, key_bytes = {"q_ptr": "*i8", "k_ptr": "*i8"}, 1
    if precision == "int8_fp8":
        # values lie with their tokens side by side
        constants |= {"FP8": True, "v_token": 1}
        types["v_ptr"], value_bytes = "*fp8e4nv", 1
    else:
        constants["v_channel"] = 1
    stages = attention.stages_of(head, *blocks, key_bytes, value_bytes, limit)
    warps = attention.warps_of(blocks[0], head)
    return build(attention._attention_kernel, architecture, constants, types, warps, stages)


def main(architecture: int) -> dict[str, dict]:
    """All kernels of one architecture."""
    step = dict(BLOCK_Q=64, BLOCK_K=64, SPARSE=True)
    found = {
        "exact": family(architecture, 128, "exact", sparse=False),
        "exact-sparse": family(architecture, 128, "exact", sparse=True),
        "int8-sparse": family(architecture, 128, "int8", sparse=True),
        "exact-160": family(architecture, 160, "exact", sparse=False),
        "query-gradient": build(gradient._query_gradient_kernel, architecture, {**LARGE, **step}, {}, 8),
        "key-gradient": build(gradient._key_gradient_kernel, architecture, {**LARGE, **step}, {}, 8),
        "mass": build(
            selection._block_mass_kernel, architecture, {**LARGE, "BLOCK_Q": 64, "BLOCK_K": 64, "LENGTHS": True}, {}, 8
        ),
        "statistics": build(quantise._statistics_kernel, architecture, {**LARGE, "STEP": quantise.STEP}, {}, 4),
        "top-k": build(selection._top_k_kernel, architecture, {"WIDTH": 1024}, {"blocks_ptr": "*i32"}, 4),
        "pre-pass": build(
            quantise._quantise_kernel,
            architecture,
            {**LARGE, "Q_GROUP": 128, "K_GROUP": 64, "SMOOTH": True, "FP8": architecture >= 89},
            {"v8_ptr": "*fp8e4nv" if architecture >= 89 else "*i8"},
            8,
        ),
    }
    branch = {**LARGE, "KIND": 0, "STEP": 64, "WEIGHTED": True}
    found["linear-state"] = build(linear._state_kernel, architecture, branch, {**FLOATS, "state_ptr": "*fp32"}, 8, 1)
    ends = {**FLOATS, **dict.fromkeys(("out_ptr", "total_ptr"), "*fp32")}
    applied = {**LARGE, "KIND": 0, "STEP": 64}
    found["linear-apply"] = build(linear._apply_kernel, architecture, applied, ends, 8, 1)
    found["linear-pull"] = build(linear._pull_kernel, architecture, {**branch, "PRODUCT": True}, FLOATS, 8, 1)
    bytes_in = dict.fromkeys(("whole_ptr", "weight_ptr"), "*i8")
    scales = dict.fromkeys(("token_ptr", "scale_ptr", "smooth_ptr"), "*fp32")
    tile = dict(BLOCK_M=w8a8.BLOCK_M, BLOCK_N=w8a8.BLOCK_N, BLOCK_K=w8a8.BLOCK_K, BAND=w8a8.BAND)
    found["w8a8-rows"] = build(
        w8a8._rows_kernel, architecture, {"SMOOTH": True, "BLOCK": 4096}, {**bytes_in, **scales}, 4
    )
    found["w8a8-product"] = build(
        w8a8._product_kernel, architecture, {"BIAS": True, **tile}, {**bytes_in, **scales}, 8, 3
    )
    if architecture >= 89:
        found["int8_fp8-sparse"] = family(architecture, 128, "int8_fp8", sparse=True)
    if architecture == 90:
        found["exact-64"] = family(architecture, 64, "exact", sparse=False)
        found["int8_fp8"] = family(architecture, 128, "int8_fp8", sparse=False)
        found["int8_fp8-64"] = family(architecture, 64, "int8_fp8", sparse=False)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))  # noqa: T201
