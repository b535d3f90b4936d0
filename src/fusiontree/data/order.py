"""The order of the documents as a function of (seed, epoch, position): nothing to store, nothing to replay."""

from __future__ import annotations

import hashlib
import math

import numpy as np

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

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
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
