"""torchao's 8-bit linear layer, compiled, timed in its own environment. Reads one JSON object a line, answers with one.

`{"tokens", "inputs", "outputs"}` makes a layer of the seeded weight and warms it up; `{"runs": n}` times it n times.
"""

import json
import os
import sys
import time
from typing import Any

import torch


def layer(tokens: int, inputs: int, outputs: int):
    """The layer's call, its relative error, and the bytes of its weight."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator)
    truth = torch.nn.functional.linear(x, weight, bias)
    linear = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    made = torch.nn.Sequential(linear.bfloat16())
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    compiled: Any = torch.compile(made)
    x = x.bfloat16()
    with torch.no_grad():
        found = compiled(x).float()
        compiled(x)
    return lambda: compiled(x), float((found - truth).norm() / truth.norm()), held(made)


def held(made: torch.nn.Module) -> int:
    """Bytes of a module's tensors, and of the tensors that its quantised ones are made of."""

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        flatten: Any = getattr(tensor, "__tensor_flatten__", None)
        return [part for name in flatten()[0] for part in parts(getattr(tensor, name))] if flatten else [tensor]

    return sum(part.numel() * part.element_size() for one in made.state_dict().values() for part in parts(one))


def main() -> None:
    """Answers requests until its input ends."""
    # torchao and the compiler print as they please, and the answers need a line of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[1]))
    call: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "runs" in asked:
            taken = []
            with torch.no_grad():
                for _ in range(asked["runs"]):
                    start = time.perf_counter()
                    call()
                    taken.append(1000 * (time.perf_counter() - start))
            answer = {"ms": taken}
        else:
            call, error, size = layer(**asked)
            answer = {"error": error, "bytes": size}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
