"""The CUDA C++ kernels in `csrc/cuda/`, through their plain C interface (`csrc/cuda/contrast.h`) and ctypes.

A call takes the device's current stream, neither synchronises nor reads a temperature on the host, and allocates
only PyTorch's memory: a CUDA graph may capture it. What it takes is in `hdc_kernels/selection.py`.
"""

import ctypes
import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Function, Gradients, Problems, Terms, plain
from hdc_kernels.backends.outputs import LSE_DTYPE, empty_gradients, empty_rows, with_means

__all__ = ["LSE_DTYPE", "backward", "forward", "is_available", "runs_on", "step"]

LIBRARY = Path(__file__).parent / "libhdc_cuda.so"

_FORWARD, _BACKWARD, _STEP = range(3)
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_TF32 = 1  # in place of float32's 0
_FUNCTIONS: dict[Function, int] = {"info_nce": 0, "logsumexp": 1}
_CALL = struct.Struct("9qd9P")  # struct HdcCudaCall
_PROBLEM = struct.Struct("Pqq" * 4 + "4qd2P")  # struct HdcCudaProblem


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library. Raises OSError where it was not built, or from other sources than this file's."""
    return load(LIBRARY)


def load(path: Path) -> ctypes.CDLL:
    """A library with the interface of `csrc/cuda/contrast.h`, as it is there today; raises OSError otherwise."""
    loaded = ctypes.CDLL(str(path))
    loaded.hdc_cuda_interface_size.restype = ctypes.c_int64
    if loaded.hdc_cuda_interface_size() != _CALL.size + _PROBLEM.size:
        raise OSError(f"{path} was built for another version; install this package again")
    loaded.hdc_cuda_workspace.restype = ctypes.c_int64
    loaded.hdc_cuda_error.restype = ctypes.c_char_p
    return loaded


@functools.cache
def is_available() -> bool:
    """Whether the library was built and loads; it does so without a GPU, too."""
    try:
        library()
    except OSError:
        return False
    return True


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the library holds code for devices of this compute capability."""
    major, minor = capability
    return bool(library().hdc_cuda_runs_on(10 * major + minor))


def forward(problems: Problems) -> Terms:
    """See `hdc_kernels.backends`; raises RuntimeError with CUDA's own words if a launch fails."""
    problems = _readable(problems)
    terms = _empty_terms(problems)
    _call(_FORWARD, problems, terms, None, None)
    return with_means(terms, problems)


def backward(problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients:
    """See `hdc_kernels.backends`; raises RuntimeError with CUDA's own words if a launch fails."""
    given, problems = problems, _readable(problems)
    gradients = _empty_gradients(problems)
    terms = Terms(lse, lse, lse, lse)  # only lse is read
    _call(_BACKWARD, problems, terms, gradients, upstream.contiguous())
    return gradients.ungrouped(given)


def step(problems: Problems) -> tuple[Terms, Gradients]:
    """See `hdc_kernels.backends`; raises RuntimeError with CUDA's own words if a launch fails."""
    given, problems = problems, _readable(problems)
    terms = _empty_terms(problems)
    gradients = _empty_gradients(problems, terms.loss.dtype)
    _call(_STEP, problems, terms, gradients, None)
    return with_means(terms, problems), gradients.ungrouped(given)


def _readable(problems: Problems) -> Problems:
    """Rows without gaps, and a temperature that the device reads by itself."""
    problems = problems.grouped()
    x, y = (
        tuple(t if t.stride(2) == 1 else t.contiguous() for t in tensors)
        for tensors in (problems.x, problems.y)
    )
    temperature = problems.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(x[0].device, torch.float32)
    mask = problems.mask
    if mask.ids is not None:
        mask = mask._replace(ids=(mask.ids[0].contiguous(), mask.ids[1].contiguous()))
    return problems._replace(x=x, y=y, temperature=temperature, mask=mask)


def _empty_terms(problems: Problems) -> Terms:
    rows = empty_rows(problems)
    # Counted apart: in a pass over the columns, a positive that comes late would have to be known early.
    ranks = plain.ranks(problems) if problems.ranked else None
    return Terms(rows.loss.new_empty(()), *rows, ranks)


def _empty_gradients(problems: Problems, dtype: torch.dtype | None = None) -> Gradients:
    x = problems.x[0]
    return Gradients(
        x=empty_gradients(problems.x, dtype),
        y=empty_gradients(problems.y, dtype) if problems.needs_y else (),
        temperature=x.new_empty((), dtype=reference.compute_dtype(x.dtype)),
    )


def _dtype(dtype: torch.dtype) -> int:
    """PyTorch's own switch: below "highest", float32 products may round their factors to TF32."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return _DTYPES[dtype] if exact else _TF32


@contextmanager
def _on(device: torch.device) -> Iterator[tuple[int, int]]:
    """The device's index and current stream, while it is the current device."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _call(
    task: int,
    problems: Problems,
    terms: Terms,
    gradients: Gradients | None,
    upstream: Tensor | None,
) -> None:
    nowhere = (None,) * len(problems.x)
    dx = nowhere if gradients is None else gradients.x
    dy = nowhere if gradients is None or not gradients.y else gradients.y
    mask, temperature, device = problems.mask, problems.temperature, problems.x[0].device
    ids = (0, 0) if mask.ids is None else tuple(t.data_ptr() for t in mask.ids)
    packed = bytearray()
    for x, y, x_gradient, y_gradient, weight in zip(
        problems.x, problems.y, dx, dy, problems.weights, strict=True
    ):
        matrices = (*_matrix(x), *_matrix(y), *_matrix(x_gradient), *_matrix(y_gradient))
        packed += _PROBLEM.pack(*matrices, *x.shape[:2], *y.shape[1:], weight, *ids)
    learned = isinstance(temperature, Tensor)
    with _on(device) as (index, stream):
        arguments = (
            task,
            _dtype(problems.x[0].dtype),
            _FUNCTIONS[problems.function],
            problems.normalize,
            problems.symmetric,
            len(problems.x),
            mask.diagonal,
            mask.same,
            index,
            0.0 if learned else float(temperature),
            temperature.data_ptr() if isinstance(temperature, Tensor) else 0,
            terms.total.data_ptr(),
            terms.loss.data_ptr(),
            terms.hits.data_ptr(),
            terms.lse.data_ptr(),
            0 if upstream is None else upstream.data_ptr(),
            0 if gradients is None else gradients.temperature.data_ptr(),
        )
        pairs = bytes(packed)
        size = library().hdc_cuda_workspace(_CALL.pack(*arguments, 0, stream), pairs)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        call = _CALL.pack(*arguments, workspace.data_ptr(), stream)
        error = library().hdc_cuda_contrast(call, pairs)
    if error:
        raise RuntimeError(
            f"CUDA did not launch the contrastive loss: {library().hdc_cuda_error(error).decode()}"
        )
