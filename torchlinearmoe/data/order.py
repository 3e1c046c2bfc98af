"""Which sample comes when: a shuffle that needs no memory.

The g-th sample of a run is a pure function of (seed, g), and of where the order began if the data changed on the way.
Epoch e = g // n visits every one of the n samples once, in an order of its own; place g % n of the epoch maps to a
sample through a keyed bijection of {0 .. n - 1}. So a run can start at any g, on any number of ranks, and nothing but g
needs saving.

The bijection is the generalised Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002): write x = left * b + right with left < a, right < b and a * b just above n; each round adds a
keyed hash of one half to the other, modulo that half's size, which is undone by subtracting it; results outside
{0 .. n - 1} are sent through again until they land inside.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

from torchlinearmoe.errors import UserError

ROUNDS = 8


class Permutation:
    """A bijection of {0 .. n - 1}, the same on every machine; `key`: ints and words. O(1) memory and time."""

    def __init__(self, n: int, key: tuple[int | str, ...]) -> None:
        if n < 1:
            raise UserError(f"a permutation of {n} elements does not exist")
        self.n = n
        self._left_size = isqrt(n - 1) + 1
        self._right_size = -(-n // self._left_size)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def __call__(self, x: int) -> int:
        """The image of 0 <= x < n."""
        if not 0 <= x < self.n:
            raise IndexError(f"{x} is outside 0 .. {self.n - 1}")
        x = self._encipher(x)
        while x >= self.n:
            x = self._encipher(x)
        return x

    def _encipher(self, x: int) -> int:
        left, right = divmod(x, self._right_size)
        for index, key in enumerate(self._round_keys):
            if index % 2:
                right = (right + _mix(left ^ key)) % self._right_size
            else:
                left = (left + _mix(right ^ key)) % self._left_size
        return left * self._right_size + right


def _mix(x: int) -> int:
    """A 64-bit hash of a 64-bit number: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def mix_all(x: np.ndarray) -> np.ndarray:
    """The same of uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """Global sample index -> sample of the split, epoch by epoch.

    first: the global index at which the first epoch begins; orders that begin at different ones are unlike, and so are
    those of different `stream`s.
    """

    def __init__(self, num_samples: int, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> None:
        self._stream = stream
        self.num_samples = num_samples
        self.seed = seed
        self.first = first
        self._epoch = -1
        self._permutation: Permutation | None = None

    def figures(self, stop: int) -> dict[str, float]:
        """Nothing to tell of one source."""
        return {}

    def __getitem__(self, global_index: int) -> int:
        """The sample, 0 <= sample < num_samples, that is the `global_index`-th of the run."""
        epoch, place = divmod(global_index - self.first, self.num_samples)
        if self._permutation is None or epoch != self._epoch:
            key = (self.seed, epoch, self.first) if self.first else (self.seed, epoch)
            key = (*key, "stream", *self._stream) if self._stream else key
            self._permutation, self._epoch = Permutation(self.num_samples, key), epoch
        return self._permutation(place)
