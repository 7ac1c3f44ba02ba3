"""Which backend runs a call: the one asked for, or the fastest that can.

The rule of "auto":

    CPU tensors      "cpu", if the C++ library was built
    CUDA tensors     "triton", if Triton is installed and the GPU is an Ampere or newer, but neither for float64
                     nor where a mask leaves out single entries
    anything else    "torch" up to PLAIN_LOGITS logits, "chunked" above

That of CPU tensors is measured, at every size in `bench/results/README.md`; that of CUDA tensors is not yet, and
"cuda" waits for it: only who asks for it gets it. PLAIN_LOGITS bounds memory: below it, plain PyTorch is faster than
its chunks.

"cuda", which `pip install` compiles where nvcc is, takes a call on a GPU that it was compiled for if

    the function     is "info_nce" or "logsumexp": every loss but SigLIP and those weighted by hardness
    the embeddings   are float32, bfloat16 or float16, of at most CUDA_WIDTH dimensions
    the mask         goes by ids and the diagonal, not by single entries
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from hdc_kernels.backends import Function, Implementation, cpu

Found = TypeVar("Found", bound=Callable[..., bool])

PLAIN = ("torch", "chunked")  # what autograd sees through
PLAIN_LOGITS = 2**24  # 64 MiB in float32, of which plain PyTorch holds three or four
CUDA_WIDTH = 512
CUDA_TAKES = (
    f"it takes float32, bfloat16 and float16 embeddings of at most {CUDA_WIDTH} dimensions, losses that are "
    "logsumexps, and no listed pairs"
)


def select(
    backend: str,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rows_first: int = 0,
    *,
    function: Function = "info_nce",
    single_entries: bool = False,
) -> str:
    """The name of the backend for these tensors; raises ValueError if it is missing or does not fit.

    The first `rows_first` pairs have their rows in dimension 0, the others in the last but one.
    """
    if backend == "auto" and x[0].is_cpu and _has_library():
        return "cpu"  # before a device is named, which takes longer than all of this
    device, dtype = x[0].device.type, x[0].dtype
    if backend == "auto":
        if dtype != torch.float64 and not single_entries and suits_triton(x[0]):
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
    if backend == "cuda":
        _check_cuda(x, function, single_entries)
    return backend


def select_for_clips(backend: str, clips: Tensor) -> str:
    """The backend of `augment_clips`: "auto" is "triton" under the same conditions, else "torch"."""
    if backend == "auto":
        return "triton" if suits_triton(clips) else "torch"
    if backend == "triton":
        _check_triton(clips.device.type)
    return backend


def suits_triton(tensor: Tensor) -> bool:
    """Whether "auto" means Triton where this tensor is."""
    return tensor.device.type == "cuda" and _has_triton() and _is_ampere(tensor)


def _check_triton(device: str) -> None:
    """Raises ValueError where whoever asks for Triton cannot have it."""
    if not _has_triton():
        raise ValueError("backend is 'triton' but Triton is not installed; pip install triton")
    if device != "cuda" and not _interpreted():
        raise ValueError(f"backend is 'triton' but the tensors are on {device}; use 'auto'")


def _check_cuda(x: Sequence[Tensor], function: Function, single_entries: bool) -> None:
    """Raises ValueError if backend "cuda" is missing or does not take such a call."""
    device, dtype = x[0].device.type, x[0].dtype
    if device != "cuda":
        raise ValueError(f"backend is 'cuda' but the tensors are on {device}; use 'auto'")
    if not _has_cuda_library():
        raise ValueError(
            "backend is 'cuda' but its CUDA library was not built; install nvcc (the CUDA toolkit, 12.5 or later), "
            "then reinstall this package"
        )
    if not _is_compiled_for(x[0]):
        major, minor = torch.cuda.get_device_capability(x[0].device)
        name = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
        raise ValueError(
            f"backend is 'cuda' but its library has no code for this GPU's compute capability {major}.{minor}; if "
            f"it is 8.0 or later, reinstall this package with HDC_CUDA_ARCHITECTURES={name}"
        )
    width = max(t.shape[-1] for t in x)
    for unfit, what in (
        (dtype == torch.float64, "the tensors are float64"),
        (width > CUDA_WIDTH, f"the embeddings have {width} dimensions"),
        (function == "softplus", "the loss is a sum of softplus"),
        (function == "tilted", "the loss weighs negatives by their hardness"),
        (single_entries, "pairs are listed"),
    ):
        if unfit:
            raise ValueError(f"backend is 'cuda' but {what}; {CUDA_TAKES}; use 'auto'")


@functools.cache
def implementation(name: str) -> Implementation:
    """The module of a backend that `select` named."""
    return cast(Implementation, importlib.import_module(f"hdc_kernels.backends.{name}"))


def constant(function: Found) -> Found:
    """For the compiler a constant: it cannot look into ctypes and imports.

    That is `torch.compiler.assume_constant_result`, but for its import of the whole compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _has_library() -> bool:
    return cpu.is_available()


@constant
def _has_triton() -> bool:
    return _find_triton()


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant
def _has_cuda_library() -> bool:
    from hdc_kernels.backends import cuda

    return cuda.is_available()


@constant
def _is_compiled_for(tensor: Tensor) -> bool:
    """An NVIDIA GPU that the library has code for."""
    from hdc_kernels.backends import cuda

    capability = torch.cuda.get_device_capability(tensor.device)
    return torch.version.hip is None and cuda.runs_on(capability)


@constant
def _is_ampere(tensor: Tensor) -> bool:
    """An NVIDIA GPU with the matrix instructions that the kernels are checked for, or a newer one."""
    return torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@constant
def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly, for tests."""
    from hdc_kernels.backends.triton.arithmetic import INTERPRET

    return bool(INTERPRET.value)
