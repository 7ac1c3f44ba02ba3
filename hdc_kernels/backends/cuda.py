"""The CUDA C++ kernels in `csrc/cuda/`, through their plain C interface (`csrc/cuda/contrast.h`) and ctypes.

A call takes the device's current stream, neither synchronises nor reads a temperature on the host, and allocates
only PyTorch's memory: a CUDA graph may capture it. What it takes is in `hdc_kernels/selection.py`.

What fits into one launch (`csrc/cuda/small.cu`) allocates nothing beside its results, and those by row only where they
are asked for. Results are tensors of their own and no views of one: autograd forbids `loss /= 2` where the loss is a
view, and an operator's outputs may share no memory. What blocks leave for the last of them lies behind the total, in
its allocation.
"""

import ctypes
import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hdc_kernels.backends import Function, Gradients, Problems, Terms, plain, rounding
from hdc_kernels.backends.outputs import LSE_DTYPE, NO_ROWS, empty_gradients, empty_rows, with_means
from hdc_kernels.backends.tickets import ticket

__all__ = ["LSE_DTYPE", "backward", "forward", "is_available", "runs_on", "step"]

LIBRARY = Path(__file__).parent / "libhdc_cuda.so"

_FORWARD, _BACKWARD, _STEP = range(3)
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_TF32 = 1  # in place of float32's 0
_RESULT = torch.float32  # of everything but hits, lse and what BACKWARD makes of embeddings
_FUNCTIONS: dict[Function, int] = {"info_nce": 0, "logsumexp": 1}
_CALL = struct.Struct("9qd11P")  # struct HdcCudaCall
_PROBLEM = struct.Struct("Pqq" * 4 + "4qd2P")  # struct HdcCudaProblem
_ALIGNMENT = 256  # bytes, of a workspace


class _Needs(ctypes.Structure):  # struct HdcCudaNeeds
    _fields_ = (("workspace", ctypes.c_int64), ("one_launch", ctypes.c_int64))


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
    loaded.hdc_cuda_needs.restype = _Needs
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
    with _on(problems.x[0].device) as place:
        call = _Call(_FORWARD, problems, (), (), place)
        terms = call.empty_terms()
        call.launch(terms)
    return with_means(terms, problems)


def backward(problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients:
    """See `hdc_kernels.backends`; raises RuntimeError with CUDA's own words if a launch fails."""
    given, problems, upstream = problems, _readable(problems), upstream.contiguous()
    x, y = _empty_slopes(problems)
    with _on(problems.x[0].device) as place:
        call = _Call(_BACKWARD, problems, x, y, place)
        temperature = call.empty_scalar()
        # There is no total, and of the terms only lse is read.
        call.launch(Terms(temperature, lse, lse, lse), temperature, upstream)
    return Gradients(x, y, temperature).ungrouped(given)


def step(problems: Problems) -> tuple[Terms, Gradients]:
    """See `hdc_kernels.backends`; raises RuntimeError with CUDA's own words if a launch fails."""
    given, problems = problems, _readable(problems)
    x, y = _empty_slopes(problems, _RESULT)
    with _on(problems.x[0].device) as place:
        call = _Call(_STEP, problems, x, y, place)
        terms = call.empty_terms()
        temperature = torch.empty_like(terms.total)
        call.launch(terms, temperature)
    return with_means(terms, problems), Gradients(x, y, temperature).ungrouped(given)


def _readable(problems: Problems) -> Problems:
    """Rows without gaps, and a temperature that the device reads by itself."""
    problems = problems.resolved().grouped()
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


def _empty_slopes(
    problems: Problems, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Room for the gradients of x and of y, where they are needed."""
    y = empty_gradients(problems.y, dtype) if problems.needs_y else ()
    return empty_gradients(problems.x, dtype), y


def _dtype(dtype: torch.dtype) -> int:
    return _TF32 if dtype == torch.float32 and rounding.to_tf32() else _DTYPES[dtype]


@contextmanager
def _on(device: torch.device) -> Iterator[tuple[int, int]]:
    """The device's index and current stream, while it is the current device."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _Call:
    """A call of the library, until it is launched; `place` is what `_on` gives."""

    def __init__(
        self,
        task: int,
        problems: Problems,
        dx: tuple[Tensor, ...],
        dy: tuple[Tensor, ...],
        place: tuple[int, int],
    ) -> None:
        nowhere = (None,) * len(problems.x)
        mask, temperature = problems.mask, problems.temperature
        ids = (0, 0) if mask.ids is None else tuple(t.data_ptr() for t in mask.ids)
        packed = bytearray()
        for x, y, to_x, to_y, weight in zip(
            problems.x, problems.y, dx or nowhere, dy or nowhere, problems.weights, strict=True
        ):
            matrices = (*_matrix(x), *_matrix(y), *_matrix(to_x), *_matrix(to_y))
            packed += _PROBLEM.pack(*matrices, *x.shape[:2], *y.shape[1:], weight, *ids)
        learned = isinstance(temperature, Tensor)
        index, self._stream = place
        self._problems, self._pairs, self._device = problems, bytes(packed), problems.x[0].device
        self._given = (
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
        )
        self._needs = library().hdc_cuda_needs(
            _CALL.pack(*self._given, *(0,) * 9, self._stream), self._pairs
        )

    def empty_scalar(self) -> Tensor:
        """Room for one number; in one launch, behind it in the same allocation, for the workspace."""
        if not self._needs.one_launch:
            return torch.empty((), dtype=_RESULT, device=self._device)
        size = (_ALIGNMENT + self._needs.workspace) // _RESULT.itemsize
        return torch.empty(size, dtype=_RESULT, device=self._device).resize_(())  # frees nothing

    def empty_terms(self) -> Terms:
        """Room for what will be launched, and the ranks."""
        problems, together = self._problems, self._needs.one_launch
        rows = NO_ROWS if together and problems.detail != "rows" else empty_rows(problems)
        # Counted apart: in a pass over the columns, a positive that comes late would have to be known early.
        ranks = plain.ranks(problems) if problems.ranked else None
        total = self.empty_scalar()
        means = None
        if together and problems.detail == "means":
            means = total.new_empty((2, len(problems.x)))
        return Terms(total, *rows, ranks, means)

    def launch(
        self, terms: Terms, temperature: Tensor | None = None, upstream: Tensor | None = None
    ) -> None:
        """Into `terms`, whose total is an `empty_scalar`, and the temperature's gradient."""
        if self._needs.one_launch:
            counter = ticket(self._device)
            memory = counter.data_ptr(), terms.total.data_ptr() + _ALIGNMENT
        else:
            room = torch.empty(self._needs.workspace, dtype=torch.uint8, device=self._device)
            memory = 0, room.data_ptr()
        results = (terms.total, terms.means, terms.loss, terms.hits, terms.lse)
        call = _CALL.pack(
            *self._given,
            *map(_address, (*results, upstream, temperature)),
            *memory,
            self._stream,
        )
        error = library().hdc_cuda_contrast(call, self._pairs)
        if error:
            raise RuntimeError(
                f"CUDA did not launch the contrastive loss: {library().hdc_cuda_error(error).decode()}"
            )
