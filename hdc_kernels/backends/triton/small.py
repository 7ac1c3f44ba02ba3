# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Everything in one launch: one program takes one problem from raw embeddings to loss and gradients.

For half precision and at most 128 rows, columns and dimensions (`fits` says exactly which). The paper's
batch is 17 problems of 128 × 128 × 128 in six pairs of tensors: 71 MFLOP a product, so launches are all
that costs time.

A program walks over its columns twice, a few at a time: for the row sums, and then for S once more, P·Ŷ
and Pᵀ·X̂: 4 products. The embeddings are read through their own strides, from the cache when it is not
for the first time, and nothing but results is written. With all of S and of both gradients in registers
it would be 3 products, but at 128 × 128 × 128 those spill.

The floor for the 17 problems: 4 products of 4.2 MFLOP on one of 132 multiprocessors (7.5 TFLOP/s each in
bf16) are 2.2 µs, the exponentials of twice 128 × 128 logits 1.1 µs, and 130 KB in and out at a
multiprocessor's share of the bandwidth 5 µs: of the order of the launch itself.

No GPU has run this yet: the figures are arithmetic, and the blocks are chosen by registers.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from hdc_kernels.backends import Problems
from hdc_kernels.backends.outputs import Rows
from hdc_kernels.backends.triton.addressing import of_pair, rows_of_pair
from hdc_kernels.backends.triton.arithmetic import (
    LN_2,
    LOG2_E,
    add_exponentials,
    add_product,
    finite_shift,
    gain,
    inverse_temperature,
    load_units,
    log_total,
    narrow,
    product,
    sigmoid,
    softplus,
    unit_rows_backward,
)
from hdc_kernels.backends.triton.memory import strides
from hdc_kernels.backends.triton.tiles import block_size, fits_one_program


@triton.jit
def contrast_kernel(
    x,  # K pointers to [G, M, D]
    y,  # K pointers to [G, N, D]
    dx,
    dy,
    x_strides,  # K × (problem, row); that of the dimensions is 1
    y_strides,
    dx_strides,
    dy_strides,
    firsts,  # K first problems
    starts,  # K first rows in [T]
    sizes,  # K × (M, N, D)
    weights,  # K numbers: what TERMS are totalled with
    upstream,  # [T], without TERMS
    temperature,  # a number or a pointer to one
    loss,  # [T]
    hits,  # [T]
    lse,  # [1 or 2, T]
    sums,  # [2, programs]: parts of the total and of the gradient by the temperature
    T,
    TERMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    LEARNED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    M, N, D = problem * 0, problem * 0, problem * 0
    for pair in tl.static_range(len(firsts)):
        here = problem >= firsts[pair]
        M = tl.where(here, sizes[pair][0], M)
        N = tl.where(here, sizes[pair][1], N)
        D = tl.where(here, sizes[pair][2], D)
    first_row = of_pair(starts, firsts, problem) + (problem - of_pair(firsts, firsts, problem)) * M
    row = tl.arange(0, ROWS)
    dimension = tl.arange(0, BLOCK_D) < D
    flat = first_row + row  # where this problem's rows are in [T]
    x_rows = rows_of_pair(x, x_strides, firsts, problem, row, BLOCK_D)
    y_rows = rows_of_pair(y, y_strides, firsts, problem, row, BLOCK_D)
    mask = (row < M)[:, None] & dimension[None, :]
    dtype: tl.constexpr = x[0].dtype.element_ty
    scale = inverse_temperature(temperature, LEARNED)
    k = scale * LOG2_E

    x_unit, x_inverse = load_units(x_rows, mask, NORMALIZE)
    y_unit, _y_inverse = load_units(y_rows, mask, NORMALIZE)
    positive = tl.sum(x_unit * y_unit, 1) * scale
    x_narrow = narrow(x_unit, dtype)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    column_gap = tl.zeros((ROWS,), tl.float32)
    for column0 in range(0, N, COLUMNS):
        column = column0 + tl.arange(0, COLUMNS)
        key_mask = (column < N)[:, None] & dimension[None, :]
        key_rows = rows_of_pair(y, y_strides, firsts, problem, column, BLOCK_D)
        key, key_inverse = load_units(key_rows, key_mask, NORMALIZE)
        cosine = product(x_narrow, tl.trans(narrow(key, dtype)))
        # The positive's cosine by the same product as the others': equal vectors must tie exactly.
        diagonal = row[:, None] == column[None, :]
        own += tl.sum(tl.where(diagonal, cosine, 0.0), 1)
        cosine = _negatives(cosine, row, column, M, N)
        highest, total = add_exponentials(highest, total, cosine, k)
        if SYMMETRIC:
            column_lse = _column_logsumexp2(cosine, k) * LN_2
            column_gap += tl.sum(tl.where(diagonal, column_lse[None, :], 0.0), 1)
    row_lse = log_total(highest, total, k)
    row_gap = row_lse * LN_2 - positive
    column_gap -= positive

    weight = of_pair(weights, firsts, problem)
    if TERMS:
        term = softplus(row_gap)
        if SYMMETRIC:
            term = (term + softplus(column_gap)) / 2
            tl.store(lse + T + flat, column_gap + positive, row < M)
        tl.store(lse + flat, row_lse * LN_2, row < M)
        tl.store(loss + flat, term, row < M)
        tl.store(hits + flat, (own > highest) & (term == term), row < M)
        tl.store(sums + problem, weight * tl.sum(tl.where(row < M, term, 0.0), 0))

    if GRADIENTS:
        if TERMS:
            u = tl.where(row < M, weight, 0.0)
        else:
            u = tl.load(upstream + flat, row < M, 0.0)
        gradient_dtype: tl.constexpr = dx[0].dtype.element_ty
        GAIN: tl.constexpr = gain(dtype)
        row_weight = u * sigmoid(row_gap)
        column_weight = tl.zeros((ROWS,), tl.float32)
        if SYMMETRIC:
            row_weight *= 0.5
            column_weight = 0.5 * u * sigmoid(column_gap)
        pull = row_weight + column_weight
        largest = tl.max(tl.maximum(tl.abs(row_weight), tl.abs(column_weight)), 0)
        largest = tl.maximum(largest, 1e-30)
        row_shift = finite_shift(row_lse)
        dx_unit = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for column0 in range(0, N, COLUMNS):
            column = column0 + tl.arange(0, COLUMNS)
            diagonal = row[:, None] == column[None, :]
            key_mask = (column < N)[:, None] & dimension[None, :]
            key_rows = rows_of_pair(y, y_strides, firsts, problem, column, BLOCK_D)
            key, key_inverse = load_units(key_rows, key_mask, NORMALIZE)
            key_narrow = narrow(key, dtype)
            cosine = product(x_narrow, tl.trans(key_narrow))
            cosine = _negatives(cosine, row, column, M, N)
            probability = tl.exp2(cosine * k - row_shift[:, None])
            share = probability * (row_weight * (GAIN / largest))[:, None]
            if SYMMETRIC:
                column_shift = finite_shift(_column_logsumexp2(cosine, k))
                column_share = _turn(diagonal, column_weight) * (GAIN / largest)
                share += tl.exp2(cosine * k - column_shift[None, :]) * column_share[None, :]
            share = narrow(share, dtype)
            if SYMMETRIC:
                dx_unit = add_product(dx_unit, share, key_narrow)
            else:
                probability = narrow(probability * GAIN, dtype)
                dx_unit = add_product(dx_unit, probability, key_narrow)

            query_mask = (column < M)[:, None] & dimension[None, :]
            query_rows = rows_of_pair(x, x_strides, firsts, problem, column, BLOCK_D)
            query, _query_inverse = load_units(query_rows, query_mask, NORMALIZE)
            dkey = product(tl.trans(share), x_narrow) * (largest / GAIN)
            dkey = (dkey - query * _turn(diagonal, pull)[:, None]) * scale
            dkey, _dkey_along = unit_rows_backward(key, key_inverse, dkey, NORMALIZE)
            dkey_rows = rows_of_pair(dy, dy_strides, firsts, problem, column, BLOCK_D)
            tl.store(dkey_rows, narrow(dkey, gradient_dtype), key_mask)

        if SYMMETRIC:
            dx_unit *= largest / GAIN
        else:
            dx_unit *= (row_weight / GAIN)[:, None]
        # Read once more: kept since the beginning, x and y would not fit beside the products.
        x_unit, x_inverse = load_units(x_rows, mask, NORMALIZE)
        y_unit, _y_inverse = load_units(y_rows, mask, NORMALIZE)
        dx_unit = (dx_unit - y_unit * pull[:, None]) * scale
        gradient, along = unit_rows_backward(x_unit, x_inverse, dx_unit, NORMALIZE)
        tl.store(
            rows_of_pair(dx, dx_strides, firsts, problem, row, BLOCK_D),
            narrow(gradient, gradient_dtype),
            mask,
        )
        tl.store(sums + tl.num_programs(0) + problem, -scale * tl.sum(along, 0))


@triton.jit
def _negatives(cosine, row, column, M, N):
    """−∞ on the diagonal and outside of the problem."""
    negative = (row < M)[:, None] & (column < N)[None, :] & (row[:, None] != column[None, :])
    return tl.where(negative, cosine, float("-inf"))


@triton.jit
def _column_logsumexp2(cosine, k):
    """log2 Σ exp2(cosine·k) down every column."""
    highest = tl.max(cosine, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return base * k + tl.log2(tl.sum(tl.exp2((cosine - base[None, :]) * k), 0))


@triton.jit
def _turn(diagonal, values):
    """Of one value a row, those of the rows that have the columns' numbers."""
    return tl.sum(tl.where(diagonal, values[:, None], 0.0), 0)


def contrast(
    problems: Problems,
    terms: Rows,
    upstream: Tensor | None,
    dx: tuple[Tensor, ...] | None,
    dy: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """As `general.contrast`: fill in terms and gradients, return the total and the temperature's."""
    firsts, starts, sizes = [0], [0], []
    for x, y in zip(problems.x, problems.y, strict=True):
        firsts.append(firsts[-1] + x.shape[0])
        starts.append(starts[-1] + x.shape[0] * x.shape[1])
        sizes.append((x.shape[1], y.shape[1], x.shape[2]))
    programs, T = firsts.pop(), starts.pop()
    sums = terms.loss.new_empty(2, programs)
    rows = block_size(max(size[1] for size in sizes))
    dx_or_any, dy_or_any = dx or problems.x, dy or problems.y  # not touched without gradients
    contrast_kernel[(programs,)](
        problems.x,
        problems.y,
        dx_or_any,
        dy_or_any,
        *map(strides, (problems.x, problems.y, dx_or_any, dy_or_any)),
        tuple(firsts),
        tuple(starts),
        tuple(sizes),
        problems.weights,
        terms.loss if upstream is None else upstream,
        problems.temperature,
        *terms,
        sums,
        T,
        TERMS=upstream is None,
        GRADIENTS=dx is not None,
        LEARNED=isinstance(problems.temperature, Tensor),
        SYMMETRIC=problems.symmetric,
        NORMALIZE=problems.normalize,
        ROWS=rows,
        COLUMNS=16,
        BLOCK_D=block_size(max(size[2] for size in sizes)),
        num_warps=8 if rows >= 64 else 4,
        num_stages=1,
    )
    total, d_temperature = sums.sum(1)
    return total, d_temperature


def fits(problems: Problems, capability: tuple[int, int]) -> bool:
    """Whether one program can take the largest problem; it knows no function but "info_nce", and no ids."""
    return (
        problems.function == "info_nce"
        and problems.mask.ids is None
        and fits_one_program(
            max(y.shape[1] for y in problems.y),
            max(y.shape[2] for y in problems.y),
            problems.x[0].dtype,
            capability,
        )
    )
