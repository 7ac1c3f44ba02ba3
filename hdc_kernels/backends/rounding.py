"""PyTorch's own switches for whether products of float32 may round their factors.

`torch.set_float32_matmul_precision` turns both. `torch.backends` has one for each kind of device; once that is used,
PyTorch no longer says what the former is.
"""

import torch


def to_bfloat16() -> bool:
    """On CPUs."""
    return bool(torch.backends.mkldnn.matmul.fp32_precision == "bf16")  # type: ignore[attr-defined]


def to_tf32() -> bool:
    """On GPUs."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
