"""A numpy reference for the random bits of the kernels, written from the paper, not from Triton.

Philox-4x32 turns a counter of four words and a key of two into four random words:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))
    (k0, k1)         <- (k0 + W0, k1 + W1)

once per round. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the known
answers in test_state_update.py are those of their Random123 library.
"""

from __future__ import annotations

import numpy as np

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = 0x9E3779B9, 0xBB67AE85
WORD = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key: tuple[int, int], rounds: int) -> list[np.ndarray]:
    """Four words of random bits for each counter; values of 32 bits, stored as uint64."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        low, high = M1 * c2, M0 * c0
        c0 = (low >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (high >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = low & WORD, high & WORD
        k0, k1 = (k0 + W0) % 2**32, (k1 + W1) % 2**32
    return [c0, c1, c2, c3]


def random_halves(seed: int, rows: int, n: int, rounds: int) -> np.ndarray:
    """The 16 bits that belong to each number of a state of `rows` x n."""
    groups = -(-n // 8)
    counter = np.arange(rows * groups, dtype=np.uint64)
    words = philox(
        [counter & WORD, counter >> np.uint64(32), 0 * counter, 0 * counter],
        (seed % 2**32, seed >> 32),
        rounds,
    )
    halves = [h for w in words for h in (w & np.uint64(0xFFFF), w >> np.uint64(16))]
    return np.stack(halves, -1).reshape(rows, 8 * groups)[:, :n]


def round_to_half(exact: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Stochastic rounding of float32 to float16, with 16 random bits per number.

    A number is rounded up if its distance to the float16 below it, in steps, plus `random` / 2^16
    reaches 1. Here this is float64 arithmetic with a step size; the kernel adds bits. All
    operations here are exact, because the step is a power of two.
    """
    wide = np.abs(exact.astype(np.float64))
    exponent = np.floor(np.log2(np.maximum(wide, 2.0**-14)))
    step = 2.0 ** (exponent - 10)
    normal = np.floor(wide / step + np.floor(random / 8) / 2**13)
    # Below 2^-14 the kernel adds in float32, which keeps 24 bits of the sum.
    sums = (wide * 2.0**24).astype(np.float32) + (random / 2.0**16).astype(np.float32)
    steps = np.where(wide < 2.0**-14, np.floor(sums.astype(np.float64)), normal)
    with np.errstate(over="ignore"):
        return np.copysign(steps * step, exact).astype(np.float16)
