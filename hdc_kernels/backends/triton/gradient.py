# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Gradients by the unit vectors, row-owned for x and column-owned for y: 4 products, no atomics.

For "info_nce", with P_ij = exp(S_ij − lse_i) off the diagonal and the row weight w_i = upstream_i · p_i,
where p_i is the share of the negatives in row i's softmax, the negatives' part of the gradient is

    x: Σ_j w_i P_ij ŷ_j          y: Σ_i w_i P_ij x̂_i          times 1/τ,

and the positive's is −w_i ŷ_i and −w_i x̂_i, which no product sees: `unpack` adds it in float32. Once
training has converged the two nearly cancel, and a rounding of either would be all that is left. The
symmetric loss adds the columns' v_j Q_ij with Q_ij = exp(S_ij − lse of column j).

The other functions have no positives, and w_i = upstream_i. P is the same for "logsumexp", over the columns
that its mask lets through; for "softplus" it is σ(S_ij + bias_i), whose row sums the bias needs.

Both directions are one kernel. A program owns OWN vectors, recomputes S against blocks of OTHER vectors
and multiplies the coefficients with the same block: no other program adds to its result, which is
deterministic. Coefficients meet the tensor cores within [0, 2]: the row-owned pass scales by w_i
afterwards, the others divide by the largest weight of the problem first. Where there are too few blocks
to occupy the device, the sum over the others is split and `unpack` adds the parts.

Floor at N = 65,536, D = 128 in bf16 on an H100: 4.4e12 flop take 4.45 ms. One kernel with atomics would
need 3 products but 17 GB of reductions, which cost more.

No GPU has run this yet; the tiles are chosen by registers and shared memory, not by time.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends.triton.addressing import (
    masked_block,
    masked_blocks,
    plain_block,
    plain_blocks,
)
from hdc_kernels.backends.triton.arithmetic import (
    LOG2_E,
    add_product,
    gain,
    inverse_temperature,
    narrow,
    sigmoid2,
)
from hdc_kernels.backends.triton.logsumexp import by_ids, similarity, within


@triton.jit
def gradient_kernel(
    own,  # [G, OWN_PADDED, D] unit vectors
    other,  # [G, OTHER_PADDED, D]
    own_weight,  # [G, OWN_PADDED], with OWN_TERM
    own_shift,
    other_weight,  # [G, OTHER_PADDED], with OTHER_TERM
    other_shift,
    largest,  # [G, weight_blocks]
    own_ids,  # [G, own_count] and
    other_ids,  # [G, other_count], or None
    gradient,  # [splits, G, OWN_PADDED, D] float32
    bias_gradient,  # [splits, G, OWN_PADDED], or None but for the rows of "softplus"
    temperature,
    own_count,
    other_count,
    own_blocks,
    splits,
    weight_blocks,
    G,
    OWN_PADDED,
    OTHER_PADDED,
    FUNCTION: tl.constexpr,
    DIAGONAL: tl.constexpr,  # whether it was summed
    SAME: tl.constexpr,  # whether it was equal ids that were summed
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
    LEARNED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,  # of the result, in dimensions; DEPTH if that is all of them
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    D: tl.constexpr = DEPTH * CHUNKS
    WIDTHS: tl.constexpr = D // WIDTH
    block = tl.program_id(0) % own_blocks
    part = tl.program_id(0) // own_blocks % WIDTHS
    split = tl.program_id(0) // (own_blocks * WIDTHS) % splits
    problem = (tl.program_id(0) // (own_blocks * WIDTHS * splits)).to(tl.int64)
    row0 = block * OWN
    row = row0 + tl.arange(0, OWN)
    k = inverse_temperature(temperature, LEARNED) * LOG2_E
    own_elements = tl.arange(0, OWN)[:, None] * D + tl.arange(0, DEPTH)[None, :]
    own_rows = own + (problem * OWN_PADDED + row0) * D + own_elements
    other_elements = tl.arange(0, OTHER)[:, None] * D + tl.arange(0, DEPTH)[None, :]
    other += problem * OTHER_PADDED * D
    wide_elements = tl.arange(0, OTHER)[:, None] * D + part * WIDTH + tl.arange(0, WIDTH)[None, :]
    mine = tl.load(own_rows)
    dtype: tl.constexpr = own.dtype.element_ty
    GAIN: tl.constexpr = gain(dtype)

    unit_weight = 1e-30  # the problem's largest weight, never 0
    for i in range(weight_blocks):
        unit_weight = tl.maximum(unit_weight, tl.load(largest + problem * weight_blocks + i))
    own_factor = tl.full((OWN,), GAIN, tl.float32)
    row_shift = tl.zeros((OWN,), tl.float32)
    if OWN_TERM:
        row_shift = tl.load(own_shift + problem * OWN_PADDED + row)
        if OTHER_TERM:
            own_factor = tl.load(own_weight + problem * OWN_PADDED + row) * (GAIN / unit_weight)
    other_weight += problem * OTHER_PADDED
    other_shift += problem * OTHER_PADDED

    if own_ids is not None:
        own_id = tl.load(own_ids + problem * own_count + row, row < own_count, 0)
        other_ids += problem * other_count

    total = tl.zeros((OWN, WIDTH), tl.float32)
    if bias_gradient is not None:
        slope = tl.zeros((OWN,), tl.float32)
    other_blocks = tl.cdiv(other_count, OTHER)
    begin, end = split * other_blocks // splits, (split + 1) * other_blocks // splits
    first, last, full = row0 // OTHER, tl.cdiv(row0 + OWN, OTHER), other_count // OTHER
    if DIAGONAL:
        first, last = 0, 0  # no block is one of the diagonal
    count, before, resume = plain_blocks(first, last, begin, end, full)
    for t in range(count):
        column0 = plain_block(t, begin, before, resume).to(tl.int64) * OTHER
        other_rows = other + column0 * D + other_elements
        cosine, theirs = similarity(mine, own_rows, other_rows, DEPTH, CHUNKS, PRECISION)
        column = column0 + tl.arange(0, OTHER)
        if own_ids is not None:
            cosine = by_ids(cosine, own_id, other_ids, column, other_count, SAME)
        share = _coefficients(
            cosine,
            k,
            row_shift,
            own_factor,
            other_shift + column,
            other_weight + column,
            GAIN / unit_weight,
            FUNCTION,
            OWN_TERM,
            OTHER_TERM,
        )
        if bias_gradient is not None:
            slope += tl.sum(share, 1)
        if CHUNKS > 1:
            theirs = tl.load(other + column0 * D + wide_elements)
        total = add_product(total, narrow(share, dtype), theirs, PRECISION)
    count, on_diagonal, start = masked_blocks(first, last, begin, end, full, other_blocks)
    for t in range(count):
        column0 = masked_block(t, on_diagonal, start, full).to(tl.int64) * OTHER
        other_rows = other + column0 * D + other_elements
        cosine, theirs = similarity(mine, own_rows, other_rows, DEPTH, CHUNKS, PRECISION)
        column = column0 + tl.arange(0, OTHER)
        cosine = within(cosine, row, column, other_count, DIAGONAL)
        if own_ids is not None:
            cosine = by_ids(cosine, own_id, other_ids, column, other_count, SAME)
        share = _coefficients(
            cosine,
            k,
            row_shift,
            own_factor,
            other_shift + column,
            other_weight + column,
            GAIN / unit_weight,
            FUNCTION,
            OWN_TERM,
            OTHER_TERM,
        )
        if bias_gradient is not None:
            slope += tl.sum(share, 1)
        if CHUNKS > 1:
            theirs = tl.load(other + column0 * D + wide_elements)
        total = add_product(total, narrow(share, dtype), theirs, PRECISION)

    if OTHER_TERM:
        total *= unit_weight / GAIN
    else:
        factor = tl.load(own_weight + problem * OWN_PADDED + row) / GAIN
        total *= factor[:, None]
        if bias_gradient is not None:
            parts = bias_gradient + (split * G + problem) * OWN_PADDED + row
            tl.store(parts, slope * factor, part == 0)  # every part of the width has the same
    start_row = ((split * G + problem) * OWN_PADDED + row0) * D + part * WIDTH
    elements = tl.arange(0, OWN)[:, None] * D + tl.arange(0, WIDTH)[None, :]
    tl.store(gradient + start_row + elements, total)


@triton.jit
def _coefficients(
    cosine,  # [OWN, OTHER]
    k,
    row_shift,  # [OWN]
    own_factor,
    other_shift,  # pointers to [OTHER]
    other_weight,
    factor,
    FUNCTION: tl.constexpr,
    OWN_TERM: tl.constexpr,
    OTHER_TERM: tl.constexpr,
):
    """What the other vectors are summed with, [OWN, OTHER]."""
    if OWN_TERM:
        share = _slope(cosine * k - row_shift[:, None], FUNCTION) * own_factor[:, None]
    if OTHER_TERM:
        weight = tl.load(other_weight) * factor
        theirs = _slope(cosine * k - tl.load(other_shift)[None, :], FUNCTION) * weight[None, :]
        if OWN_TERM:
            share += theirs
        else:
            share = theirs
    return share


@triton.jit
def _slope(exponent, FUNCTION: tl.constexpr):
    """Gradient of a row's term by its logits, which are `exponent` in base 2."""
    if FUNCTION == "softplus":
        return sigmoid2(exponent)
    else:  # noqa: RET505
        return tl.exp2(exponent)
