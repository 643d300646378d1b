"""Keyed order and keyed randomness: key in, a permutation or a random generator out; no state anywhere.

A permutation is a Feistel network walked until it lands inside the range, so any position is
computed without a shuffled array and every rank gets the same answer. Random numbers of a clip come
from a generator keyed by that clip's visit, never from a shared stream, so that they depend on
neither world size, packing nor what ran before. The price: torch's CPU generator keeps 32 bits of
its seed, so one pair of visits in 2**32 shares its noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

ROUNDS = 6
"""Feistel rounds: four mix large ranges, six make all orders of a few clips about as likely as each other."""

_HASH = 0x9E3779B97F4A7C15
"""Any number will do, so long as it stays: all orders and the split of what is held out hang on it."""
_WORD = 2**64 - 1

GROUP_SHARDS = 16
"""Shards whose samples are mixed with each other: files open at once against shuffle quality."""


def key_of(*parts: str | int) -> int:
    """64-bit key of `parts`; the separator keeps ("a", "bc") and ("ab", "c") apart."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator that is a pure function of `parts`; draw on the CPU, then move."""
    return torch.Generator().manual_seed(key_of(*parts))


def hash_strings(strings: pa.Array) -> np.ndarray:
    """uint64 [n]: a hash of each text's bytes and of nothing else; no NUL in them, no null among them."""
    if not len(strings):
        return np.empty(0, np.uint64)
    longest = pc.max(pc.binary_length(strings)).as_py()
    words = -(-max(1, longest) // 8)
    # Padded to one length, the texts are a table of 8-byte words; words of padding alone change nothing.
    padded = pc.ascii_rpad(strings, width=8 * words, padding="\0")
    table = np.frombuffer(padded.buffers()[2], "<u8", len(strings) * words).reshape(-1, words)
    hashes = np.zeros(len(strings), np.uint64)
    for word in table.T:
        hashes = np.where(word != 0, _mix(hashes ^ word, _HASH), hashes)
    return hashes


def keyed_shares(hashes: np.ndarray, *, turns: np.ndarray | int = 0, key: int) -> np.ndarray:
    """float64 [n], uniform in [0, 1): what falls to things of these `hashes` in their `turns` (0, 1, ...)."""
    drawn = _mix(_mix(hashes, key) ^ np.asarray(turns).astype(np.uint64), key)
    return (drawn >> np.uint64(11)) * 2.0**-53


def permutation(size: int, *, key: int) -> np.ndarray:
    """int64 [size]: every number below `size` once, in an order fixed by `key`."""
    if size < 2:
        return np.arange(size)
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    # A round looks at half of the bits only: what it makes of each is a short table, so that neither an epoch
    # of a dozen clips nor one of a million takes long.
    keys = np.array([[(key + turn * _HASH) & _WORD] for turn in range(ROUNDS)], np.uint64)
    tables = (_mix(np.arange(1 << half, dtype=np.uint64), keys) & np.uint64(mask)).astype(np.int64)
    values = np.arange(size)
    outside = values
    # A Feistel network permutes [0, 4**half); following it until it re-enters [0, size) permutes that.
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for table in tables:
            left, right = right, left ^ table[right]
        values[outside] = (left << half) | right
        outside = np.flatnonzero(values >= size)
    return values


def keyed_order(shard_sizes: Sequence[int], *, key: int, group_shards: int = GROUP_SHARDS) -> np.ndarray:
    """int64 [sum(shard_sizes)]: rows (numbered shard by shard) in training order.

    Shards are permuted, then samples inside each group of `group_shards`, so that a reader touches
    few files at a time.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = permutation(len(shard_sizes), key=key)
    groups = []
    for first in range(0, len(shards), group_shards):
        rows = np.concatenate(
            [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + group_shards]]
        )
        groups.append(rows[permutation(len(rows), key=key_of(key, first))])
    return np.concatenate(groups) if groups else np.empty(0, np.int64)


def _mix(values: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, with the round key added; wraps modulo 2**64 as it should."""
    mixed = values + (np.uint64(key & _WORD) if isinstance(key, int) else key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
