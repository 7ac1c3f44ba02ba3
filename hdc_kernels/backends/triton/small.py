# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Everything in one launch, from raw embeddings to loss and gradients, for problems that are small.

`fits` says which. The paper's batch is 17 problems of 128 × 128 × 128 in six pairs of tensors: 71 MFLOP a
product, so launches are all that costs time.

A program owns BLOCK rows of a problem, or as many columns, and waits for no other:

    1. logsumexps of its rows, or of the rows whose positives its columns are; if symmetric, of such columns too
    2. terms and hits, if it owns rows
    3. its gradient, from its positives and the other side's vectors, a block at a time
    4. if it owns rows and is the last of those to come here: the total, the means and the gradient by the
       temperature, out of the parts that all of them have left

There the other side's vectors are weighted with probabilities of rows (if symmetric, of columns too), so who
owns columns needs the logsumexp of every row. It takes them block by block as it comes to them: one product
more, the same in every such program, which run beside each other where a second launch would have to wait.
Logsumexps of an earlier launch it reads instead.

Embeddings are read through their own strides, from the cache when it is not for the first time, and little
but results is written: three numbers a program.

On paper, for the 17 problems on an H100: 136 programs on 132 multiprocessors, each of at most 1.75 products of
4.2 MFLOP. In bf16 (7.5 TFLOP/s a multiprocessor) these take 1 µs; 14 tiles, which are loaded, normalised and
multiplied one after the other, take more. Float32, multiplied exactly (0.5 TFLOP/s), takes 15 µs at best, most
of it the repeated product: `fits` ends earlier there.

No GPU has run this yet: the figures are arithmetic, and the blocks are chosen by registers.
"""

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from hdc_kernels.backends import Problems
from hdc_kernels.backends.outputs import Rows
from hdc_kernels.backends.tickets import ticket
from hdc_kernels.backends.triton import tiles
from hdc_kernels.backends.triton.addressing import matrix_of_pair, of_pair
from hdc_kernels.backends.triton.arithmetic import (
    LN_2,
    LOG2_E,
    add_exponentials,
    add_product,
    finite_shift,
    gain,
    inverse_temperature,
    load_units,
    narrow,
    product,
    sigmoid,
    softplus,
    unit_rows_backward,
)
from hdc_kernels.backends.triton.memory import precision, strides
from hdc_kernels.backends.triton.totals import PARTS, add_up

# Rows or columns; beyond, the repeated product costs more than the launches that it saves.
LONGEST = 256
LONGEST_EXACT = 128  # in float32 without tensor cores
WIDEST = 256  # dimensions, which registers must hold


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
    loss,  # [T], or None where nothing is kept per row
    hits,  # [T], or None
    lse,  # [1 or 2, T] float64, or None; without TERMS, to read
    parts,  # [3, ΣG · blocks], of what `add_up` adds up
    ticket,  # 0 before the launch and after
    total,
    means,  # [2, K], or None where they are not asked for
    d_temperature,
    T,
    G,
    blocks,  # of the longest side
    TERMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    LEARNED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,  # vectors that logsumexps take at a time
    DEPTH: tl.constexpr,  # dimensions that a product takes at a time
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    problem = (tl.program_id(0) // blocks % G).to(tl.int64)
    owns_rows = tl.program_id(0) < blocks * G
    M, N, D = sizes[0]
    for pair in tl.static_range(1, len(firsts)):
        here = problem >= firsts[pair]
        M = tl.where(here, sizes[pair][0], M)
        N = tl.where(here, sizes[pair][1], N)
        D = tl.where(here, sizes[pair][2], D)
    first_row = of_pair(starts, firsts, problem) + (problem - of_pair(firsts, firsts, problem)) * M
    if loss is not None:
        loss += first_row
        hits += first_row
    if lse is not None:
        lse += first_row
    upstream += first_row
    # A block beyond the end of its problem has nothing to do.
    ended = block * BLOCK >= tl.where(owns_rows, M, N)
    M, N = tl.where(ended, 0, M), tl.where(ended, 0, N)
    weight = of_pair(weights, firsts, problem)
    scale = inverse_temperature(temperature, LEARNED)
    k = scale * LOG2_E
    x_start, x_stride = matrix_of_pair(x, x_strides, firsts, problem)
    y_start, y_stride = matrix_of_pair(y, y_strides, firsts, problem)
    queries, keys = (x_start, x_stride, M, D), (y_start, y_stride, N, D)
    row = block * BLOCK + tl.arange(0, BLOCK)
    mask = row < M

    positive = _positives(queries, keys, row, NORMALIZE, BLOCK_D)
    column_lse = _nothing(BLOCK)
    if TERMS:
        row_lse, own_cosine = _logsumexps(
            queries, keys, row, k, NORMALIZE, PRECISION, OTHER, DEPTH, BLOCK_D
        )
        term = softplus(_gap(row_lse, positive, k))
        if SYMMETRIC:
            column_lse, _own_cosine = _logsumexps(
                keys, queries, row, k, NORMALIZE, PRECISION, OTHER, DEPTH, BLOCK_D
            )
            term = (term + softplus(_gap(column_lse, positive, k))) / 2
        hit = (own_cosine > row_lse[0]) & (term == term) & mask
        if owns_rows:
            if loss is not None:
                tl.store(lse + row, _joined(row_lse, k), mask)
                if SYMMETRIC:
                    tl.store(lse + T + row, _joined(column_lse, k), mask)
                tl.store(loss + row, term, mask)
                tl.store(hits + row, hit, mask)
            tl.store(parts + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0), 0))
            if means is not None:
                hit_part = parts + 2 * blocks * G + tl.program_id(0)
                tl.store(hit_part, tl.sum(hit.to(tl.float32), 0))
    else:
        row_lse = _saved(lse, row, M, k)
        if SYMMETRIC:
            column_lse = _saved(lse + T, row, M, k)

    if GRADIENTS:
        own_start, own_stride = _either(owns_rows, queries, keys)
        other_start, other_stride = _either(owns_rows, keys, queries)
        own = own_start, own_stride, tl.where(owns_rows, M, N), D
        other = other_start, other_stride, tl.where(owns_rows, N, M), D
        # What the others' logsumexps go over: for a row's columns nothing, unless they count.
        summed = M
        if not SYMMETRIC:
            summed = tl.where(owns_rows, 0, N)
        summed_by_others = own_start, own_stride, summed, D

        u = _upstream(upstream, weight, row, M, TERMS, SYMMETRIC)
        row_weight = u * sigmoid(_gap(row_lse, positive, k))
        column_weight = u * sigmoid(_gap(column_lse, positive, k))
        own_lse = _either(owns_rows, row_lse, column_lse)
        own_weight = tl.where(owns_rows, row_weight, column_weight)

        dtype: tl.constexpr = x[0].dtype.element_ty
        GAIN: tl.constexpr = gain(dtype)
        # The positives' part, in float32, which no product rounds; the others' is added to it.
        pull = row_weight + column_weight
        largest = tl.maximum(tl.max(tl.abs(pull), 0), 1e-30)  # of the weights so far, never 0
        partner, _partner_inverse = _units(other, row, NORMALIZE, BLOCK_D)
        gradient = -partner * (pull * (GAIN / largest))[:, None]
        mine, inverse = _factors(own, row, NORMALIZE, BLOCK_D)
        for first in range(0, other[2], BLOCK):
            column = first + tl.arange(0, BLOCK)
            if TERMS:
                their_lse, _own_cosine = _logsumexps(
                    other,
                    summed_by_others,
                    column,
                    k,
                    NORMALIZE,
                    PRECISION,
                    OTHER,
                    DEPTH,
                    BLOCK_D,
                )
            else:
                others_lse = tl.where(owns_rows, lse + T, lse)
                their_lse = _saved(others_lse, column, tl.minimum(summed, M), k)
            their_positive = _positives(queries, keys, column, NORMALIZE, BLOCK_D)
            u = _upstream(upstream, weight, column, M, TERMS, SYMMETRIC)
            their_weight = u * sigmoid(_gap(their_lse, their_positive, k))
            larger = tl.maximum(largest, tl.max(tl.abs(their_weight), 0))
            gradient *= largest / larger
            largest = larger

            theirs, their_inverse = _factors(other, column, NORMALIZE, BLOCK_D)
            cosine, _own_cosine = _cosines(
                own, row, mine, inverse, other, column, theirs, their_inverse, PRECISION, DEPTH
            )
            share = _probabilities(cosine, own_lse[0][:, None], own_lse[1][:, None], k)
            share *= (own_weight * (GAIN / largest))[:, None]
            their_share = _probabilities(cosine, their_lse[0][None, :], their_lse[1][None, :], k)
            share += their_share * (their_weight * (GAIN / largest))[None, :]
            gradient = add_product(gradient, narrow(share, dtype), theirs, PRECISION)
        gradient *= scale * largest / GAIN

        # Read once more: kept since the beginning, they would not fit beside the products.
        unit, inverse = _units(own, row, NORMALIZE, BLOCK_D)
        gradient, along = unit_rows_backward(unit, inverse, gradient, NORMALIZE)
        to_x = matrix_of_pair(dx, dx_strides, firsts, problem)
        to_y = matrix_of_pair(dy, dy_strides, firsts, problem)
        to_start, to_stride = _either(owns_rows, to_x, to_y)
        elements, inside = _elements((to_start, to_stride, own[2], D), row, tl.arange(0, BLOCK_D))
        tl.store(elements, narrow(gradient, dx[0].dtype.element_ty), inside)
        if owns_rows:
            tl.store(parts + blocks * G + tl.program_id(0), -scale * tl.sum(along, 0))

    if owns_rows:
        # Parts are stored, being scalars, by the thread that then draws the ticket and releases them; the barrier
        # keeps this order whoever stores them. Whoever draws the last ticket acquires the parts of all, and what it
        # drew reaches its other threads through a barrier of Triton's. They read past L1, which is not coherent.
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == blocks * G - 1:
            add_up(
                parts,
                blocks,
                G,
                T,
                weights,
                firsts,
                starts,
                total,
                means,
                d_temperature,
                TERMS,
                GRADIENTS,
                PARTS,
            )
            tl.store(ticket, 0)


@triton.jit
def _either(first, a, b):
    """The pair a, or b."""
    return tl.where(first, a[0], b[0]), tl.where(first, a[1], b[1])


@triton.jit
def _elements(matrix, row, dimension):
    """Pointers into a matrix (pointer, stride, rows, dimensions), and which of them are inside."""
    elements = matrix[0] + row[:, None].to(tl.int64) * matrix[1] + dimension[None, :]
    return elements, (row < matrix[2])[:, None] & (dimension < matrix[3])[None, :]


@triton.jit
def _units(matrix, row, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_units` of some rows [R, BLOCK_D]."""
    elements, inside = _elements(matrix, row, tl.arange(0, BLOCK_D))
    return load_units(elements, inside, NORMALIZE)


@triton.jit
def _factors(matrix, row, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_units`, rounded for a product."""
    unit, inverse = _units(matrix, row, NORMALIZE, BLOCK_D)
    return narrow(unit, matrix[0].dtype.element_ty), inverse


@triton.jit
def _positives(queries, keys, row, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines of rows with their own columns, of vectors that are not rounded; 0 where there is none."""
    x_unit, _x_inverse = _units(queries, row, NORMALIZE, BLOCK_D)
    y_unit, _y_inverse = _units(keys, row, NORMALIZE, BLOCK_D)
    return tl.sum(x_unit * y_unit, 1)


@triton.jit
def _cosines(
    own,
    row,
    mine,  # `_factors` of these rows [R, BLOCK_D], and their 1/|x|
    inverse,
    other,
    column,
    theirs,  # [C, BLOCK_D]
    their_inverse,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Cosines [R, C], −∞ on the diagonal and outside; and those on the diagonal [R], or 0."""
    if mine.shape[1] == DEPTH:
        cosine = product(mine, tl.trans(theirs), PRECISION)
    else:  # all dimensions at once would not fit into the registers
        cosine = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
        for first in range(0, own[3], DEPTH):
            dimension = first + tl.arange(0, DEPTH)
            a = _part(own, row, inverse, dimension)
            b = _part(other, column, their_inverse, dimension)
            cosine = add_product(cosine, a, tl.trans(b), PRECISION)
    diagonal = row[:, None] == column[None, :]
    on_diagonal = tl.sum(tl.where(diagonal, cosine, 0.0), 1)
    out = (row >= own[2])[:, None] | (column >= other[2])[None, :] | diagonal
    return tl.where(out, float("-inf"), cosine), on_diagonal


@triton.jit
def _part(matrix, row, inverse, dimension):
    """Some dimensions of `_factors`."""
    elements, inside = _elements(matrix, row, dimension)
    unit = tl.load(elements, inside, 0.0).to(tl.float32) * inverse[:, None]
    return narrow(unit, matrix[0].dtype.element_ty)


@triton.jit
def _logsumexps(
    own,
    other,
    row,
    k,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of the negatives of some rows [R], and the positive's cosine by the same product: equal vectors tie.

    Each in two parts, the largest cosine c and log2 Σ exp2((cosine − c)·k): their sum is large at a small
    temperature, and rounding it would change a whole row.
    """
    mine, inverse = _factors(own, row, NORMALIZE, BLOCK_D)
    highest = tl.full((row.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((row.shape[0],), tl.float32)
    own_cosine = tl.zeros((row.shape[0],), tl.float32)
    for first in range(0, other[2], OTHER):
        column = first + tl.arange(0, OTHER)
        theirs, their_inverse = _factors(other, column, NORMALIZE, BLOCK_D)
        cosine, on_diagonal = _cosines(
            own, row, mine, inverse, other, column, theirs, their_inverse, PRECISION, DEPTH
        )
        own_cosine += on_diagonal
        highest, total = add_exponentials(highest, total, cosine, k)
    return (highest, tl.log2(total)), own_cosine


@triton.jit
def _nothing(ROWS: tl.constexpr):
    """Logsumexps of no negatives."""
    nothing = tl.full((ROWS,), float("-inf"), tl.float32)
    return nothing, nothing


@triton.jit
def _joined(lse, k):
    """Logsumexps in float64."""
    return (lse[0].to(tl.float64) * k + lse[1]) * LN_2


@triton.jit
def _saved(joined, row, rows, k):
    """The parts of logsumexps that were stored; of nothing from `rows` on."""
    exponent = tl.load(joined + row, row < rows, float("-inf")) * LOG2_E
    highest = (exponent / k).to(tl.float32)
    rest = (exponent - highest.to(tl.float64) * k).to(tl.float32)
    return highest, tl.where(highest == float("-inf"), float("-inf"), rest)


@triton.jit
def _gap(lse, positive, k):
    """Logsumexps minus the positives' logits."""
    return ((lse[0] - positive) * k + lse[1]) * LN_2


@triton.jit
def _probabilities(cosine, highest, log_total, k):
    """exp(logit − logsumexp); 0 where there was nothing to sum."""
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.exp2((cosine - base) * k - finite_shift(log_total))


@triton.jit
def _upstream(upstream, weight, row, M, TERMS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Gradients by the terms of some rows; by their halves if they have two."""
    if TERMS:
        u = tl.where(row < M, weight, 0.0)
    else:
        u = tl.load(upstream + row, row < M, 0.0)
    if SYMMETRIC:
        u *= 0.5
    return u


def contrast(
    problems: Problems,
    rows: Rows | None,
    upstream: Tensor | None,
    dx: tuple[Tensor, ...] | None,
    dy: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `general.contrast`, with the means if they are asked for. Without rows, nothing is kept per row."""
    firsts, starts, sizes = [0], [0], []
    for x, y in zip(problems.x, problems.y, strict=True):
        firsts.append(firsts[-1] + x.shape[0])
        starts.append(starts[-1] + x.shape[0] * x.shape[1])
        sizes.append((x.shape[1], y.shape[1], x.shape[2]))
    G, T = firsts.pop(), starts.pop()
    columns, dimensions = (max(size[axis] for size in sizes) for axis in (1, 2))
    tile = tiles.small_tiles(columns, dimensions, problems.x[0].dtype)
    blocks = triton.cdiv(columns, tile.own)
    sides = 1 if dx is None or not problems.needs_y else 2
    device = problems.x[0].device
    # Not views of one tensor: in the backward pass, the gradient is changed in place.
    total, d_temperature = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    means = total.new_empty(2, len(problems.x)) if problems.detail == "means" else None
    parts = total.new_empty(3, G * blocks)
    dx_or_any, dy_or_any = dx or problems.x, dy or problems.y  # not touched without gradients
    contrast_kernel[(sides * G * blocks,)](
        problems.x,
        problems.y,
        dx_or_any,
        dy_or_any,
        *map(strides, (problems.x, problems.y, dx_or_any, dy_or_any)),
        tuple(firsts),
        tuple(starts),
        tuple(sizes),
        problems.weights,
        parts if upstream is None else upstream,
        problems.temperature,
        *(rows or (None, None, None)),
        parts,
        ticket(device),
        total,
        means,
        d_temperature,
        T,
        G,
        blocks,
        TERMS=upstream is None,
        GRADIENTS=dx is not None,
        LEARNED=isinstance(problems.temperature, Tensor),
        SYMMETRIC=problems.symmetric,
        NORMALIZE=problems.normalize,
        PRECISION=precision(),
        BLOCK=tile.own,
        OTHER=tile.other,
        DEPTH=tile.depth,
        BLOCK_D=tile.width,
        PARTS=PARTS,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return total, d_temperature, means


def fits(problems: Problems) -> bool:
    """Whether the problems are small, and such as the kernel knows: "info_nce", without ids."""
    columns = max(y.shape[1] for y in problems.y)
    dimensions = max(y.shape[2] for y in problems.y)
    exact = problems.x[0].dtype == torch.float32 and precision() == "ieee"
    return (
        problems.function == "info_nce"
        and problems.mask.ids is None
        and columns <= (LONGEST_EXACT if exact else LONGEST)
        and dimensions <= WIDEST
    )
