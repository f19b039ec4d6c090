"""What a forecast remembers of one guidance branch, row by row, and the weights it continues a row with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ORDERS = (0, 1, 2)


def newton_weights(points: Sequence[float], at: float, damping: float = 1.0) -> list[float]:
    """Weights of the values at `points` (newest first) that continue them to `at`.

    Newton's form through all points, exact for polynomials of a degree below their number, with everything beyond the
    newest value multiplied by `damping` (1: none; 0: the newest value alone). Points that coincide with a newer one
    get no weight. (TaylorSeer's factors, https://arxiv.org/abs/2503.06923, are exact to degree one only.)
    """
    chosen = [place for place, point in enumerate(points) if point not in points[:place]]
    weights = [0.0] * len(points)
    weights[0] = 1.0
    product = 1.0
    for order in range(1, len(chosen)):
        product *= at - points[chosen[order - 1]]
        for place in chosen[: order + 1]:
            others = [points[other] for other in chosen[: order + 1] if other != place]
            share = 1.0
            for other in others:
                share *= points[place] - other
            weights[place] += damping * product / share
    return weights


@dataclass
class History:
    """Values of the last computed calls, newest first, each row with its own.

    Attributes:
        values: tensors [B, ...], at most as many as are asked for.
        points: for each value the coordinate of each row.
        input, output: of each row's last computed call, when the indicator needs them; rates: its K of each row.
        runs: how many calls in a row each row has been taken from memory.
        template: makes an output of the kind the caller expects; None before the first computed call.
        signature: shape, dtype, device and form of the calls; another one starts anew.
    """

    values: list[Tensor] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    input: Tensor | None = None
    output: Tensor | None = None
    rates: Tensor | None = None
    runs: list[int] = field(default_factory=list)
    template: object = None
    signature: object = None

    def fits(self, signature: object) -> bool:
        """True when there is something to continue a call of this kind from; else forgets what there was."""
        if self.signature != signature:
            self.__dict__.update(History(signature=signature).__dict__)
        return bool(self.values)

    def push(self, value: Tensor, point: float, keep: int, rows: Sequence[int] | None = None) -> None:
        """Add the values of the rows that were computed (all of them if None); older ones beyond `keep` are dropped.

        Args:
            value: [B, ...], or [len(rows), ...] when rows are given. Not copied.
        """
        if rows is None:
            self.values = [value, *self.values][:keep]
            self.points = [[point] * len(value), *self.points][:keep]
            return
        if len(self.values) < keep:  # a row that gains nothing repeats its oldest value, which coincides
            self.values.append(self.values[-1].clone())
            self.points.append(list(self.points[-1]))
        for place in range(len(self.values) - 1, 0, -1):
            self.values[place] = replaced(self.values[place], rows, self.values[place - 1][list(rows)])
            for row in rows:
                self.points[place][row] = self.points[place - 1][row]
        self.values[0] = replaced(self.values[0], rows, value)
        for row in rows:
            self.points[0][row] = point

    def continued(self, at: float, damping: float, rows: Sequence[int] | None = None) -> Tensor:
        """The values continued to a coordinate, for all rows [B, ...] or some [len(rows), ...]."""
        chosen = range(len(self.values[0])) if rows is None else rows
        table = [newton_weights([points[row] for points in self.points], at, damping) for row in chosen]
        return combined([value if rows is None else value[list(rows)] for value in self.values], table)


def combined(values: Sequence[Tensor], table: Sequence[Sequence[float]]) -> Tensor:
    """Sum of `values` [B, ...] with weights `table[row][value]`, added up in float32 at least."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    alike = all(weights == table[0] for weights in table)
    total: Tensor | None = None
    for place, value in enumerate(values):
        weight = table[0][place] if alike else _column(table, place, value)
        part = value.to(wide) * weight
        total = part if total is None else total + part
    assert total is not None
    return total.to(values[0].dtype)


def _column(table: Sequence[Sequence[float]], place: int, like: Tensor) -> Tensor:
    column = torch.tensor([weights[place] for weights in table], dtype=torch.float64)
    wide = torch.promote_types(like.dtype, torch.float32)
    return column.to(device=like.device, dtype=wide).view(-1, *[1] * (like.dim() - 1))


def replaced(tensor: Tensor, rows: Sequence[int], with_: Tensor) -> Tensor:
    """A copy of `tensor` with other rows at the places `rows`."""
    tensor = tensor.clone()
    tensor[list(rows)] = with_
    return tensor
