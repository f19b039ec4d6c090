"""Few-step and guidance-free students of a diffusion model: one trainer, interchangeable losses.

`networks` says what a loss sees (noise levels, and networks called as ``net(x, level, condition)``), each loss is one
file with one frozen dataclass, `trainer` runs any of them on any diffusers text-to-image pipeline, `students` writes
and reads what comes out: a LoRA file or adapter that diffusers loads, with a card.
"""
