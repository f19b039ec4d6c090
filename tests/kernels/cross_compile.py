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

POINTERS = {
    "lse_ptr": "*fp32", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32",
    "shift_ptr": "*fp32", "blocks_ptr": "*i32", "counts_ptr": "*i32", "lengths_ptr": "*i32", "far_lse_ptr": "*fp32",
    "delta_ptr": "*fp32", "mass_ptr": "*fp32", "parts_ptr": "*fp32", "scores_ptr": "*fp32", "q8_ptr": "*i8",
    "k8_ptr": "*i8", "q_pool_ptr": "*fp32", "k_pool_ptr": "*fp32",
}  # fmt: skip
NOTHING = dict(SPARSE=False, INT8=False, FP8=False, FAR=False, LENGTHS=False, Q_GROUP=1, K_GROUP=1)
LARGE = dict(HEAD=128, PADDED=128)


def build(kernel: Any, architecture: int, constants: dict[str, Any], types: dict[str, str], warps: int) -> dict:
    """Compile one kernel; `types` overrides what names say of its arguments."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, POINTERS.get(name, "*bf16"))
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    # what Triton itself finds out of aligned tensors at a launch
    aligned = [name for name in signature if name.endswith(("_ptr", "_batch", "_head", "_token"))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 2})
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


def main(architecture: int) -> dict[str, dict]:
    """All kernels of one architecture."""
    family, sparse = attention._attention_kernel, {**NOTHING, "SPARSE": True, "FAR": True, "v_channel": 1}
    eight = {"q_ptr": "*i8", "k_ptr": "*i8"}
    groups = dict(Q_GROUP=128, K_GROUP=64)
    step = dict(BLOCK_Q=64, BLOCK_K=64, SPARSE=True)
    tiles = dict(BLOCK_Q=128, BLOCK_K=64)
    found = {
        "exact": build(family, architecture, {**NOTHING, **LARGE, "v_channel": 1, **tiles}, {}, 8),
        "exact-sparse": build(family, architecture, {**sparse, **LARGE, **tiles}, {}, 8),
        "int8-sparse": build(family, architecture, {**sparse, **LARGE, **groups, "INT8": True, **tiles}, eight, 8),
        "query-gradient": build(gradient._query_gradient_kernel, architecture, {**LARGE, **step}, {}, 8),
        "key-gradient": build(gradient._key_gradient_kernel, architecture, {**LARGE, **step}, {}, 8),
        "mass": build(selection._block_mass_kernel, architecture, {**LARGE, "BLOCK_Q": 64, "BLOCK_K": 64}, {}, 4),
        "top-k": build(selection._top_k_kernel, architecture, {"WIDTH": 1024}, {"blocks_ptr": "*i32"}, 4),
        "pre-pass": build(
            quantise._quantise_kernel,
            architecture,
            {**LARGE, **groups, "SMOOTH": True, "FP8": architecture >= 89},
            {"v8_ptr": "*fp8e4nv" if architecture >= 89 else "*i8"},
            8,
        ),
    }
    if architecture >= 89:
        types = {**eight, "v_ptr": "*fp8e4nv"}
        # values lie with their tokens side by side
        del sparse["v_channel"]
        constants = {**sparse, "v_token": 1, **LARGE, **groups, "INT8": True, "FP8": True, **tiles}
        found["int8_fp8-sparse"] = build(family, architecture, constants, types, 8)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))  # noqa: T201
