# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Row sums of exponentials without the matrix of logits: one product and one exponential a logit.

A program owns OWN rows, keeps their unit vectors on the chip, and walks over blocks of OTHER columns: S in
registers, its exponentials summed, S forgotten. Padding is not summed, nor the diagonal where it does not
count; only the blocks where they are pay for a mask. Ids, if there are any, are compared in every block.
Cosines are bounded, so for a temperature that is a number a shift fixed beforehand serves every row *and
column* (`shift` below), and the sums down the columns, which the symmetric loss needs, come out of the
same pass: one partial sum a program and column, and no atomics. Without such a shift (a temperature in
device memory, one below 0.0122, or embeddings that are not normalised) a running maximum is kept, and the
columns take a pass of their own. For "softplus" it is log(1 + exp(S + bias)) that is summed, which needs
no shift.

Floor at N = 65,536, D = 128 in bf16 on an H100: 1.1e12 flop take 1.11 ms, and so do the exponentials,
beside each other if they overlap. Memory: 2·N·D elements from L2 for every OWN rows; 4·N²/OWN bytes of
column sums when symmetric, 134 MB and 0.1 ms there. Beyond ONE_PASS blocks of rows, where these would
outgrow everything else, the columns take a pass of their own.

No GPU has run this yet; the tiles are chosen by registers and shared memory, not by time.
"""

import math

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends import Problems
from hdc_kernels.backends.triton.addressing import (
    masked_block,
    masked_blocks,
    plain_block,
    plain_blocks,
)
from hdc_kernels.backends.triton.arithmetic import (
    LOG2_E,
    add_exponentials,
    add_product,
    inverse_temperature,
    softplus2,
)

ONE_PASS = 512  # blocks of rows whose column sums are kept apart
LARGEST = 87.0  # exp(88.7) overflows in float32, exp(−87.3) is its smallest normal number


def fixed_shift(problems: Problems, columns: int) -> float | None:
    """c such that Σ exp(logit − c) over `columns` neither overflows nor vanishes; None if none is known.

    Logits lie within ±1/τ. At c = 1/τ, the largest of them, a row of random negatives would underflow
    at τ = 0.01; so c is as small as the sum's overflow allows. "softplus" sums what cannot overflow.
    """
    if problems.function == "softplus":
        return 0.0
    if not isinstance(problems.temperature, float) or not problems.normalize:
        return None
    scale = 1.01 / problems.temperature  # rounded to 8 bits, a unit vector is up to 0.4 % longer
    shift = max(0.0, scale + math.log(columns) - LARGEST)
    return shift if scale + shift < LARGEST else None


@triton.jit
def similarity(
    own,  # [OWN, DEPTH], the only chunk; not read if there are more
    own_rows,  # pointers to [OWN, DEPTH]
    other_rows,  # pointers to [OTHER, DEPTH]
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cosines [OWN, OTHER] over CHUNKS · DEPTH dimensions, and the last chunk [OTHER, DEPTH]."""
    other = tl.load(other_rows)
    cosine = tl.zeros((own_rows.shape[0], other_rows.shape[0]), tl.float32)
    if CHUNKS == 1:
        cosine = add_product(cosine, own, tl.trans(other), PRECISION)
    else:
        for chunk in range(CHUNKS):
            mine = tl.load(own_rows + chunk * DEPTH)
            other = tl.load(other_rows + chunk * DEPTH)
            cosine = add_product(cosine, mine, tl.trans(other), PRECISION)
    return cosine, other


@triton.jit
def within(cosine, row, column, count, DIAGONAL: tl.constexpr):
    """Cosines [OWN, OTHER], −∞ where the `count` columns have ended and, without DIAGONAL, on it."""
    if DIAGONAL:
        out = (column >= count)[None, :]
    else:
        out = (row[:, None] == column[None, :]) | (column >= count)[None, :]
    return tl.where(out, float("-inf"), cosine)


@triton.jit
def by_ids(cosine, own_id, other_ids, column, count, SAME: tl.constexpr):
    """Cosines [OWN, OTHER], −∞ where the ids of row and column are equal, or with SAME where they differ."""
    other_id = tl.load(other_ids + column, column < count, 0)
    equal = own_id[:, None] == other_id[None, :]
    if SAME:
        cosine = tl.where(equal, cosine, float("-inf"))
    else:
        cosine = tl.where(equal, float("-inf"), cosine)
    return cosine


@triton.jit
def _add_block(
    top,
    sums,
    cosine,  # [OWN, OTHER]
    k,
    row_shift,
    column_total,  # pointers to [OTHER]
    FUNCTION: tl.constexpr,
    RUNNING: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rows' maxima and sums with a block more; its columns' sums are complete and stored."""
    if FUNCTION == "softplus":
        return top, sums + tl.sum(softplus2(cosine * k - row_shift[:, None]), 1)
    elif RUNNING:  # noqa: RET505 - Triton compiles whatever follows an if
        return add_exponentials(top, sums, cosine, k)
    else:
        exponential = tl.exp2(cosine * k - row_shift[:, None])
        if COLUMNS:
            tl.store(column_total, tl.sum(exponential, 0))
        return tl.maximum(top, tl.max(cosine, 1)), sums + tl.sum(exponential, 1)


@triton.jit
def logsumexp_kernel(
    own,  # [G, OWN_PADDED, D] unit vectors
    other,  # [G, OTHER_PADDED, D]
    own_ids,  # [G, own_count] and
    other_ids,  # [G, other_count], or None
    bias,  # [G, own_count], or None but for "softplus"
    highest,  # [splits, G, OWN_PADDED]: the largest cosine that is summed; not for "softplus"
    total,  # [splits, G, OWN_PADDED]: Σ exp(logit − shift), or with RUNNING Σ exp(logit − largest)
    diagonal,  # [G, OWN_PADDED]: the cosine on the diagonal, of the same product; for "info_nce" only
    column_total,  # [blocks of rows, G, OTHER_PADDED], with COLUMNS
    temperature,
    shift,  # in base 2; not read if RUNNING
    own_count,
    other_count,
    own_blocks,
    splits,
    G,
    OWN_PADDED,
    OTHER_PADDED,
    FUNCTION: tl.constexpr,
    DIAGONAL: tl.constexpr,  # whether it is summed
    SAME: tl.constexpr,  # whether it is equal ids that are summed
    LEARNED: tl.constexpr,
    RUNNING: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    # Neighbouring programs share a problem and its columns, which then come from the L2 cache.
    block = tl.program_id(0) % own_blocks
    split = tl.program_id(0) // own_blocks % splits
    problem = (tl.program_id(0) // (own_blocks * splits)).to(tl.int64)
    D: tl.constexpr = DEPTH * CHUNKS
    row0 = block * OWN
    row = row0 + tl.arange(0, OWN)
    k = inverse_temperature(temperature, LEARNED) * LOG2_E
    own_elements = tl.arange(0, OWN)[:, None] * D + tl.arange(0, DEPTH)[None, :]
    own_rows = own + (problem * OWN_PADDED + row0) * D + own_elements
    other_elements = tl.arange(0, OTHER)[:, None] * D + tl.arange(0, DEPTH)[None, :]
    other_rows = other + problem * OTHER_PADDED * D + other_elements
    mine = tl.load(own_rows)
    column_total += (block.to(tl.int64) * G + problem) * OTHER_PADDED

    top = tl.full((OWN,), float("-inf"), tl.float32)
    sums = tl.zeros((OWN,), tl.float32)
    own_cosine = tl.zeros((OWN,), tl.float32)
    if FUNCTION == "softplus":
        biases = tl.load(bias + problem * own_count + row, row < own_count, float("-inf"))
        row_shift = biases * -LOG2_E
    else:
        # An infinite shift takes padded rows out of the column sums.
        row_shift = tl.where(row < own_count, shift, float("inf"))
    if own_ids is not None:
        own_id = tl.load(own_ids + problem * own_count + row, row < own_count, 0)
        other_ids += problem * other_count

    other_blocks = tl.cdiv(other_count, OTHER)
    begin, end = split * other_blocks // splits, (split + 1) * other_blocks // splits
    first, last, full = row0 // OTHER, tl.cdiv(row0 + OWN, OTHER), other_count // OTHER
    if DIAGONAL:
        first, last = 0, 0  # no block is one of the diagonal
    count, before, resume = plain_blocks(first, last, begin, end, full)
    for t in range(count):
        column0 = plain_block(t, begin, before, resume).to(tl.int64) * OTHER
        cosine, _ = similarity(mine, own_rows, other_rows + column0 * D, DEPTH, CHUNKS, PRECISION)
        column = column0 + tl.arange(0, OTHER)
        if own_ids is not None:
            cosine = by_ids(cosine, own_id, other_ids, column, other_count, SAME)
        top, sums = _add_block(
            top, sums, cosine, k, row_shift, column_total + column, FUNCTION, RUNNING, COLUMNS
        )
    count, on_diagonal, start = masked_blocks(first, last, begin, end, full, other_blocks)
    for t in range(count):
        column0 = masked_block(t, on_diagonal, start, full).to(tl.int64) * OTHER
        column = column0 + tl.arange(0, OTHER)
        cosine, _ = similarity(mine, own_rows, other_rows + column0 * D, DEPTH, CHUNKS, PRECISION)
        if FUNCTION == "info_nce":
            positive = row[:, None] == column[None, :]
            own_cosine += tl.sum(tl.where(positive, cosine, 0.0), 1)
        cosine = within(cosine, row, column, other_count, DIAGONAL)
        if own_ids is not None:
            cosine = by_ids(cosine, own_id, other_ids, column, other_count, SAME)
        top, sums = _add_block(
            top, sums, cosine, k, row_shift, column_total + column, FUNCTION, RUNNING, COLUMNS
        )

    part = (split * G + problem) * OWN_PADDED + row
    tl.store(highest + part, top)
    tl.store(total + part, sums)
    if FUNCTION == "info_nce":
        mask = (row // OTHER >= begin) & (row // OTHER < end)  # one split has a row's diagonal
        tl.store(diagonal + problem * OWN_PADDED + row, own_cosine, mask)
