"""How the arguments of the launches are described."""

from torch import Tensor

from hdc_kernels.backends import rounding


def strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Of problem and row, for every pair; that of the dimensions is 1."""
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)


def precision() -> str:
    """How products of float32 are taken: exactly, or with 10 bits of mantissa on tensor cores."""
    return "tf32" if rounding.to_tf32() else "ieee"
