"""Sort (token, slot) pairs by expert, and divide the result into tiles of one expert each.

    counts[e] = number of pairs of expert e
    starts[e] = counts[0] + ... + counts[e-1]
    places[i] = starts[e_i] + number of pairs j < i with e_j = e_i

This is a counting sort. It is stable and uses no atomics, so the order of rows, and with it every
sum over them, is the same in each run. It runs on the device only: the host never reads a count, so
nothing waits, and the launches can be captured in a CUDA graph. It has four kernels:

1. each program counts its block of pairs per expert;
2. along the blocks of each expert, counts become offsets (and their total is `counts`);
3. `starts`, and the tile map: which expert a tile of rows belongs to, and where it begins;
4. each program computes the places of its pairs; the rank of a pair within the block is the number
   of earlier pairs with the same expert.

A matrix product per expert then runs one program per tile. How many tiles there are depends on the
counts, so the largest possible number of programs is started (`tile_bound`), and those without a
tile find expert -1 and stop.

Source: counting sort; the tile map is the usual one of grouped matrix products. Left out: dropping
tokens over a capacity. Pairs are numbered in 32 bits: at most 2^31 - 1 of them (97 million tokens
of Super).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    next_power_of_2,
    on_device,
)

MAX_PAIRS = 2**31 - 1


class Order(NamedTuple):
    """Pairs sorted by expert, and tiles of at most `tile_rows` rows of one expert."""

    pairs: Int[Tensor, "n"]  # place -> pair; the pair of token t and slot j is t * k + j
    places: Int[Tensor, "n"]  # pair -> place
    counts: Int[Tensor, "e"]  # pairs per expert
    starts: Int[Tensor, "e+1"]  # first place of each expert, and the number of pairs
    tile_experts: Int[Tensor, "tiles"]  # -1: no tile
    tile_starts: Int[Tensor, "tiles"]  # first place of the tile
    tile_rows: int


@triton.jit
def _count_kernel(
    indices_ptr,
    table_ptr,
    pairs,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(indices_ptr + i, mask=i < pairs, other=0).to(tl.int32)
    tl.device_assert((e >= 0) & (e < E), "expert index out of range")
    counts = tl.histogram(e, EXPERTS, mask=i < pairs)
    experts = tl.arange(0, EXPERTS)
    tl.store(table_ptr + block.to(tl.int64) * E + experts, counts, mask=experts < E)


@triton.jit
def _offsets_kernel(
    table_ptr,
    counts_ptr,
    blocks,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Replace the counts per block, in place, by the number of pairs in earlier blocks."""
    experts = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < blocks)[:, None] & (experts < E)[None, :]
        at = table_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :]
        counts = tl.load(at, mask=inside, other=0)
        before = tl.cumsum(counts, axis=0) - counts
        tl.store(at, before + total[None, :], mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + experts, total, mask=experts < E)


@triton.jit
def _tiles_kernel(
    counts_ptr,
    starts_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tiles,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    starts = tl.cumsum(counts, axis=0) - counts
    per_expert = (counts + TILE_ROWS - 1) // TILE_ROWS
    last = tl.cumsum(per_expert, axis=0)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + experts, starts, mask=experts < E)
        tl.store(starts_ptr + E, tl.sum(counts, axis=0))
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The expert of a tile is the number of experts whose tiles all come before it. Experts without
    # tokens have no tile, and this count skips them too.
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    mine = experts[None, :] == expert[:, None]
    start = tl.sum(tl.where(mine, (starts - (last - per_expert) * TILE_ROWS)[None, :], 0), axis=1)
    tl.store(tile_experts_ptr + tile, tl.where(expert < E, expert, -1), mask=tile < tiles)
    tl.store(tile_starts_ptr + tile, start + tile * TILE_ROWS, mask=tile < tiles)


@triton.jit
def _place_kernel(
    indices_ptr,
    table_ptr,
    starts_ptr,
    pairs_ptr,
    places_ptr,
    pairs,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    mine = tl.arange(0, BLOCK)
    i = first + mine
    valid = i < pairs
    e = tl.load(indices_ptr + i, mask=valid, other=0).to(tl.int32)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(0, BLOCK, CHUNK):
        near = offset + tl.arange(0, CHUNK)
        other = tl.load(indices_ptr + first + near, mask=first + near < pairs, other=-1)
        earlier = (other.to(tl.int32)[None, :] == e[:, None]) & (near[None, :] < mine[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    place = tl.load(starts_ptr + e, mask=valid, other=0) + rank
    place += tl.load(table_ptr + block.to(tl.int64) * E + e, mask=valid, other=0)
    tl.store(places_ptr + i, place, mask=valid)
    tl.store(pairs_ptr + place, i.to(tl.int32), mask=valid)


COUNT = {80: Config({}, num_warps=4, num_stages=1)}  # BLOCK is that of PLACE
PLACE = {
    0: Config({"BLOCK": 512, "CHUNK": 512}),
    80: Config({"BLOCK": 256, "CHUNK": 16}, num_warps=4, num_stages=1),
}
OFFSETS = {
    0: Config({"ROWS": 4, "COLUMNS": 64}),
    80: Config({"ROWS": 64, "COLUMNS": 16}, num_warps=4, num_stages=1),
}
TILES = {
    0: Config({"BLOCK": 256}),
    80: Config({"BLOCK": 16}, num_warps=4, num_stages=1),
}


def tile_bound(pairs: int, experts: int, tile_rows: int) -> int:
    """The largest possible number of tiles: the last tile of each expert may not be full."""
    return pairs // tile_rows + min(experts, pairs)


def sort_by_expert(indices: Int[Tensor, "t k"], experts: int, tile_rows: int = 64) -> Order:
    """Sort the (token, slot) pairs of `indices` by expert; stable, and on the device only.

    Args:
        indices: int32 or int64, each from 0 to `experts` - 1. A check on the host would have to
            wait for the device, so values are checked on the device, only under TRITON_DEBUG=1.
        experts: number of experts, e.
        tile_rows: rows of a tile, a power of two.

    Returns:
        Order, with int32 tensors.

    Raises:
        ValueError: indices that are not integers, or too many of them.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    check_inputs("sort_by_expert", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sort_by_expert: indices are {indices.dtype}, expected int32 or int64.")
    pairs = indices.numel()
    if pairs > MAX_PAIRS:
        raise ValueError(
            f"sort_by_expert: {pairs} pairs, but at most {MAX_PAIRS} are supported; pass fewer "
            "tokens at a time."
        )
    indices = indices.contiguous()

    def ints(n: int) -> Tensor:
        return torch.empty(n, device=indices.device, dtype=torch.int32)

    tiles = tile_bound(pairs, experts, tile_rows)
    order = Order(
        ints(pairs),
        ints(pairs),
        ints(experts),
        ints(experts + 1),
        ints(tiles),
        ints(tiles),
        tile_rows,
    )
    place, offsets, cut = by_arch(PLACE), by_arch(OFFSETS), by_arch(TILES)
    width = next_power_of_2(experts)
    blocks = cdiv(pairs, place["BLOCK"])
    table = ints(max(blocks, 1) * experts)
    with on_device(indices):
        if blocks:
            _count_kernel[(blocks,)](
                indices,
                table,
                pairs,
                E=experts,
                EXPERTS=width,
                BLOCK=place["BLOCK"],
                **by_arch(COUNT).kwargs,
            )
        _offsets_kernel[(cdiv(experts, offsets["COLUMNS"]),)](
            table, order.counts, blocks, E=experts, **offsets.kwargs
        )
        _tiles_kernel[(max(cdiv(tiles, cut["BLOCK"]), 1),)](
            order.counts,
            order.starts,
            order.tile_experts,
            order.tile_starts,
            tiles,
            E=experts,
            EXPERTS=width,
            TILE_ROWS=tile_rows,
            **cut.kwargs,
        )
        if blocks:
            _place_kernel[(blocks,)](
                indices,
                table,
                order.starts,
                order.pairs,
                order.places,
                pairs,
                E=experts,
                **place.kwargs,
            )
    return order
