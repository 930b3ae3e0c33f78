"""Random bits from a counter: Philox-4x32, bit for bit those of the Triton kernels.

A counter-based generator keeps no state. It turns (key, counter) into four words of 32 bits by a
few rounds of multiply and xor:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))
    (k0, k1)         <- (k0 + W0, k1 + W1)

So the bits of a number depend only on its position and the seed, and not on how many processes,
blocks or threads share the work. This is why a kernel on a GPU and PyTorch on a CPU can round the
same number the same way.

`random_halves` lays the bits out as `nemotron_kernels.state_update` does. The numbers of a row are
taken in groups of eight, with one counter for each group. Each word serves two numbers: its low 16
bits the even one, its high 16 bits the odd one.

    counter = row * ceil(n / 8) + column // 8        word = column % 8 // 2

Five rounds are the model report's choice (reference sheet 6.7); ten are the textbook's. Source:
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Left out: the 64-bit variants.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Int64
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
ROUNDS = 5

Word = Tensor | int  # 32 bits in an int64 tensor, or the same for every counter


def words(
    seed: int, counter: Int64[Tensor, "*shape"], rounds: int = ROUNDS
) -> tuple[Word, Word, Word, Word]:
    """Four words of 32 random bits for each counter, as int64 in 0 .. 2^32 - 1.

    A word can be a Python number where it is the same for every counter (with few rounds).

    Raises:
        ValueError: a seed outside 0 .. 2^63 - 1 or rounds outside 1 .. 10.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; expected 0 to 2^63 - 1.")
    if not 1 <= rounds <= 10:
        raise ValueError(f"rounds={rounds}; expected 1 to 10.")
    wide = counter.numel() > 0 and int(counter.max()) > WORD
    k0, k1 = seed & WORD, seed >> 32
    # What is zero for every counter stays a Python number, which spares half of the first rounds.
    c0: Word = counter & WORD if wide else counter
    c1: Word = counter >> 32 if wide else 0
    c2: Word = 0
    c3: Word = 0
    for _ in range(rounds):
        # The product wraps as signed 64 bits; the mask makes its upper half unsigned again.
        low, high = c2 * M1, c0 * M0
        c0, c1 = ((low >> 32) ^ (c1 ^ k0)) & WORD, low & WORD
        c2, c3 = ((high >> 32) ^ (c3 ^ k1)) & WORD, high & WORD
        k0, k1 = (k0 + W0) & WORD, (k1 + W1) & WORD
    return c0, c1, c2, c3


def random_halves(
    seed: int, rows: int, n: int, *, rounds: int = ROUNDS, device: torch.device | str = "cpu"
) -> Int[Tensor, "rows n"]:
    """16 random bits for each number of a matrix, as int32 in 0 .. 65535.

    Raises:
        ValueError: as `words`.
    """
    groups = -(-n // 8)
    counter = torch.arange(rows * groups, dtype=torch.int64, device=device)
    halves = []
    for word in words(seed, counter, rounds):
        column = torch.as_tensor(word, device=device).expand(rows * groups)
        halves += [column & 0xFFFF, column >> 16]
    return torch.stack(halves, -1).to(torch.int32).view(rows, 8 * groups)[:, :n]
