"""The order of the documents as a function of (seed, epoch, position): nothing to store, nothing to replay."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fusiontree.errors import InputError

_ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of range(size) in O(1) memory, any place of it computed alone.

    A Feistel network over pairs (left, right) of range(side), side = ceil(sqrt(size)), permutes range(side**2); values
    outside range(size) are sent through again until they fall inside ("cycle walking"), which leaves a permutation of
    range(size). Both from Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). It spreads documents, it
    hides nothing.

    Args:
        size: number of elements, 1 to 2**62.
        seed, epoch: name the permutation; the same on every machine and in every version of Python and NumPy.
    """

    def __init__(self, size: int, *, seed: int | str, epoch: int) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"size must lie between 1 and 2**62, got {size}")
        self.size = size
        self._side = np.uint64(math.isqrt(size - 1) + 1)
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The elements at `positions` (integers in range(size), any shape) as int64."""
        values = np.asarray(positions).astype(np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise IndexError(f"position {int(values.max())} is outside a permutation of {self.size}")
        values = self._network(values)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._side)
        for key in self._keys:
            left, right = right, (left + _mix(right + key) % self._side) % self._side
        return left * self._side + right


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood, 2014); sums and products wrap at 2**64 on purpose."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Place(NamedTuple):
    """The next token to hand out: which epoch, which document in that epoch's order, which of its tokens.

    Within a window of `pack_best_fit` it is the window's first token, and `rows` how many of its rows are handed out.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0
    rows: int = 0


class Order(Protocol):
    """Which record stands at each of the `size` places of an epoch."""

    size: int

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Record numbers, int64, at places (integers in range(size))."""
        ...

    def is_first(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """bool: whether the record at each place has not come before."""
        ...

    def identity(self) -> dict[str, object]:
        """What the order depends on beside the records, as plain values."""
        ...


class PlainOrder:
    """Every record once an epoch: shuffled anew in each, or (seed None) as they stand."""

    def __init__(self, size: int, seed: int | None) -> None:
        self.size = size
        self.seed = seed

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.seed is None:
            return np.asarray(places, dtype=np.int64)
        return Permutation(self.size, seed=self.seed, epoch=epoch)(places)

    def is_first(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return np.full(len(places), epoch == 0)

    def identity(self) -> dict[str, object]:
        return {"seed": self.seed}


class Turns:
    """Which of several sources each place falls to, by fixed shares.

    Of each `PERIOD` places a source has a fixed number, spread evenly, so any stretch holds the shares to within one
    record a source.

    Args:
        weights: of each source, above 0; only their ratios count.

    Raises:
        InputError: a weight so small that it has no place in a period.
    """

    PERIOD = 4096

    def __init__(self, weights: Sequence[float]) -> None:
        exact = np.array(weights, dtype=np.float64) / sum(weights) * self.PERIOD
        counts = np.floor(exact).astype(np.int64)
        # Largest remainders first, as seats are given to parties.
        for source in np.argsort(counts - exact, kind="stable")[: self.PERIOD - int(counts.sum())]:
            counts[source] += 1
        if (counts == 0).any():
            raise InputError(
                f"source {int(np.argmin(counts)) + 1} has less than 1/{self.PERIOD} of all weights: raise its weight"
            )
        self.counts = counts
        turn = np.argsort(
            np.concatenate([(np.arange(count) + 0.5) / count for count in counts.tolist()]), kind="stable"
        )
        self._source = np.repeat(np.arange(len(counts)), counts)[turn]  # [PERIOD]
        self._number = np.concatenate([np.arange(count) for count in counts.tolist()])[turn]  # [PERIOD]

    def source(self, places: np.ndarray) -> np.ndarray:
        """Whose turn it is at places from 0 on, without end."""
        return self._source[places % self.PERIOD]

    def pick(self, places: np.ndarray) -> np.ndarray:
        """How many turns that source has had before."""
        period, within = np.divmod(places, self.PERIOD)
        return period * self.counts[self._source[within]] + self._number[within]

    def before(self, place: int) -> list[int]:
        """How many turns each source has had before a place."""
        period, within = divmod(place, self.PERIOD)
        begun = np.bincount(self._source[:within], minlength=len(self.counts))
        return (period * self.counts + begun).tolist()


class MixedOrder:
    """Records of several sources in fixed shares (see `Turns`), each source in its own order, over and over.

    An epoch is as many places as there are records in all; a source of a greater share than its size repeats within it,
    one of a smaller goes on in the next.

    Args:
        sizes: records of each source, at least 1; their numbers follow each other.
        weights: see `Turns`.
        seed: of the shuffles; None = each source as it stands.

    Raises:
        InputError: see `Turns`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int | None) -> None:
        self.size = sum(sizes)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._first = np.cumsum([0, *sizes[:-1]])
        self._seed = seed
        self._turns = Turns(weights)

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        everywhere = np.asarray(places, dtype=np.int64) + epoch * self.size
        sources, picks = self._turns.source(everywhere), self._turns.pick(everywhere)
        records = np.empty_like(picks)
        for source in np.unique(sources).tolist():
            mine = sources == source
            rounds, record = np.divmod(picks[mine], self._sizes[source])
            if self._seed is not None:
                for number in np.unique(rounds).tolist():
                    order = Permutation(int(self._sizes[source]), seed=f"{self._seed}.{source}", epoch=number)
                    record[rounds == number] = order(record[rounds == number])
            records[mine] = self._first[source] + record
        return records

    def is_first(self, epoch: int, places: np.ndarray) -> np.ndarray:
        everywhere = np.asarray(places, dtype=np.int64) + epoch * self.size
        return self._turns.pick(everywhere) < self._sizes[self._turns.source(everywhere)]

    def identity(self) -> dict[str, object]:
        return {"seed": self._seed, "weights": self._turns.counts.tolist(), "sizes": self._sizes.tolist()}
