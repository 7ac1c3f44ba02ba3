"""What the launches write to, and how exactly float32 is multiplied."""

import torch
from torch import Tensor

from hdc_kernels.backends import Problems


def empty_terms(problems: Problems) -> tuple[Tensor, Tensor, Tensor]:
    """Room for loss, hits and lse of every row."""
    rows = sum(x.shape[0] * x.shape[1] for x in problems.x)
    device = problems.x[0].device
    return (
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty(1 + problems.symmetric, rows, dtype=torch.float32, device=device),
    )


def empty_gradients(problems: Problems) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Room for the gradients, laid out as the embeddings are."""
    return tuple(map(torch.empty_like, problems.x)), tuple(map(torch.empty_like, problems.y))


def precision() -> str:
    """How products of float32 are taken: exactly, or with 10 bits of mantissa on tensor cores."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Of problem and row, for every pair; that of the dimensions is 1."""
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)
