# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Where things lie: embeddings in the tensors of several pairs, and blocks of columns along a row."""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]


@triton.jit
def of_pair(values, firsts, problem):
    """The value of the pair that `problem` belongs to; pair k's first problem is firsts[k]."""
    value = values[0]
    for pair in tl.static_range(1, len(firsts)):
        value = tl.where(problem >= firsts[pair], values[pair], value)
    return value


@triton.jit
def pair_of(firsts, problem):
    """The numbers of the pairs that some problems belong to."""
    pair = tl.zeros_like(problem)
    for k in tl.static_range(1, len(firsts)):
        pair += (problem >= firsts[k]).to(tl.int32)
    return pair


@triton.jit
def matrix_of_pair(tensors, strides, firsts, problem):
    """Where a problem's matrix starts, in whichever pair's tensor it is, and the stride of its rows.

    `strides` are those of problem and row, a pair; that of the dimensions is 1.
    """
    pointer, stride = tensors[0] + problem * strides[0][0], strides[0][1]
    for pair in tl.static_range(1, len(firsts)):
        first = firsts[pair]
        here = problem >= first
        pointer = tl.where(here, tensors[pair] + (problem - first) * strides[pair][0], pointer)
        stride = tl.where(here, strides[pair][1], stride)
    return pointer, stride


@triton.jit
def rows_of_pair(tensors, strides, firsts, problem, row, BLOCK_D: tl.constexpr):
    """Pointers to rows [R, BLOCK_D] of a problem."""
    pointer, stride = matrix_of_pair(tensors, strides, firsts, problem)
    return pointer + row[:, None].to(tl.int64) * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def plain_blocks(first, last, begin, end, full):
    """Count and layout of the blocks in [begin, end) that need no mask.

    Those are the ones before `first` and from `last` on, where the diagonal is not, and before `full`,
    where the columns have not ended. Use with `plain_block`.
    """
    before = tl.maximum(tl.minimum(tl.minimum(first, full), end) - begin, 0)
    resume = tl.maximum(begin, last)
    after = tl.maximum(tl.minimum(full, end) - resume, 0)
    return before + after, before, resume


@triton.jit
def plain_block(t, begin, before, resume):
    """Number of the t-th block that needs no mask."""
    return tl.where(t < before, begin + t, resume + t - before)


@triton.jit
def masked_blocks(first, last, begin, end, full, blocks):
    """Count and layout of the others: blocks of the diagonal, then the one where the columns end."""
    start = tl.maximum(begin, first)
    diagonal = tl.maximum(tl.minimum(end, last) - start, 0)
    partial = (full < blocks) & (full >= begin) & (full < end) & ((full < first) | (full >= last))
    return diagonal + partial.to(tl.int32), diagonal, start


@triton.jit
def masked_block(t, diagonal, start, full):
    """Number of the t-th block that needs a mask."""
    return tl.where(t < diagonal, start + t, full)
