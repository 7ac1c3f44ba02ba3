"""How the arguments of the launches are described."""

import torch
from torch import Tensor


def strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Of problem and row, for every pair; that of the dimensions is 1."""
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)


def precision() -> str:
    """How products of float32 are taken: exactly, or with 10 bits of mantissa on tensor cores."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
