"""The Triton backend: GPUs, and CPU tensors under Triton's interpreter.

Small problems are for `small`, one launch for all of them; others for `general`, a handful of launches for
every run of pairs of the same shape. No launch synchronises, reads a temperature on the host or adds numbers
atomically: results are the same bit by bit from run to run, and a CUDA graph may capture them.

Launches of a loss with one run of pairs, as `tests/test_launches.py` counts them:

    `small`      sum or mean      forward 1    backward 1
                 a term per row           1             1
    `general`    sum or mean              8             1
                 a term per row           4             6

Means of every pair, as HD-NCE's metrics are, come with `small`'s one launch. Where the forward pass has made the
gradients, all of the backward pass is their product with the upstream gradient, by `scale` where they are rounded to
16 bits, by PyTorch where they are not. PyTorch's is also `general`'s sum over what programs leave, two where it makes
gradients.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hdc_kernels.backends import Gradients, Problems, Terms, plain
from hdc_kernels.backends.outputs import (
    LSE_DTYPE,
    NO_ROWS,
    empty_gradients,
    empty_rows,
    with_means,
)
from hdc_kernels.backends.triton import general, small, tilted
from hdc_kernels.backends.triton.arithmetic import INTERPRET

__all__ = ["LSE_DTYPE", "backward", "forward", "step"]

DTYPES = torch.float32, torch.bfloat16, torch.float16


def forward(problems: Problems) -> Terms:
    """The terms of every row."""
    if problems.function == "tilted":
        return tilted.forward(problems, forward)
    return _launch(_readable(problems), None, None, None)[0]


def backward(problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients:
    """Gradients of Σ upstream · terms."""
    return _backward(problems, lse, upstream, problems.x[0].dtype)


def _backward(problems: Problems, lse: Tensor, upstream: Tensor, dtype: torch.dtype) -> Gradients:
    if problems.function == "tilted":
        return tilted.backward(problems, lse, upstream, _backward, dtype)
    given, problems = problems, _readable(problems)
    dx, dy = (empty_gradients(tensors, dtype) for tensors in (problems.x, problems.y))
    d_bias = _empty_bias(problems)
    rows, upstream = empty_rows(problems)._replace(lse=lse), upstream.contiguous()
    with _on(problems):
        if small.fits(problems):
            _, d_temperature, _ = small.contrast(problems, rows, upstream, dx, dy)
        else:
            _, d_temperature = general.contrast(problems, rows, upstream, dx, dy, d_bias)
    return Gradients(dx, dy, d_temperature, d_bias).ungrouped(given)


def step(problems: Problems) -> tuple[Terms, Gradients]:
    """Terms, and the gradients of their total, in float32."""
    if problems.function == "tilted":
        terms = forward(problems)
        weights = [
            terms.loss.new_full((rows,), weight)
            for rows, weight in zip(problems.rows, problems.weights, strict=True)
        ]
        return terms, _backward(problems, terms.lse, torch.cat(weights), terms.loss.dtype)
    given, problems = problems, _readable(problems)
    dx, dy = (empty_gradients(tensors, torch.float32) for tensors in (problems.x, problems.y))
    d_bias = _empty_bias(problems)
    terms, d_temperature = _launch(problems, dx, dy, d_bias)
    return terms, Gradients(dx, dy, d_temperature, d_bias).ungrouped(given)


def _ranks(problems: Problems) -> Tensor | None:
    """Counted apart: in a pass over the columns, a positive that comes late would have to be known early."""
    return plain.ranks(problems) if problems.ranked else None


def _empty_bias(problems: Problems) -> Tensor | None:
    return None if problems.bias is None else torch.empty_like(problems.bias)


def _readable(problems: Problems) -> Problems:
    """Refuse what no kernel reads; lay out in memory what kernels read without strides."""
    dtype, device = problems.x[0].dtype, problems.x[0].device
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"backend 'triton' computes in float32, bfloat16 and float16, not {name}; "
            "use backend='torch' or 'auto'"
        )
    if device.type != "cuda" and not INTERPRET.value:
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, not on {device}; use backend='auto', or set "
            "TRITON_INTERPRET=1 before the first import to run its interpreter"
        )
    problems = problems.resolved().grouped()
    x, y = (
        tuple(t if t.stride(2) == 1 else t.contiguous() for t in tensors)
        for tensors in (problems.x, problems.y)
    )
    mask, bias = problems.mask, problems.bias
    if mask.ids is not None:
        mask = mask._replace(ids=(mask.ids[0].contiguous(), mask.ids[1].contiguous()))
    return problems._replace(
        x=x,
        y=y,
        weights=tuple(map(float, problems.weights)),
        mask=mask,
        bias=None if bias is None else bias.contiguous(),
    )


def _launch(
    problems: Problems,
    dx: tuple[Tensor, ...] | None,
    dy: tuple[Tensor, ...] | None,
    d_bias: Tensor | None,
) -> tuple[Terms, Tensor]:
    """The terms and, with dx and dy, which are filled in, the temperature's gradient."""
    with _on(problems):
        if small.fits(problems):
            rows = empty_rows(problems) if problems.detail == "rows" else None
            total, d_temperature, means = small.contrast(problems, rows, None, dx, dy)
            return Terms(total, *(rows or NO_ROWS), _ranks(problems), means), d_temperature
        rows = empty_rows(problems)
        total, d_temperature = general.contrast(problems, rows, None, dx, dy, d_bias)
        return with_means(Terms(total, *rows, _ranks(problems)), problems), d_temperature


def _on(problems: Problems) -> AbstractContextManager[object]:
    """While their device is the current one, Triton launches on it."""
    device = problems.x[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
