"""Randomness as arithmetic: every draw is a pure function of a key and a counter.

Nothing here has state, so a sample's crop or a step's mixing is the same for any number of
workers, before and after a resume, and with any version of numpy (whose generators may change
their streams between releases).

The permutation is a Feistel network over two unequal digits, with additive rounds and cycle
walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Chi-square over all
n! orders of n = 3..7, 600,000 keys: 8 rounds fail for n >= 5 (z = 1132), 16 still fail (z = 9),
24 pass (all |z| < 1.8). A shuffled array of indices costs 8 bytes per sample in every worker;
this costs nothing, and 1.4 us per index (batches of 256). `mix64` in place: 9.1 us instead of 9.6
per index in batches of 64, on a busy machine; not worth its lines.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

_ROUNDS = 24
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U64 = np.uint64


def derive_key(*words: int | str) -> int:
    """A 64-bit key that depends on every word and on their order."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def mix64(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one to one (splitmix64's finaliser, Steele et al. 2014)."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def subkeys(key: int, counters: ArrayLike) -> np.ndarray:
    """One uint64 key for each counter, in an integer array of one or more dimensions."""
    counters = np.asarray(counters, dtype=np.uint64)
    return mix64(mix64(counters * _GOLDEN + _U64(key)) ^ _U64(key))


def uniform(keys: np.ndarray, num_draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (len(keys), num_draws); row i depends on keys[i] alone."""
    counters = np.arange(1, num_draws + 1, dtype=np.uint64) * _GOLDEN
    bits = mix64(mix64(np.asarray(keys, dtype=np.uint64)[:, None] + counters))
    return (bits >> _U64(11)).astype(np.float64) * 2.0**-53


def permute(
    index: ArrayLike, size: ArrayLike, key: ArrayLike, *, inverse: bool = False
) -> np.ndarray:
    """Where a keyed uniform permutation of range(size) sends each index; int64, same shape.

    Args:
        index: integers in [0, size), 1-D.
        size: one size, or one per index; at least 1.
        key: one 64-bit key, or one per index.
        inverse: give the index that is sent to each instead.
    """
    index = np.asarray(index, dtype=np.uint64)
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    key = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    # The left digit's range is even: with two odd ranges every round is an even permutation.
    left_range = (2 * np.ceil(np.sqrt(size.astype(np.float64)) / 2)).astype(np.uint64)
    right_range = -(-size.astype(np.int64) // left_range.astype(np.int64)).astype(np.uint64)
    rounds = _feistel_inverse if inverse else _feistel
    out, outside = index.copy(), np.arange(len(index))
    while len(outside):
        columns = (out, left_range, right_range, key)
        out[outside] = rounds(*(column[outside] for column in columns))
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64)


def _feistel(
    x: np.ndarray, left_range: np.ndarray, right_range: np.ndarray, key: np.ndarray
) -> np.ndarray:
    left, right = x % left_range, x // left_range
    for i in range(_ROUNDS):
        key = key + _GOLDEN
        if i % 2 == 0:
            left = (left + (mix64(mix64(right + key) ^ key) >> _U64(8))) % left_range
        else:
            right = (right + (mix64(mix64(left + key) ^ key) >> _U64(8))) % right_range
    return right * left_range + left


def _feistel_inverse(
    x: np.ndarray, left_range: np.ndarray, right_range: np.ndarray, key: np.ndarray
) -> np.ndarray:
    left, right = x % left_range, x // left_range
    key = key + _U64(_ROUNDS * int(_GOLDEN) % 2**64)
    for i in reversed(range(_ROUNDS)):
        if i % 2 == 0:
            added = (mix64(mix64(right + key) ^ key) >> _U64(8)) % left_range
            left = (left + left_range - added) % left_range
        else:
            added = (mix64(mix64(left + key) ^ key) >> _U64(8)) % right_range
            right = (right + right_range - added) % right_range
        key = key - _GOLDEN
    return right * left_range + left
