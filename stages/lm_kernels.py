"""Triton kernels of a step: products of one row, attention over the live cache, choosing a token.

Sums are float32, whatever the numbers are held in. ``controls`` is the table of
:mod:`stages.lm_static`: its columns are id, slot, position, top-k, then, as float32 bits in
``fractions``, 1 / temperature, top-p and the draw, then greedy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matvec(
    x, gain, weight, scale, out, n_out, n_in, stride_out, stride_in, eps, NORM: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = weight @ norm(x), or what the flags make of it; GATED: gates first, then as many
    values."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_out
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    values = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, n_in, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)
        real = columns < n_in
        v = tl.load(x + columns, mask=real, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(gain + columns, mask=real, other=0.0)
        tile = weight + rows[:, None] * stride_out + columns[None, :] * stride_in
        both = inside[:, None] & real[None, :]
        sums += tl.load(tile, mask=both, other=0.0).to(tl.float32) * v[None, :]
        if GATED:
            tile += n_out * stride_out
            values += tl.load(tile, mask=both, other=0.0).to(tl.float32) * v[None, :]
    y = tl.sum(sums, 1)
    u = tl.sum(values, 1)
    if NORM:
        root = 1.0 / tl.sqrt(tl.sum(squares, 0) / n_in + eps)
        y *= root
        u *= root
    if SCALED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
        if GATED:
            u *= tl.load(scale + n_out + rows, mask=inside, other=0.0)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * u
    if ADD:
        y += tl.load(out + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_write(
    qkv, keys, values, controls, cos, sin, slots, capacity, slot_stride, HEADS: tl.constexpr,
    KV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rotate queries in place; keys and values of every row go to the cache."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.minimum(tl.load(controls + row * WIDTH + 1), slots - 1).to(tl.int64)
    position = tl.load(controls + row * WIDTH + 2)
    place = tl.where(position < 0, capacity, position)
    angle = tl.maximum(position, 0) * 2 * HALF
    d = tl.arange(0, BLOCK)
    real = d < HALF
    source = qkv + (row * (HEADS + 2 * KV) + head) * 2 * HALF + d
    first = tl.load(source, mask=real, other=0.0)
    second = tl.load(source + HALF, mask=real, other=0.0)
    if head < HEADS + KV:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        c = tl.load(cos + angle + d, mask=real, other=0.0)
        s = tl.load(sin + angle + HALF + d, mask=real, other=0.0)
        first = (a * c - b * s).to(first.dtype)
        second = (b * c + a * s).to(second.dtype)
    place = slot * slot_stride + place * 2 * HALF + d
    if head < HEADS:
        tl.store(source, first, mask=real)
        tl.store(source + HALF, second, mask=real)
    elif head < HEADS + KV:
        key = keys + place + (head - HEADS) * (capacity + 1) * 2 * HALF
        tl.store(key, first, mask=real)
        tl.store(key + HALF, second, mask=real)
    else:
        value = values + place + (head - HEADS - KV) * (capacity + 1) * 2 * HALF
        tl.store(value, first, mask=real)
        tl.store(value + HALF, second, mask=real)


@triton.jit
def attend_split(
    qkv, keys, values, controls, sums, tops, slots, capacity, slot_stride, factor,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Attention of one head of one row over one part of its live cache, not yet normalised."""
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    slot = tl.minimum(tl.load(controls + row * WIDTH + 1), slots - 1).to(tl.int64)
    length = tl.maximum(tl.load(controls + row * WIDTH + 2), 0) + 1
    part = tl.cdiv(tl.cdiv(length, KEYS), SPLITS) * KEYS
    begin = split * part
    end = tl.minimum(begin + part, length)
    d = tl.arange(0, BLOCK)
    real = d < SIZE
    query = tl.load(qkv + (row * (HEADS + 2 * KV) + head) * SIZE + d, mask=real, other=0.0)
    q = query.to(tl.float32) * factor
    base = slot * slot_stride + (head // (HEADS // KV)) * (capacity + 1) * SIZE
    top = -float("inf")
    total = 0.0
    sum_ = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, KEYS):
        n = at + tl.arange(0, KEYS)
        live = n < end
        both = live[:, None] & real[None, :]
        place = base + n[:, None] * SIZE + d[None, :]
        k = tl.load(keys + place, mask=both, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=both, other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(k * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        fade = tl.exp(top - higher)
        p = tl.exp(scores - higher)
        total = total * fade + tl.sum(p, 0)
        sum_ = sum_ * fade + tl.sum(p[:, None] * v, 0)
        top = higher
    at = tl.program_id(0) * SPLITS + split
    tl.store(sums + at * SIZE + d, sum_, mask=real)
    tl.store(tops + at * 2, top)
    tl.store(tops + at * 2 + 1, total)


@triton.jit
def attend_join(
    sums, tops, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of :func:`attend_split` put together."""
    head = tl.program_id(0)
    at = head * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK)
    real = d < SIZE
    top = tl.load(tops + at * 2)
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(tops + at * 2 + 1), 0)
    parts = tl.load(sums + at[:, None] * SIZE + d[None, :], mask=real[None, :], other=0.0)
    y = tl.sum(parts * share[:, None], 0) / total
    tl.store(out + head * SIZE + d, y.to(out.dtype.element_ty), mask=real)


@triton.jit
def choose(
    logits, banned, controls, fractions, chosen, picked, vocabulary, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """:func:`stages.lm_sampling.choose_rows`, one row to a program.

    Bits of floats that are not negative have the floats' order, so a cut is the smallest number of
    which something is true: 31 halvings find it.
    """
    row = tl.program_id(0)
    slot = tl.load(controls + row * WIDTH + 1)
    top_k = tl.load(controls + row * WIDTH + 3)
    cold = tl.load(fractions + row * WIDTH + 4)
    top_p = tl.load(fractions + row * WIDTH + 5)
    draw = tl.load(fractions + row * WIDTH + 6)
    greedy = tl.load(controls + row * WIDTH + 7)
    i = tl.arange(0, BLOCK)
    real = i < vocabulary
    at = slot.to(tl.int64) * vocabulary + i
    x = tl.load(logits + at, mask=real, other=-float("inf"))
    x = tl.where(tl.load(banned + at, mask=real, other=1) != 0, -float("inf"), x)
    highest = tl.max(x, 0)
    best = tl.min(tl.where(x == highest, i, BLOCK), 0)
    p = tl.exp((x - highest) * cold)

    bits = p.to(tl.int32, bitcast=True)
    low = -1
    high = tl.max(bits, 0)
    cut = tl.where(top_k > 0, high, -1)
    for _ in range(tl.where(top_k > 0, 31, 0)):
        middle = low + (cut - low) // 2
        few = tl.sum((bits > middle).to(tl.int32), 0) < top_k
        cut = tl.where(few, middle, cut)
        low = tl.where(few, low, middle)
    p = tl.where(bits >= cut, p, 0.0)

    bits = p.to(tl.int32, bitcast=True)
    removed = (1.0 - top_p) * tl.sum(p, 0)
    low = -1
    cut = tl.where(top_p < 1.0, high, -1)
    for _ in range(tl.where(top_p < 1.0, 31, 0)):
        middle = low + (cut - low) // 2
        enough = tl.sum(tl.where(bits <= middle, p, 0.0), 0) > removed
        cut = tl.where(enough, middle, cut)
        low = tl.where(enough, low, middle)
    p = tl.where(bits >= cut, p, 0.0)

    mass = tl.cumsum(p, 0)
    drawn = tl.sum((mass <= draw * tl.max(mass, 0)).to(tl.int32), 0)
    drawn = tl.minimum(drawn, tl.max(tl.where(p > 0, i, 0), 0))
    token = tl.where(greedy > 0, best, drawn).to(tl.int64)
    tl.store(chosen + slot, token)
    tl.store(picked + row, token)
