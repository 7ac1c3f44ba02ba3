"""The C++ kernels in `csrc/`, through their plain C interface (`csrc/contrast.h`) and ctypes.

A call costs a few microseconds beyond the kernel: the arguments travel as two packed byte strings.
"""

import ctypes
import functools
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Function, Gradients, Problems, Terms, rounding
from hdc_kernels.backends.outputs import LSE_DTYPE, NO_ROWS, empty_gradients, empty_rows

__all__ = ["LSE_DTYPE", "backward", "forward", "is_available", "step"]

LIBRARY = Path(__file__).parent / "libhdc_cpu.so"

_FORWARD, _BACKWARD, _STEP = range(3)
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_FUNCTIONS: dict[Function, int] = {"info_nce": 0, "logsumexp": 1, "softplus": 2, "tilted": 3}
# A thread's least share, in multiply-adds of one product of matrices: 64 queries and keys in 128 dimensions. With two
# threads on two cores, 96 take 61 µs in place of 71, but 64 take 45 in place of 37.
LEAST_SHARE = 2**19
_CALL = struct.Struct("10q2d10P")  # struct HdcCall
_PROBLEM = struct.Struct("P3qP3qP3qP3q4qd4P")  # struct HdcProblem


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library. Raises OSError where it was not built, or from other sources than this file's."""
    loaded = ctypes.CDLL(str(LIBRARY))
    size = getattr(loaded, "hdc_interface_size", lambda: 0)()
    if size != _CALL.size + _PROBLEM.size:
        raise OSError(f"{LIBRARY} was built for another version; install this package again")
    loaded.hdc_instruction_set.restype = ctypes.c_char_p
    return loaded


@functools.cache
def is_available() -> bool:
    """Whether the library was built and loads."""
    try:
        library()
    except OSError:
        return False
    return True


def forward(problems: Problems) -> Terms:
    """See `hdc_kernels.backends`; raises MemoryError if the scratch does not fit."""
    terms = _empty_terms(problems)
    _call(_FORWARD, problems, terms, None, None)
    return terms


def backward(problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients:
    """See `hdc_kernels.backends`; raises MemoryError if the scratch does not fit."""
    gradients = _empty_gradients(problems)
    terms = Terms(lse, lse, lse, lse)  # only lse is read
    _call(_BACKWARD, problems, terms, gradients, upstream.contiguous().resolve_neg())
    return gradients


def step(problems: Problems) -> tuple[Terms, Gradients]:
    """See `hdc_kernels.backends`; raises MemoryError if the scratch does not fit."""
    terms = _empty_terms(problems)
    gradients = _empty_gradients(problems, terms.total.dtype)
    _call(_STEP, problems, terms, gradients, None)
    return terms, gradients


def _rounds_to_bfloat16(dtype: torch.dtype) -> bool:
    return (
        dtype in (torch.float32, torch.bfloat16)
        and multiplies_bfloat16()
        and rounding.to_bfloat16()
    )


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU and the library's code for it can."""
    return bool(library().hdc_has_bfloat16())


def _empty_terms(problems: Problems) -> Terms:
    total = _empty_scalar(problems)
    if problems.detail == "total":
        return Terms(total, *NO_ROWS)
    rows = empty_rows(problems)
    ranks = rows.hits.new_empty(len(rows.hits), dtype=torch.int64) if problems.ranked else None
    means = total.new_empty(2, len(problems.x)) if problems.detail == "means" else None
    return Terms(total, *rows, ranks, means)


def _empty_scalar(problems: Problems) -> Tensor:
    # Whatever the default device is.
    return torch.empty((), dtype=reference.compute_dtype(problems.x[0].dtype), device="cpu")


def _empty_gradients(problems: Problems, dtype: torch.dtype | None = None) -> Gradients:
    return Gradients(
        empty_gradients(problems.x, dtype),
        empty_gradients(problems.y, dtype) if problems.needs_y else (),
        _empty_scalar(problems),
        None if problems.bias is None else torch.empty_like(problems.bias),
    )


def _by_row(entries: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sorted (row, column) [2, E] -> where each row begins [rows + 1], and the columns."""
    starts = torch.searchsorted(
        entries[0].contiguous(), torch.arange(rows + 1, device=entries.device)
    )
    return starts, entries[1].contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None, rows_first: bool) -> tuple[int, ...]:
    """Its address and strides as [G, rows, D]."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    if len(strides) == 2:
        return tensor.data_ptr(), 0, *strides
    if rows_first:
        strides = strides[1], strides[0], strides[2]
    return tensor.data_ptr(), *strides


def _sizes(x: Tensor, y: Tensor, rows_first: bool) -> tuple[int, int, int, int]:
    """G, M, N and D."""
    if x.dim() == 2:
        return 1, len(x), *y.shape
    groups, rows, _ = x.transpose(0, 1).shape if rows_first else x.shape
    return groups, rows, y.shape[0 if rows_first else 1], y.shape[2]


def _call(
    task: int,
    problems: Problems,
    terms: Terms,
    gradients: Gradients | None,
    upstream: Tensor | None,
) -> None:
    # What may be copies is held until the call is over.
    problems = problems.resolved()
    mask, dtype = problems.mask, problems.x[0].dtype
    ids = [t.contiguous() for t in mask.ids] if mask.ids else []
    left_out = _by_row(mask.left_out, problems.rows[0]) if mask.left_out is not None else []
    nowhere = (None,) * len(problems.x)
    dx, dy = (gradients.x, gradients.y or nowhere) if gradients else (nowhere, nowhere)
    packed: list[bytes] = []
    products = 0
    for x, y, to_x, to_y, weight in zip(
        problems.x, problems.y, dx, dy, problems.weights, strict=True
    ):
        rows_first = len(packed) < problems.rows_first
        sizes = _sizes(x, y, rows_first)
        products += math.prod(sizes)
        packed.append(
            _PROBLEM.pack(
                *_matrix(x, rows_first),
                *_matrix(y, rows_first),
                *_matrix(to_x, rows_first),
                *_matrix(to_y, rows_first),
                *sizes,
                weight,
                *([t.data_ptr() for t in ids] or (0, 0)),
                *([t.data_ptr() for t in left_out] or (0, 0)),
            )
        )
    call = _CALL.pack(
        task,
        _DTYPES[dtype],
        problems.normalize,
        problems.symmetric,
        min(torch.get_num_threads(), max(1, products // LEAST_SHARE)),
        len(problems.x),
        _rounds_to_bfloat16(dtype),
        _FUNCTIONS[problems.function],
        mask.diagonal,
        mask.same,
        float(problems.temperature),
        problems.beta,
        terms.total.data_ptr(),
        _address(terms.means),
        terms.loss.data_ptr(),
        terms.hits.data_ptr(),
        _address(terms.ranks),
        terms.lse.data_ptr(),
        _address(upstream),
        _address(gradients.temperature) if gradients else 0,
        _address(problems.bias),
        _address(gradients.bias) if gradients else 0,
    )
    if library().hdc_contrast(call, b"".join(packed)):
        raise MemoryError("the contrastive loss found not enough memory for its scratch")
