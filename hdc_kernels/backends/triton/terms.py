# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Arithmetic on rows, between the passes over all pairs.

`terms_kernel`: the partial sums of `logsumexp` become logsumexps, loss terms and hits; where gradients of the
total are wanted, the weights that `gradient` needs as well.

`weights_kernel`: those weights from saved logsumexps and an upstream gradient per row.

Logsumexps are kept in float64: at a small temperature they are large, and rounding one to float32 would
change a whole row of probabilities. That is a few operations for each row.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends.triton.addressing import of_pair
from hdc_kernels.backends.triton.arithmetic import (
    LN_2,
    LOG2_E,
    finite_shift,
    inverse_temperature,
    sigmoid,
    softplus,
)


@triton.jit
def _merge(highest, total, parts, stride, mask, k, shift, RUNNING: tl.constexpr):
    """log2 Σ exp of a row from its parts, in float64, and the largest of their cosines; pointers to [R]."""
    top = tl.full(mask.shape, float("-inf"), tl.float32)
    sums = tl.zeros(mask.shape, tl.float32)
    for _ in range(parts):
        part_top = tl.load(highest, mask, float("-inf"))
        part_sum = tl.load(total, mask, 0.0)
        if RUNNING:
            higher = tl.maximum(top, part_top)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            sums = sums * tl.exp2((top - base) * k) + part_sum * tl.exp2((part_top - base) * k)
            top = higher
        else:
            sums += part_sum
            top = tl.maximum(top, part_top)
        highest += stride
        total += stride
    if RUNNING:
        shift = tl.where(top == float("-inf"), 0.0, top).to(tl.float64) * k
    return shift + tl.log2(sums.to(tl.float64)), top


@triton.jit
def _sum_of_parts(total, parts, stride, offset, mask):
    """Sums [R] of `parts` partial sums, sixteen at a time."""
    sums = tl.zeros(mask.shape, tl.float32)
    for first in range(0, parts, 16):
        part = first + tl.arange(0, 16)
        inside = (part < parts)[:, None] & mask[None, :]
        elements = part[:, None].to(tl.int64) * stride + offset[None, :]
        sums += tl.sum(tl.load(total + elements, inside, 0.0), 0)
    return sums


@triton.jit
def _term(lse, positive, FUNCTION: tl.constexpr):
    """What the logsumexp of a row or column becomes."""
    if FUNCTION == "info_nce":
        return softplus((lse - positive).to(tl.float32))
    else:  # noqa: RET505
        return lse.to(tl.float32)


@triton.jit
def terms_kernel(
    highest,  # [splits, G, PADDED]
    total,
    diagonal,  # [G, PADDED]
    column_highest,  # [column_parts, G, PADDED], with RUNNING
    column_total,
    positive,  # [G, M], or None without positives
    weights,  # K numbers
    firsts,  # K first problems
    temperature,
    shift,
    loss,  # [G, M]
    hits,
    lse,  # float64; without a meaning for "softplus"
    column_lse,
    weighted,  # [programs]: parts of Σ weight · loss
    bias,  # as the following for `_store_weights`, whose results they are; None without gradients
    pull,
    share,
    exponent_shift,
    largest,
    M,
    splits,
    column_parts,
    G,
    PADDED,
    COLUMN_PADDED,
    FUNCTION: tl.constexpr,
    LEARNED: tl.constexpr,
    RUNNING: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(M, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    mask = row < M
    k = inverse_temperature(temperature, LEARNED) * LOG2_E
    padded = problem * PADDED + row
    stride = tl.cast(G, tl.int64) * PADDED
    row_lse = 0.0
    if FUNCTION == "softplus":
        term = _sum_of_parts(total, splits, stride, padded, mask)
    else:
        row_lse, top = _merge(
            highest + padded, total + padded, splits, stride, mask, k, shift, RUNNING
        )
        row_lse *= LN_2
    flat = problem * M + row
    s = 0.0
    down = 0.0
    if FUNCTION == "info_nce":
        s = tl.load(positive + flat, mask, 0.0)
    if FUNCTION != "softplus":
        term = _term(row_lse, s, FUNCTION)
    if SYMMETRIC:
        offset = problem * COLUMN_PADDED + row
        stride = tl.cast(G, tl.int64) * COLUMN_PADDED
        if RUNNING:
            down, _ = _merge(
                column_highest + offset,
                column_total + offset,
                column_parts,
                stride,
                mask,
                k,
                shift,
                RUNNING,
            )
        else:
            down = _sum_of_parts(column_total, column_parts, stride, offset, mask)
            down = shift + tl.log2(down.to(tl.float64))
        down *= LN_2
        term = (term + _term(down, s, FUNCTION)) / 2
        tl.store(column_lse + flat, down, mask)
    tl.store(loss + flat, term, mask)
    tl.store(lse + flat, row_lse, mask)
    hit = tl.zeros((ROWS,), tl.int1)
    if FUNCTION == "info_nce":
        hit = (tl.load(diagonal + padded, mask, 0.0) > top) & (term == term)
    tl.store(hits + flat, hit, mask)
    weight = of_pair(weights, firsts, problem)
    tl.store(weighted + tl.program_id(0), weight * tl.sum(tl.where(mask, term, 0.0), 0))
    if share is not None:
        _store_weights(
            tl.where(mask, weight, 0.0),
            row_lse,
            down,
            s,
            bias,
            pull,
            share,
            exponent_shift,
            largest,
            row,
            problem,
            M,
            G,
            PADDED,
            FUNCTION,
            SYMMETRIC,
        )


@triton.jit
def weights_kernel(
    positive,  # [G, M], or None without positives
    lse,  # [G, M] float64; not read for "softplus"
    column_lse,
    upstream,  # [G, M]
    bias,  # these as for `_store_weights`
    pull,
    share,
    exponent_shift,
    largest,
    M,
    G,
    PADDED,
    FUNCTION: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(PADDED, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    mask = row < M
    flat = problem * M + row
    row_lse, down, s = 0.0, 0.0, 0.0
    if FUNCTION == "info_nce":
        s = tl.load(positive + flat, mask, 0.0)
    if FUNCTION != "softplus":
        row_lse = tl.load(lse + flat, mask, float("-inf"))
    if SYMMETRIC:
        down = tl.load(column_lse + flat, mask, float("-inf"))
    _store_weights(
        tl.load(upstream + flat, mask, 0.0),
        row_lse,
        down,
        s,
        bias,
        pull,
        share,
        exponent_shift,
        largest,
        row,
        problem,
        M,
        G,
        PADDED,
        FUNCTION,
        SYMMETRIC,
    )


@triton.jit
def _store_weights(
    u,  # [ROWS], of a program's rows: the gradient by their terms, 0 in padding
    row_lse,  # −∞ in padding; a number for "softplus"
    column_lse,  # with SYMMETRIC
    positive,
    bias,  # [G, M], or None but for "softplus"
    pull,  # [1 or 2, G, PADDED]: w, and v below; 0 in padding; None without positives
    share,  # [1 or 2, G, PADDED]: what the exponentials after the shift are multiplied with
    exponent_shift,  # [1 or 2, G, PADDED]: log2 of the sums, or −bias; +∞ in padding, whose exponentials are then 0
    largest,  # [programs]: the largest weight of every block
    row,
    problem,
    M,
    G,
    PADDED,
    FUNCTION: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    padded = problem * PADDED + row
    inside = row < PADDED
    if SYMMETRIC:
        u *= 0.5
    if FUNCTION == "softplus":
        top = tl.max(tl.abs(u), 0)
        tl.store(share + padded, u, inside)
        biases = tl.load(bias + problem * M + row, row < M, float("-inf"))
        tl.store(exponent_shift + padded, biases * -LOG2_E, inside)
    else:
        w = _by_lse(u, row_lse, positive, FUNCTION)
        top = tl.max(tl.abs(w), 0)
        if FUNCTION == "info_nce":
            tl.store(pull + padded, w, inside)
        _store_share(share + padded, exponent_shift + padded, w, row_lse, inside)
    if SYMMETRIC:
        v = _by_lse(u, column_lse, positive, FUNCTION)
        top = tl.maximum(top, tl.max(tl.abs(v), 0))
        padded += tl.cast(G, tl.int64) * PADDED
        if FUNCTION == "info_nce":
            tl.store(pull + padded, v, inside)
        _store_share(share + padded, exponent_shift + padded, v, column_lse, inside)
    tl.store(largest + tl.program_id(0), top)


@triton.jit
def _by_lse(u, lse, positive, FUNCTION: tl.constexpr):
    """Gradient by the logsumexp of a row or column, of its term times u."""
    if FUNCTION == "info_nce":
        return u * sigmoid((lse - positive).to(tl.float32))
    else:  # noqa: RET505 - Triton compiles whatever follows an if
        return tl.where(lse == float("-inf"), 0.0, u)


@triton.jit
def _store_share(share, shift, weight, lse, mask):
    """A shift in float32, and the weight that makes good what rounding it does to the exponentials."""
    exact = finite_shift(lse * LOG2_E)
    rounded = exact.to(tl.float32)
    error = tl.where(exact == float("inf"), 0.0, rounded - exact)  # in float64
    tl.store(share, weight * tl.exp2(error.to(tl.float32)), mask)
    tl.store(shift, rounded, mask)
