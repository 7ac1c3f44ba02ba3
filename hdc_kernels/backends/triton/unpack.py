# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""From gradients by unit vectors to gradients by embeddings: the positives' part, 1/τ, the norms.

Of the sum's part dx̂' of every row (its parts over a split are added here) and its positive's weight w,

    dx̂ = (dx̂' − w ŷ_i)/τ        dx = (dx̂ − x̂ (x̂·dx̂))/|x|        ∂/∂τ = −(1/τ) Σ_i x̂_i·dx̂_i

with unit vectors taken anew from the embeddings, in float32: in a converged batch most of dx̂ is along
x̂ and goes, so what stays must not hold the rounding of half precision. Without positives, w is 0. The
bias of "softplus" has its parts added here too.

No product; reads 2·N·D elements and 8·N·D bytes, writes 2·N·D elements. Not run on a GPU yet.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends.triton.addressing import rows_of_pair
from hdc_kernels.backends.triton.arithmetic import (
    inverse_temperature,
    load_units,
    narrow,
    unit_rows_backward,
)


@triton.jit
def unpack_kernel(
    x,  # K pointers to [G, M, D]
    y,  # K pointers to [G, N, D]
    dx,
    dy,
    x_strides,  # K × (problem, row)
    y_strides,
    dx_strides,
    dy_strides,
    firsts,  # K first problems
    x_gradient,  # [x_splits, ΣG, M_PADDED, D_PADDED] float32
    y_gradient,  # [y_splits, ΣG, N_PADDED, D_PADDED]
    bias_gradient,  # [x_splits, ΣG, M_PADDED], or None without a bias
    weight,  # [1 or 2, ΣG, M_PADDED], or None without positives
    d_temperature,  # [programs], parts
    d_bias,  # [ΣG, M], or None
    temperature,
    M,
    N,
    D,
    M_PADDED,
    N_PADDED,
    D_PADDED,
    G,
    x_splits,
    y_splits,
    LEARNED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    longer = N
    if weight is None:
        longer = tl.maximum(M, N)
    blocks = tl.cdiv(longer, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dimension = tl.arange(0, BLOCK_D)
    x_mask = (row < M)[:, None] & (dimension < D)[None, :]
    y_mask = (row < N)[:, None] & (dimension < D)[None, :]
    x_rows = rows_of_pair(x, x_strides, firsts, problem, row, BLOCK_D)
    y_rows = rows_of_pair(y, y_strides, firsts, problem, row, BLOCK_D)
    x_unit, x_inverse = load_units(x_rows, x_mask, NORMALIZE)
    y_unit, y_inverse = load_units(y_rows, y_mask, NORMALIZE)
    if weight is not None:
        pull = tl.load(weight + problem * M_PADDED + row, row < M, 0.0)
        if SYMMETRIC:
            pull += tl.load(weight + (G + problem) * M_PADDED + row, row < M, 0.0)

    scale = inverse_temperature(temperature, LEARNED)
    x_packed = (problem * M_PADDED + row)[:, None] * D_PADDED + dimension[None, :]
    y_packed = (problem * N_PADDED + row)[:, None] * D_PADDED + dimension[None, :]
    x_total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if weight is not None:
        x_total = -pull[:, None] * y_unit
    for _ in range(x_splits):
        x_total += tl.load(x_gradient + x_packed, x_mask, 0.0)
        x_packed += tl.cast(G, tl.int64) * M_PADDED * D_PADDED
    y_total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if weight is not None:
        y_total = -pull[:, None] * x_unit
    for _ in range(y_splits):
        y_total += tl.load(y_gradient + y_packed, y_mask, 0.0)
        y_packed += tl.cast(G, tl.int64) * N_PADDED * D_PADDED
    if d_bias is not None:
        bias_total = tl.zeros((ROWS,), tl.float32)
        for split in range(x_splits):
            part = (split * G + problem) * M_PADDED + row
            bias_total += tl.load(bias_gradient + part, row < M, 0.0)
        tl.store(d_bias + problem * M + row, bias_total, row < M)
    x_result, along = unit_rows_backward(x_unit, x_inverse, x_total * scale, NORMALIZE)
    y_result, _ = unit_rows_backward(y_unit, y_inverse, y_total * scale, NORMALIZE)
    dtype: tl.constexpr = dx[0].dtype.element_ty
    dx_rows = rows_of_pair(dx, dx_strides, firsts, problem, row, BLOCK_D)
    dy_rows = rows_of_pair(dy, dy_strides, firsts, problem, row, BLOCK_D)
    tl.store(dx_rows, narrow(x_result, dtype), x_mask)
    tl.store(dy_rows, narrow(y_result, dtype), y_mask)
    tl.store(d_temperature + tl.program_id(0), -scale * tl.sum(along, 0))
