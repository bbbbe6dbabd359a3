"""The Mamba-2 scan on a GPU, backward: what belongs to a tile of tokens, read by later ones or reading earlier ones.

The equations and their symbols stand in `scan_backward`. Two kernels, because the accumulators of both sides together do
not fit into the registers of one.

A program takes a tile for a group of heads, over which it sums gB or gC. Rows of its matrices are the tile's tokens t,
columns some tokens of the chunk at a time, those of the tile itself included. Masks go in before exp, which would overflow
above the diagonal.
"""

import triton
import triton.language as tl

from . import tuning
from .scan_states import KEY, UNSPECIALISED


def _configs(*launches: tuple[int, int, int | None]) -> list[triton.Config]:
    """Launches by columns, stages of loops and limit of registers; four warps make one tensor core product of 64 rows."""
    return [triton.Config({"COLUMNS": c}, num_warps=4, num_stages=s, maxnreg=registers) for c, s, registers in launches]


@tuning.autotune(_configs((32, 2, None), (32, 1, None), (64, 1, None), (16, 2, None), (16, 1, 168)), key=[*KEY, "GROUP"])
@triton.jit(do_not_specialize=UNSPECIALISED)
def read_kernel(
    gy,
    x,
    B,
    C,
    D,
    dt,
    a,
    behind,
    gx,
    gBC,
    parts,
    gD,
    gy_b,
    gy_l,
    gy_h,
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    C_b,
    C_l,
    gx_b,
    gx_l,
    gx_h,
    length,
    heads,
    between,
    bucket,  # noqa: ARG001 it stands in the key of tuning alone
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_STATES: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile as it is read: gx, gB, what its steps do to other tokens and states, and sums that nobody else makes.

    Into ``gBC [groups, batch, L, 2 N]`` gB; into ``parts [4, batch, H, L]`` at 0 the sum of V over later readers, at 1 the
    rest of gdt but for l, at 2 u; into ``gD [batch, tiles, H]``.
    """
    group = tl.program_id(0)
    number = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    tile = number * TILE
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    t = tile + tl.arange(0, TILE)
    there = t < length
    row = t.to(tl.int64)[:, None]
    chunk = tile // CHUNK
    stop = tl.minimum(chunk * CHUNK + CHUNK, length)
    B_t = tl.load(B + batch * B_b + row * B_l + n[None, :], mask=there[:, None], other=0.0).to(OPERAND)
    size = tl.num_programs(2).to(tl.int64) * heads * length
    WIDTH: tl.constexpr = COLUMNS if COLUMNS < TILE else TILE
    gB = tl.full([TILE, N], 0.0, tl.float32)
    for h in range(group * GROUP, tl.minimum(group * GROUP + GROUP, heads)):
        steps = (batch * heads + h) * length
        gy_ptr = gy + batch * gy_b + h * gy_h + p[None, :]
        x_t = tl.load(x + batch * x_b + h * x_h + row * x_l + p[None, :], mask=there[:, None], other=0.0).to(OPERAND)
        gy_t = tl.load(gy_ptr + row * gy_l, mask=there[:, None], other=0.0).to(OPERAND)
        a_t = tl.load(a + steps + t, mask=there, other=0.0)
        dt_t = tl.load(dt + steps + t, mask=there, other=0.0)
        gx_t = tl.full([TILE, P], 0.0, tl.float32)
        read = tl.full([TILE], 0.0, tl.float32)
        steady = tl.full([TILE], 0.0, tl.float32)
        if HAS_STATES:
            at = (batch * between + chunk) * heads * (N * P) + h * (N * P) + n[:, None] * P + p[None, :]
            R = tl.load(behind + at, mask=(n < (between - chunk) * N)[:, None], other=0.0).to(OPERAND)
            last = tl.load(a + steps + chunk * CHUNK + CHUNK - 1, mask=chunk < between, other=0.0)
            to_end = tl.exp(tl.where(t < between * CHUNK, last - a_t, float("-inf")))
            gB += tl.dot(x_t, tl.trans(R), input_precision=PRECISION) * (to_end * dt_t)[:, None]
            gx_t += tl.dot(B_t, R, input_precision=PRECISION) * to_end[:, None]
            steady += tl.sum(gx_t * x_t.to(tl.float32), axis=1)
            tl.store(parts + 2 * size + steps + t, steady * dt_t, mask=there)
        for first in range(tile, stop, WIDTH):
            i = first + tl.arange(0, WIDTH)
            inside = i < length
            row_i = i.to(tl.int64)[:, None]
            C_i = tl.load(C + batch * C_b + row_i * C_l + n[None, :], mask=inside[:, None], other=0.0).to(OPERAND)
            gy_i = tl.load(gy_ptr + row_i * gy_l, mask=inside[:, None], other=0.0).to(OPERAND)
            a_i = tl.load(a + steps + i, mask=inside, other=0.0)
            reads = (i[None, :] >= t[:, None]) & inside[None, :]
            decay = tl.exp(tl.where(reads, a_i[None, :] - a_t[:, None], float("-inf")))
            gram = tl.dot(B_t, tl.trans(C_i), input_precision=PRECISION)
            gx_t += tl.dot((gram * decay).to(OPERAND), gy_i, input_precision=PRECISION)
            gweights = tl.dot(x_t, tl.trans(gy_i), input_precision=PRECISION) * decay
            gB += tl.dot((gweights * dt_t[:, None]).to(OPERAND), C_i, input_precision=PRECISION)
            moved = gweights * gram
            # e^0 on the diagonal moves with no decay: left in, it would cancel but for rounding.
            later = i[None, :] > t[:, None]
            read += tl.sum(tl.where(later, moved, 0.0), axis=1)
            steady += tl.sum(tl.where(later, 0.0, moved), axis=1)

        # dt stands in all rows of W: multiplied in once.
        gx_t = gx_t * dt_t[:, None] + gy_t.to(tl.float32) * tl.load(D + h).to(tl.float32)
        tl.store(gx + batch * gx_b + row * gx_l + h * gx_h + p[None, :], gx_t, mask=there[:, None])
        tl.store(parts + steps + t, read, mask=there)
        tl.store(parts + size + steps + t, steady, mask=there)
        skip = tl.sum(tl.sum(gy_t.to(tl.float32) * x_t.to(tl.float32), axis=1), axis=0)
        tl.store(gD + (batch * tl.num_programs(1) + number) * heads + h, skip)
    at = ((group * tl.num_programs(2) + batch) * length + row) * (2 * N) + n[None, :]
    tl.store(gBC + at, gB, mask=there[:, None])


@tuning.autotune(
    _configs((32, 2, None), (32, 1, None), (64, 1, None), (32, 2, 168), (32, 1, 168), (16, 1, 128)), key=[*KEY, "GROUP"]
)
@triton.jit(do_not_specialize=UNSPECIALISED)
def reader_kernel(
    gy,
    x,
    B,
    C,
    dt,
    a,
    states,
    behind,
    gBC,
    parts,
    across,
    gy_b,
    gy_l,
    gy_h,
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    C_b,
    C_l,
    length,
    heads,
    between,
    bucket,  # noqa: ARG001
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_STATES: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile as it reads: into ``gBC [groups, batch, L, 2 N]`` gC, into ``parts`` at 3 what its own decays a_t move, and
    into ``across [batch, chunks, H]`` e^a_last (S . R), which is the chunk's.
    """
    group = tl.program_id(0)
    tile = tl.program_id(1) * TILE
    batch = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    t = tile + tl.arange(0, TILE)
    there = t < length
    row = t.to(tl.int64)[:, None]
    chunk = tile // CHUNK
    C_t = tl.load(C + batch * C_b + row * C_l + n[None, :], mask=there[:, None], other=0.0).to(OPERAND)
    stop = tl.minimum(tile + TILE, length)
    size = tl.num_programs(2).to(tl.int64) * heads * length
    WIDTH: tl.constexpr = COLUMNS if COLUMNS < TILE else TILE
    gC = tl.full([TILE, N], 0.0, tl.float32)
    for h in range(group * GROUP, tl.minimum(group * GROUP + GROUP, heads)):
        steps = (batch * heads + h) * length
        x_ptr = x + batch * x_b + h * x_h + p[None, :]
        gy_t = tl.load(gy + batch * gy_b + h * gy_h + row * gy_l + p[None, :], mask=there[:, None], other=0.0).to(OPERAND)
        a_t = tl.load(a + steps + t, mask=there, other=0.0)
        moves = tl.full([TILE], 0.0, tl.float32)
        for first in range(chunk * CHUNK, stop, WIDTH):
            j = first + tl.arange(0, WIDTH)
            inside = j < length
            row_j = j.to(tl.int64)[:, None]
            B_j = tl.load(B + batch * B_b + row_j * B_l + n[None, :], mask=inside[:, None], other=0.0).to(OPERAND)
            x_j = tl.load(x_ptr + row_j * x_l, mask=inside[:, None], other=0.0).to(OPERAND)
            a_j = tl.load(a + steps + j, mask=inside, other=0.0)
            dt_j = tl.load(dt + steps + j, mask=inside, other=0.0)
            reads = (j[None, :] <= t[:, None]) & there[:, None]
            decay = tl.exp(tl.where(reads, a_t[:, None] - a_j[None, :], float("-inf"))) * dt_j[None, :]
            ggram = tl.dot(gy_t, tl.trans(x_j), input_precision=PRECISION) * decay
            gC += tl.dot(ggram.to(OPERAND), B_j, input_precision=PRECISION)
            moved = ggram * tl.dot(C_t, tl.trans(B_j), input_precision=PRECISION)
            moves += tl.sum(tl.where(j[None, :] < t[:, None], moved, 0.0), axis=1)
        if HAS_STATES:
            at = ((batch * between + chunk - 1) * heads + h) * (N * P) + n[:, None] * P + p[None, :]
            S = tl.load(states + at, mask=(n < chunk * N)[:, None], other=0.0)
            if tile == chunk * CHUNK:
                R = tl.load(behind + at + heads * (N * P), mask=(n < (between - chunk) * N)[:, None], other=0.0)
                last = tl.load(a + steps + tile + CHUNK - 1, mask=chunk < between, other=0.0)
                whole = tl.sum(tl.sum(S * R, axis=1), axis=0) * tl.exp(last)
                tl.store(across + (batch * (between + 1) + chunk) * heads + h, whole)
            gyS = tl.dot(gy_t, tl.trans(S.to(OPERAND)), input_precision=PRECISION) * tl.exp(a_t)[:, None]
            gC += gyS
            moves += tl.sum(gyS * C_t.to(tl.float32), axis=1)
        tl.store(parts + 3 * size + steps + t, moves, mask=there)
    at = ((group * tl.num_programs(2) + batch) * length + row) * (2 * N) + n[None, :]
    tl.store(gBC + at + N, gC, mask=there[:, None])
