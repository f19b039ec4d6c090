"""Guidance folded into a row-wise sampler's table.

Classifier-free guidance and the residual kinds of StreamDiffusion (https://arxiv.org/abs/2312.12491) are linear in the
network outputs, in the state and in a reference latent, so they cost no extra tensor passes: the guided step is one
weighted sum.

* ``none``: the conditional output.
* ``full``: ``negative + scale * (output - negative)``; a second row with the negative prompt for every row.
* ``self``: the negative is virtual: the noise ``(x - signal * reference) / noise`` that separates the state from the
  reference, the latent of the frame itself. No extra row.
* ``onetime``: a real negative row at a frame's first step only; its clean estimate is the reference of later steps.

``delta`` scales the negative, ``delta * negative + scale * (output - delta * negative)``: in noise space for networks
on a VP schedule, in velocity space for flow networks (noise space is singular at sigma 1). At ``delta`` 1 they agree.
The reference is held explicitly per row: the recursion on "stock noise" that the published code uses instead drifts
when there is one step and does not survive frame buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdiff.sampling.algebra import clean_weights, noise_weights
from fastdiff.sampling.rows import RowTable

GUIDANCE = ("none", "full", "self", "onetime")


@dataclass(frozen=True)
class GuidedTable:
    """Weights of one guided step, ``[n]`` float64 tensors, row ``i`` for step ``i``.

    ``x_next = x * x + output * output + negative * negative_output + reference * reference + fresh * noise + past *
    previous_clean`` and the same with ``clean_`` for the clean estimate. ``anchor_x`` and ``anchor_negative`` give the
    clean estimate of a negative row, the later reference under ``onetime``.
    """

    x: torch.Tensor
    output: torch.Tensor
    negative: torch.Tensor
    reference: torch.Tensor
    fresh: torch.Tensor
    past: torch.Tensor
    clean_x: torch.Tensor
    clean_output: torch.Tensor
    clean_negative: torch.Tensor
    clean_reference: torch.Tensor
    anchor_x: torch.Tensor
    anchor_negative: torch.Tensor


def guide(table: RowTable, guidance: str = "none", scale: float = 1.0, delta: float = 1.0) -> GuidedTable:
    """Fold guidance into a sampler's table (float64). At ``scale`` 1 every kind is ``none``.

    Raises:
        ValueError: for an unknown kind, or weights that are not finite (``delta`` other than 1 at zero signal).
    """
    if guidance not in GUIDANCE:
        raise ValueError(f"unknown guidance {guidance!r}: choose one of {', '.join(GUIDANCE)}")
    of_x, of_output, of_negative, of_reference = _guided_output(table, guidance, scale, delta)
    anchor_x, anchor_negative = clean_weights(table.prediction, table.signal, table.noise)
    guided = GuidedTable(
        x=table.keep + table.gain * of_x,
        output=table.gain * of_output,
        negative=table.gain * of_negative,
        reference=table.gain * of_reference,
        fresh=table.fresh,
        past=table.past,
        clean_x=table.clean_keep + table.clean_gain * of_x,
        clean_output=table.clean_gain * of_output,
        clean_negative=table.clean_gain * of_negative,
        clean_reference=table.clean_gain * of_reference,
        anchor_x=anchor_x,
        anchor_negative=anchor_negative,
    )
    if not all(torch.isfinite(values).all() for values in vars(guided).values()):
        raise ValueError(
            f"guidance {guidance!r} with delta {delta} is not finite at timesteps {table.timesteps.tolist()}: "
            "use delta 1"
        )
    return guided


def negative_steps(steps: int, guidance: str, scale: float) -> int:
    """How many of a frame's first steps need a row of their own with the negative prompt."""
    if scale == 1 or guidance in ("none", "self"):
        return 0
    return steps if guidance == "full" else 1


def _guided_output(table: RowTable, guidance: str, scale: float, delta: float):
    """Weights of ``(x, output, negative, reference)`` in the guided output, ``[n]`` each."""
    zeros, ones = torch.zeros_like(table.keep), torch.ones_like(table.keep)
    if guidance == "none" or scale == 1:
        return zeros, ones, zeros, zeros
    if guidance == "full":
        return zeros, scale * ones, (1 - scale) * ones, zeros
    signal, noise, pull = table.signal, table.noise, delta * (1 - scale)
    if table.prediction == "flow_prediction":
        # the virtual velocity (x - (signal + noise) reference) / noise points from the reference to the state
        of_x, of_reference = pull / noise, -pull * (signal + noise) / noise
        first_x = zeros
    else:
        eps_x, eps_output = noise_weights(table.prediction, signal, noise)
        of_x = ((scale - 1) * eps_x + pull / noise) / eps_output
        of_reference = -pull * signal / (noise * eps_output)
        first_x = (scale - 1) * (1 - delta) * eps_x / eps_output
    of_negative = zeros.clone()
    if guidance == "onetime":
        of_x, of_reference = of_x.clone(), of_reference.clone()
        of_x[0], of_negative[0], of_reference[0] = first_x[0], pull, 0.0
    return of_x, scale * ones, of_negative, of_reference
