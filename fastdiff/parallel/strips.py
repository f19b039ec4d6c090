"""Who owns which rows, and who needs which rows of whom. Pure integer arithmetic.

"Rows" are image rows under patch parallelism and frames under clip parallelism. A strip is one rank's contiguous range;
strips may have different sizes, and their inner bounds are multiples of the model's total downsampling, so that every
level of the model is cut at the same place of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Range = tuple[int, int]


@dataclass(frozen=True)
class Strips:
    """Contiguous ranges of rows, one a rank: rank r owns `bounds[r]` up to but not including `bounds[r + 1]`."""

    bounds: tuple[int, ...]

    def __post_init__(self):
        if len(self.bounds) < 2 or self.bounds[0] != 0 or any(a >= b for a, b in pairwise(self.bounds)):
            raise ValueError(f"strips need bounds that rise from 0, one more than ranks; these are {self.bounds}")

    @classmethod
    def share(cls, rows: int, shares: Sequence[float], multiple: int = 1) -> "Strips":
        """Cut `rows` in proportion to `shares`, inner bounds at multiples of `multiple`, at least `multiple` rows each.

        Raises:
            ValueError: there are not enough rows for so many ranks.
        """
        units = rows // multiple
        if units < len(shares):
            raise ValueError(
                f"{rows} rows cannot be shared by {len(shares)} ranks: each needs at least {multiple} of them; "
                f"use at most {units} ranks or a larger picture"
            )
        counts = _apportion(units, shares)
        return cls((0, *(multiple * edge for edge in list(accumulate(counts))[:-1]), rows))

    @property
    def ranks(self) -> int:
        """How many strips there are."""
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return self.bounds[-1]

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of each rank."""
        return tuple(b - a for a, b in pairwise(self.bounds))

    def own(self, rank: int) -> Range:
        """First row of `rank` and the row after its last."""
        return self.bounds[rank], self.bounds[rank + 1]

    def strided(self, stride: int, rows: int) -> "Strips":
        """The strips of the output of a layer that takes every `stride`-th row and has `rows` output rows."""
        return Strips((*(-(-edge // stride) for edge in self.bounds[:-1]), rows))

    def level(self, rows: int) -> "Strips":
        """The same cuts in a picture of `rows` rows: a power of two fewer (rounded up) or a whole multiple."""
        if rows == self.rows:
            return self
        if rows % self.rows == 0:
            return self.scaled(rows // self.rows)
        stride = 2
        while stride < self.rows and -(-self.rows // stride) > rows:
            stride *= 2
        if -(-self.rows // stride) != rows or any(edge % stride for edge in self.bounds[:-1]):
            raise ValueError(f"{rows} rows are no level of a picture of {self.rows} rows cut at {self.bounds}")
        return self.strided(stride, rows)

    def scaled(self, factor: int) -> "Strips":
        """The same cuts where every row has become `factor` rows (or one row has `factor` tokens)."""
        return Strips(tuple(factor * edge for edge in self.bounds))

    def windows(self, reach: int) -> list[Range]:
        """Each rank's own rows and `reach` more on either side, within the picture."""
        return [(max(0, a - reach), min(self.rows, b + reach)) for a, b in pairwise(self.bounds)]

    def transfers(self, needs: Sequence[Range], rank: int) -> tuple[dict[int, Range], dict[int, Range]]:
        """What `rank` sends and receives so that every rank r has the rows `needs[r]`.

        Returns:
            (sends, receives): other rank to a range of rows of the picture.
        """
        others = [other for other in range(self.ranks) if other != rank]
        sends = {other: _overlap(needs[other], self.own(rank)) for other in others}
        receives = {other: _overlap(needs[rank], self.own(other)) for other in others}
        return (
            {other: rows for other, rows in sends.items() if rows is not None},
            {other: rows for other, rows in receives.items() if rows is not None},
        )


@dataclass(frozen=True)
class Kernel:
    """The geometry of a convolution along the rows."""

    size: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1

    def output(self, rows: int) -> int:
        """Rows of the output of a picture of `rows` rows."""
        return (rows + self.before + self.after - self.dilation * (self.size - 1) - 1) // self.stride + 1

    def needs(self, produces: Range) -> Range:
        """The input rows, some of them perhaps outside the picture, that output rows `produces` depend on."""
        first, last = produces[0], produces[1] - 1
        low = first * self.stride - self.before
        return low, last * self.stride - self.before + self.dilation * (self.size - 1) + 1

    @property
    def local(self) -> bool:
        """True when no output row depends on a row of another strip, wherever the strips are cut in step."""
        return self.size <= self.stride and not self.before and not self.after


def _overlap(a: Range, b: Range) -> Range | None:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else None


def _apportion(units: int, shares: Sequence[float]) -> list[int]:
    """Split `units` in proportion to `shares`, at least one each, by largest remainder."""
    if any(not share > 0 for share in shares):
        raise ValueError(f"every share must be greater than 0; these are {tuple(shares)}")
    total = sum(shares)
    exact = [units * share / total for share in shares]
    counts = [max(1, int(amount)) for amount in exact]
    while sum(counts) > units:
        counts[max(range(len(counts)), key=lambda rank: (counts[rank] > 1, counts[rank] - exact[rank]))] -= 1
    while sum(counts) < units:
        counts[max(range(len(counts)), key=lambda rank: exact[rank] - counts[rank])] += 1
    return counts
