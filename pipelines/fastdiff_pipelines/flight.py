"""One denoiser call over all frames in flight, and one step of each.

A `Plan` is everything about a call that does not depend on the pixels: timesteps, conditioning and step weights of
every row, stacked once and reused for as long as rows of the same settings stand at the same steps, which in a running
stream is always. Rows with a negative prompt follow the frames' own rows; padding follows both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdiff_pipelines.denoiser import Conditioning, Denoiser
from fastdiff_pipelines.prepared import WEIGHTS
from fastdiff_pipelines.slots import Slot

PLANS_KEPT = 64


@dataclass(frozen=True)
class Plan:
    """The fixed part of a call on `live` frames.

    Attributes:
        weights: name to ``[live, 1, 1, 1]``, or None where every weight is zero.
        negatives: which frame each negative row belongs to.
        negative_rows: for each frame the row of its negative output (its own where it has none), int64 ``[live]``.
        anchored: ``(frame, negative row)`` pairs whose negative output becomes the frame's reference.
        injection: weighted fixed noise ``[live, C, h, w]`` to add, None when noises differ per frame or are not needed.
    """

    live: int
    rows: int
    padding: int
    told: torch.Tensor
    conditioning: Conditioning
    weights: dict[str, torch.Tensor | None]
    negatives: tuple[int, ...]
    negative_rows: torch.Tensor | None
    anchored: tuple[tuple[int, int], ...]
    injection: torch.Tensor | None
    needs_noise: bool
    needs_reference: bool
    has_history: bool


@dataclass(frozen=True)
class Call:
    """What went into and came out of a call, kept until the next so that frames can be moved to other settings."""

    plan: Plan
    x: torch.Tensor
    output: torch.Tensor
    negative: torch.Tensor | None
    reference: torch.Tensor | None

    def clean(self) -> torch.Tensor:
        """Clean estimates ``[live, C, h, w]`` after this call."""
        w = self.plan.weights
        found = _column(w["clean_x"], self.x) + _column(w["clean_output"], self.output)
        for name, values in (("clean_negative", self.negative), ("clean_reference", self.reference)):
            if values is not None:
                found = found + _column(w[name], values)
        return found


def _column(weight: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values) if weight is None else weight * values


class Batch:
    """Runs calls and keeps plans.

    Attributes:
        capacity: rows of a padded call; more rows than that take further calls of the same shape.
        padded: whether calls are padded to `capacity`.
        calls, rows, padding: denoiser calls made, and rows in them that were frames (or their negatives) and padding.
        shapes: shapes the denoiser has seen.
    """

    def __init__(self, denoiser: Denoiser, capacity: int, padded: bool, blank: torch.Tensor):
        self.denoiser = denoiser
        self.capacity = capacity
        self.padded = padded
        self.blank = blank  # [1, C, h, w] of the state dtype
        self.calls = self.rows = self.padding = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()

    def advance(self, slots: Sequence[Slot]) -> None:
        """Take one step of every slot. If the model raises, no slot has changed.

        The states must share a dtype and device; slots may differ in step, settings and sampler.
        """
        plan = self._plan(slots)
        pieces = [slot.latent for slot in slots] + [slots[i].latent for i in plan.negatives]
        if plan.padding:
            pieces.append(self.blank.expand(plan.padding, -1, -1, -1))
        states = torch.cat(pieces)  # [rows + padding, C, h, w]
        outputs = self._denoise(states, plan)
        x, output = states[: plan.live], outputs[: plan.live]
        negative = None if plan.negative_rows is None else outputs.index_select(0, plan.negative_rows)
        reference = self._references(slots) if plan.needs_reference else None
        call = Call(plan, x, output, negative, reference)
        following = self._step(call, slots)
        past = call.clean().split(1) if plan.has_history else None
        anchors = [self._anchor(x, outputs, plan, frame, row) for frame, row in plan.anchored]
        for row, (slot, latent) in enumerate(zip(slots, following.split(1), strict=True)):
            slot.latent, slot.step, slot.call, slot.row = latent, slot.step + 1, call, row
            if past is not None:
                slot.past = past[row]
        for (frame, _), anchor in zip(plan.anchored, anchors, strict=True):
            slots[frame].reference = anchor

    def _denoise(self, states: torch.Tensor, plan: Plan) -> torch.Tensor:
        inputs = states.to(self.denoiser.dtype)
        size = self.capacity if self.padded else len(inputs)
        outputs = []
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            whole = size == len(inputs)
            conditioning = plan.conditioning if whole else {k: v[part] for k, v in plan.conditioning.items()}
            chunk = inputs if whole else inputs[part]
            output = self.denoiser(chunk, plan.told if whole else plan.told[part], conditioning)
            outputs.append(output if whole else output.clone())  # a compiled model may overwrite its output
            self.shapes.add(tuple(chunk.shape))
            self.calls += 1
        self.rows += plan.rows
        self.padding += plan.padding
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.to(states.dtype)

    def _step(self, call: Call, slots: Sequence[Slot]) -> torch.Tensor:
        plan, w = call.plan, call.plan.weights
        following = _column(w["x"], call.x)
        if w["output"] is not None:
            following.addcmul_(call.output, w["output"])
        if call.negative is not None and w["negative"] is not None:
            following.addcmul_(call.negative, w["negative"])
        if call.reference is not None and w["reference"] is not None:
            following.addcmul_(call.reference, w["reference"])
        if plan.injection is not None:
            following.add_(plan.injection)
        elif plan.needs_noise and w["fresh"] is not None:
            following.addcmul_(torch.stack([_next_noise(slot) for slot in slots]), w["fresh"])
        if plan.has_history and w["past"] is not None:
            following.addcmul_(torch.cat([self.blank if s.past is None else s.past for s in slots]), w["past"])
        return following

    def _references(self, slots: Sequence[Slot]) -> torch.Tensor:
        return torch.cat([self.blank if slot.reference is None else slot.reference for slot in slots])

    @staticmethod
    def _anchor(x: torch.Tensor, outputs: torch.Tensor, plan: Plan, frame: int, row: int) -> torch.Tensor:
        """The clean estimate of a negative row, ``[1, C, h, w]``."""
        of_x, of_negative = plan.weights["anchor_x"], plan.weights["anchor_negative"]
        here = slice(frame, frame + 1)
        found = x[here] * of_x[here] if of_x is not None else torch.zeros_like(x[here])
        return found if of_negative is None else found + outputs[row : row + 1] * of_negative[here]

    def _plan(self, slots: Sequence[Slot]) -> Plan:
        key = (self.padded, *((slot.prepared.version, slot.step) for slot in slots))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(slots)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _make_plan(self, slots: Sequence[Slot]) -> Plan:
        live = len(slots)
        negatives = tuple(i for i, slot in enumerate(slots) if slot.step < slot.prepared.negative_steps)
        rows = live + len(negatives)
        padding = -rows % self.capacity if self.padded else 0
        columns = [slot.prepared.weights[:, slot.step] for slot in slots]
        stacked = torch.stack(columns, dim=1).view(len(WEIGHTS), live, 1, 1, 1)
        exact = [[float(getattr(s.prepared.exact, name)[s.step]) for s in slots] for name in WEIGHTS]
        weights = {name: stacked[i] if any(exact[i]) else None for i, name in enumerate(WEIGHTS)}
        told = [slot.prepared.told[slot.step : slot.step + 1] for slot in slots]
        told += [told[i] for i in negatives] + [told[0]] * padding
        conditions = [slot.prepared.positive for slot in slots]
        conditions += [slots[i].prepared.negative or {} for i in negatives] + [conditions[0]] * padding
        fixed = all(slot.prepared.settings.noise == "fixed" for slot in slots)
        fresh = weights["fresh"]
        return Plan(
            live=live,
            rows=rows,
            padding=padding,
            told=torch.cat(told),
            conditioning={name: _join([c[name] for c in conditions]) for name in conditions[0]},
            weights=weights,
            negatives=negatives,
            negative_rows=self._negative_rows(live, negatives),
            anchored=tuple(
                (frame, live + k)
                for k, frame in enumerate(negatives)
                if slots[frame].prepared.settings.guidance == "onetime"
            ),
            injection=torch.stack([_next_noise(s) for s in slots]) * fresh if fixed and fresh is not None else None,
            needs_noise=fresh is not None,
            needs_reference=weights["reference"] is not None,
            has_history=any(slot.prepared.has_history for slot in slots),
        )

    def _negative_rows(self, live: int, negatives: tuple[int, ...]) -> torch.Tensor | None:
        if not negatives:
            return None
        index = list(range(live))
        for k, frame in enumerate(negatives):
            index[frame] = live + k
        return torch.tensor(index, device=self.blank.device)


def _next_noise(slot: Slot) -> torch.Tensor:
    """The noise injected on the way to the slot's next step (any, at the last, where its weight is zero)."""
    return slot.noises[min(slot.step + 1, len(slot.prepared) - 1)]


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    if all(part is parts[0] for part in parts):
        return parts[0].expand(len(parts), *parts[0].shape[1:]).contiguous()
    return torch.cat(parts)
