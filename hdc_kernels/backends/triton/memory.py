"""What the launches write to, and how their arguments are described."""

from typing import NamedTuple

import torch
from torch import Tensor

from hdc_kernels.backends import Problems

LSE_DTYPE = torch.float64  # see `logsumexp`


class Rows(NamedTuple):
    """What is kept of every row; `Terms` without their total."""

    loss: Tensor  # [T]
    hits: Tensor  # [T]
    lse: Tensor  # [1 or 2, T]


def empty_rows(problems: Problems) -> Rows:
    """Room for every row of every problem."""
    rows = sum(x.shape[0] * x.shape[1] for x in problems.x)
    device = problems.x[0].device
    return Rows(
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty(1 + problems.symmetric, rows, dtype=LSE_DTYPE, device=device),
    )


def empty_gradients(
    embeddings: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Room for the gradients, laid out as the embeddings are and of their dtype if none is given."""
    return tuple(torch.empty_like(embedding, dtype=dtype) for embedding in embeddings)


def strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Of problem and row, for every pair; that of the dimensions is 1."""
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)


def precision() -> str:
    """How products of float32 are taken: exactly, or with 10 bits of mantissa on tensor cores."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
