"""Which backend runs a call: the one asked for, or the fastest that can.

The rule of "auto":

    CPU tensors      "cpu", if the C++ library was built
    CUDA tensors     "triton", if Triton is installed and the GPU is an Ampere or newer, but neither for float64
                     nor where a mask leaves out single entries
    anything else    "torch" up to PLAIN_LOGITS logits, "chunked" above

That of CPU tensors is measured, at every size in `bench/results/README.md`; that of CUDA tensors is not yet.
PLAIN_LOGITS bounds memory: below it, plain PyTorch is faster than its chunks.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hdc_kernels.backends import Implementation

PLAIN = ("torch", "chunked")  # what autograd sees through
PLAIN_LOGITS = 2**24  # 64 MiB in float32, of which plain PyTorch holds three or four


def select(
    backend: str,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rows_first: int = 0,
    *,
    single_entries: bool = False,
) -> str:
    """The name of the backend for these tensors; raises ValueError if it is missing or does not fit.

    The first `rows_first` pairs have their rows in dimension 0, the others in the last but one.
    """
    device, dtype = x[0].device.type, x[0].dtype
    if backend == "auto":
        if device == "cpu" and _has_library():
            return "cpu"
        if dtype != torch.float64 and not single_entries and _suits_triton(x[0]):
            return "triton"
        logits = sum(
            a.numel() // a.shape[-1] * b.shape[0 if k < rows_first else -2]
            for k, (a, b) in enumerate(zip(x, y, strict=True))
        )
        return "torch" if logits <= PLAIN_LOGITS else "chunked"
    if backend == "cpu":
        if device != "cpu":
            raise ValueError(f"backend is 'cpu' but the tensors are on {device}; use 'auto'")
        if not _has_library():
            raise ValueError(
                "backend is 'cpu' but its C++ library was not built; install a C++ compiler "
                "(g++ or clang++), then reinstall this package"
            )
    if backend == "triton":
        _check_triton(device)
        if dtype == torch.float64:
            raise ValueError("backend is 'triton' but the tensors are float64; use 'auto'")
        if single_entries:
            raise ValueError(
                "backend is 'triton', which leaves out no single entries or listed pairs; use 'auto'"
            )
    return backend


def select_for_clips(backend: str, clips: Tensor) -> str:
    """The backend of `augment_clips`: "auto" is "triton" under the same conditions, else "torch"."""
    if backend == "auto":
        return "triton" if _suits_triton(clips) else "torch"
    if backend == "triton":
        _check_triton(clips.device.type)
    return backend


def _suits_triton(tensor: Tensor) -> bool:
    """Whether "auto" means Triton where this tensor is."""
    return tensor.device.type == "cuda" and _has_triton() and _is_ampere(tensor)


def _check_triton(device: str) -> None:
    """Raises ValueError where whoever asks for Triton cannot have it."""
    if not _has_triton():
        raise ValueError("backend is 'triton' but Triton is not installed; pip install triton")
    if device != "cuda" and not _interpreted():
        raise ValueError(f"backend is 'triton' but the tensors are on {device}; use 'auto'")


@functools.cache
def implementation(name: str) -> Implementation:
    """The module of a backend that `select` named."""
    return cast(Implementation, importlib.import_module(f"hdc_kernels.backends.{name}"))


# For the compiler these are constants: it cannot look into ctypes and imports.
@torch.compiler.assume_constant_result
def _has_library() -> bool:
    from hdc_kernels.backends import cpu

    return cpu.is_available()


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _find_triton()


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _is_ampere(tensor: Tensor) -> bool:
    """An NVIDIA GPU with the matrix instructions that the kernels are checked for, or a newer one."""
    return torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly, for tests."""
    from hdc_kernels.backends.triton.arithmetic import INTERPRET

    return bool(INTERPRET.value)
