# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Normalise once: raw embeddings of any strides become unit vectors in padded, contiguous memory.

Every later kernel reads them many times, without a mask, in whole vectors: rows are padded with zeros
to a multiple of the tiles' heights, dimensions to a multiple of their depth. Where there are positives,
their logits are taken here too, in float32 from embeddings that were not rounded.

No product; reads 2·G·N·D elements and writes as many. At N = 65,536, D = 128 in bf16 that is 67 MB and
20 µs at 3.35 TB/s, 2 % of the product that follows. Not run on a GPU yet.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends.triton.addressing import rows_of_pair
from hdc_kernels.backends.triton.arithmetic import inverse_temperature, load_units, narrow


@triton.jit
def pack_kernel(
    x,  # K pointers to [G, M, D]
    y,  # K pointers to [G, N, D]
    x_strides,  # K × (problem, row)
    y_strides,
    firsts,  # K first problems
    x_units,  # [ΣG, M_PADDED, D_PADDED]
    y_units,  # [ΣG, N_PADDED, D_PADDED]
    positive,  # [ΣG, M], or None without positives
    temperature,
    M,
    N,
    D,
    M_PADDED,
    N_PADDED,
    D_PADDED,
    LEARNED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    longer = N_PADDED
    if positive is None:
        longer = tl.maximum(M_PADDED, N_PADDED)
    blocks = tl.cdiv(longer, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dimension = tl.arange(0, BLOCK_D)
    x_mask = (row < M)[:, None] & (dimension < D)[None, :]
    y_mask = (row < N)[:, None] & (dimension < D)[None, :]
    x_rows = rows_of_pair(x, x_strides, firsts, problem, row, BLOCK_D)
    y_rows = rows_of_pair(y, y_strides, firsts, problem, row, BLOCK_D)
    x_unit, _x_inverse = load_units(x_rows, x_mask, NORMALIZE)
    y_unit, _y_inverse = load_units(y_rows, y_mask, NORMALIZE)

    dtype: tl.constexpr = x_units.dtype.element_ty
    inside = (dimension < D_PADDED)[None, :]
    x_packed = (problem * M_PADDED + row)[:, None] * D_PADDED + dimension[None, :]
    y_packed = (problem * N_PADDED + row)[:, None] * D_PADDED + dimension[None, :]
    tl.store(x_units + x_packed, narrow(x_unit, dtype), (row < M_PADDED)[:, None] & inside)
    tl.store(y_units + y_packed, narrow(y_unit, dtype), (row < N_PADDED)[:, None] & inside)
    if positive is not None:
        scale = inverse_temperature(temperature, LEARNED)
        tl.store(positive + problem * M + row, tl.sum(x_unit * y_unit, 1) * scale, row < M)
