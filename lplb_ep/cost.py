"""The cost of a rank's rows: the time of its experts' computation, in whole nanoseconds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .plain_files import read_json

Int64 = npt.NDArray[np.int64]

MAX_STEPS = 128
"""Steps of a table; kernels keep them in shared memory."""
FEW_COPIES, FEW_TILES = 8, 1024
"""Of an expert: up to which the least cost over its copies is found exactly."""
_TILES_AT_ONCE = 64
_KEY, _VERSION = "lplb_ep_cost", 1
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class CostModel:
    """The time of a rank: `fixed`, and the cost of rows of each of its slots.

    A slot without rows costs nothing. Rows count in tiles: one row beyond a tile costs a whole
    tile. The first step includes the fixed cost of an active slot. Base loads cost like a slot's
    rows.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    name: str
    """Of the table, for people."""
    tile: int
    """Rows of a step, at least 1."""
    steps: tuple[int, ...]
    """Nanoseconds of a slot with 1 to `tile` rows, up to twice as many, and so on. At most
    `MAX_STEPS`, and none is below the one before."""
    slope: int
    """Nanoseconds of each tile beyond the last step."""
    fixed: int = 0
    """Nanoseconds of a rank, whatever its rows."""
    about: str = field(default="", compare=False)
    """Where the numbers come from."""
    push: int | None = None
    """Nanoseconds that a rank waits for the weights of one guest; None: not known."""

    def __post_init__(self) -> None:
        for name in ("name", "about"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} of a cost model must be a string; got {getattr(self, name)!r}"
                )
        if not isinstance(self.steps, (list, tuple)):
            raise ValueError(f"steps of a cost model must be a list; got {self.steps!r}")
        object.__setattr__(self, "steps", tuple(self.steps))
        for name, values, least in (
            ("tile", (self.tile,), 1),
            ("steps", self.steps, 0),
            ("slope", (self.slope,), 0),
            ("fixed", (self.fixed,), 0),
            ("push", () if self.push is None else (self.push,), 0),
        ):
            for value in values:
                if type(value) is not int or not least <= value <= _LARGEST:
                    raise ValueError(
                        f"{name} of a cost model must be whole numbers in [{least}, {_LARGEST}]; "
                        f"got {value!r}"
                    )
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise ValueError(
                f"a cost model must have 1 to {MAX_STEPS} steps; got {len(self.steps)}"
            )
        if list(self.steps) != sorted(self.steps):
            raise ValueError("steps of a cost model must not decrease")

    def of_slots(self, rows: npt.ArrayLike) -> Int64:
        """Nanoseconds of slots.

        Args:
            rows: of each, integers of any shape that are not negative.

        Returns:
            int64 of the same shape.
        """
        tiles, last = -(-np.asarray(rows, np.int64) // self.tile), len(self.steps)
        return self._table[np.minimum(tiles, last)] + self.slope * np.maximum(tiles - last, 0)

    def least_of_experts(self, load: npt.ArrayLike, copies: npt.ArrayLike | None = None) -> Int64:
        """A lower bound of the cost of experts by their loads, however these are cut.

        Args:
            load: integers of any shape that are not negative.
            copies: of each expert, from 1, which it may be cut over; None: over any number. Up to
                `FEW_COPIES` and `FEW_TILES` the bound is exact for that number.

        Returns:
            int64 nanoseconds of the same shape.
        """
        tiles = -(-np.asarray(load, np.int64) // self.tile)
        least, (cost, per) = self._least
        # Beyond the table: as many tiles as cost least for their number.
        beyond = np.maximum(least[-1], tiles * cost // per)
        out = np.where(tiles < least.size, least[np.minimum(tiles, least.size - 1)], beyond)
        if copies is None:
            return out
        number = np.asarray(copies, np.int64)
        out = np.where(number == 1, self.of_slots(load), out)
        few = (number > 1) & (number <= FEW_COPIES) & (tiles <= FEW_TILES)
        if few.any():
            most = -(-int(tiles[few].max()) // _TILES_AT_ONCE) * _TILES_AT_ONCE
            exact = _least_over_copies(self, most, int(number[few].max()))
            out[few] = exact[number[few] - 1, tiles[few]]
        return out

    def most_rows(self, cost: npt.ArrayLike) -> Int64:
        """The most rows of a slot within a cost, in whole tiles.

        Args:
            cost: nanoseconds, integers of any shape.

        Returns:
            int64 of the same shape, at most 2**31 - 1; -1 for a cost below 0.
        """
        left = np.asarray(cost, np.int64)
        tiles = np.searchsorted(self._table, left, side="right") - 1
        more = (left - self._table[-1]) // self.slope if self.slope else _LARGEST
        most = len(self.steps) + np.minimum(more, _LARGEST)
        tiles = np.where(left >= self._table[-1], most, tiles)
        return np.where(left < 0, -1, np.minimum(tiles * self.tile, _LARGEST))

    @cached_property
    def free_rows(self) -> int:
        """The most rows of a slot that cost no more than a single one."""
        return int(self.most_rows(self.steps[0]))

    @property
    def table_rows(self) -> int:
        """The rows of a slot up to which the table has steps. Beyond them a line goes on."""
        return self.tile * len(self.steps)

    @cached_property
    def push_rows(self) -> int:
        """The most rows of a slot that cost no more than a push, which must be known."""
        assert self.push is not None, "the cost of a push is not known"
        return int(self.most_rows(self.push))

    @cached_property
    def _table(self) -> Int64:
        """[1 + steps] by tiles."""
        return np.array([0, *self.steps])

    @property
    def tables(self) -> tuple[Int64, Int64, tuple[int, int]]:
        """For kernels: [1 + steps] costs of a slot by tiles, and the least of an expert over any
        copies. Then what an expert beyond the table costs, for how many tiles."""
        return self._table, *self._least

    @cached_property
    def _least(self) -> tuple[Int64, tuple[int, int]]:
        """The same where a load may be cut into fragments; and the cheapest number of tiles."""
        least = self._table.copy()
        for tiles in range(2, least.size):
            least[tiles] = min(least[tiles], (least[1:tiles] + least[tiles - 1 : 0 : -1]).min())
        rates = [(Fraction(cost, i), cost, i) for i, cost in enumerate(self.steps, 1)]
        _, cost, per = min([*rates, (Fraction(self.slope), self.slope, 1)])
        return least, (cost, per)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the numbers, which decide plans; ranks compare it."""
        numbers = self.tile, self.steps, self.slope, self.fixed, self.push
        return hashlib.sha256(repr(numbers).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads, and that `LPLB_EP_COST` may name.

        Raises:
            OSError: the file is not writable.
        """
        with open(path, "w", encoding="utf-8") as file:
            json.dump({_KEY: _VERSION, **asdict(self)}, file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Reads a file of `save`, or one that `lplb-ep calibrate` wrote.

        Raises:
            ValueError: it is another file, or a field is out of range; file and field are named.
            OSError: the file is not readable.
        """
        where = os.fspath(path)
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; so it is not a cost model") from None
        if not isinstance(content, dict) or content.pop(_KEY, None) != _VERSION:
            raise ValueError(f"{where} is not a cost model saved by this version")
        others = [name for name in content if name not in (f.name for f in fields(cls))]
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in content]
        for what, names in (("has no field", others), ("needs the field", missing)):
            if names:
                raise ValueError(f"{where}: a cost model {what} {names[0]!r}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


@functools.lru_cache(maxsize=16)
def _least_over_copies(model: CostModel, most_tiles: int, most_copies: int) -> Int64:
    """[copies, 1 + tiles] the least that so many tiles cost over at most 1, 2, … copies."""
    one = model.of_slots(np.arange(most_tiles + 1) * model.tile)
    found = [one]
    for _ in range(1, most_copies):
        fewer, least = found[-1], found[-1].copy()
        for tiles in range(2, most_tiles + 1):
            least[tiles] = min(least[tiles], (fewer[1:tiles] + one[tiles - 1 : 0 : -1]).min())
        found.append(least)
    return np.stack(found)


H200 = CostModel(
    name="h200",
    tile=64,
    steps=(
        30_081,
        30_081,
        37_306,
        37_306,
        63_362,
        63_362,
        63_362,
        65_283,
        95_399,
        95_399,
        97_594,
        98_383,
        127_778,
        130_330,
        130_330,
        130_330,
        164_012,
        164_012,
        164_012,
        164_012,
        164_012,
        164_012,
        164_012,
        204_928,
        233_455,
        233_455,
        233_455,
        233_455,
        233_455,
        233_455,
        233_455,
        285_416,
    ),
    slope=7_432,
    fixed=33_963,
    about="DeepSeek-V3's experts in bf16, torch's grouped GEMM, one H200",
    push=280_000,
)
"""The built-in table, as `lplb-ep calibrate` measured it: experts 7168 and 2048 wide, 34 slots.

It was off by 2.1 % in the median of 200 mixed batches. No other GPU has one: their own is made by
`lplb-ep calibrate`. A push of such an expert of 88 MB is that between two H200s by NVLink, with 16
SMs (314 GB/s)."""


def choose_cost(request: str = "", device: str | None = None) -> tuple[CostModel, str]:
    """The cost model of a request, and why.

    Args:
        request: a file of `CostModel.save`; "": the built-in table.
        device: the GPU's name; None: there is none.

    Raises:
        ValueError, OSError: as `CostModel.load`.
    """
    if request:
        return CostModel.load(request), "asked for"
    if device is not None and "H200" in device:
        return H200, "measured on such a GPU"
    of = "of the CPU" if device is None else f"of {device}"
    return H200, f"no table {of} is built in, so an H200's serves; `lplb-ep calibrate` makes one"
