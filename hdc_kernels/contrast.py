"""The one quadratic operation that every loss is made of.

What it computes is said in `hdc_kernels/backends/__init__.py`; here a call finds its way: plain PyTorch as
it is, `autograd.py` in eager mode and under torch.func, `operators.py` while compiling or
tracing. Forward mode and compiled
transforms have nothing but plain PyTorch. Inputs keep their dtypes under autocast: whatever comes in, the kernels
accumulate in float32 or wider.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from hdc_kernels import autograd, operators, reference
from hdc_kernels.backends import EVERYTHING, Detail, Function, Mask, plain
from hdc_kernels.backends.outputs import means_of
from hdc_kernels.call import Call, in_forward_mode, in_transform
from hdc_kernels.selection import PLAIN, implementation, select

Pair = tuple[Tensor, Tensor]

# `make_fx` and `FakeTensorMode`. A mode that only watches, a counter of flop say, is none of them.
TRACERS = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


class Contrast(NamedTuple):
    """`value` has gradients: Σ_k weights[k] · Σ terms_k / divisor, or without weights the terms. The rest has none.

    All are flat, [T], pair after pair, but for the total, which has no dimension, and the means.
    """

    value: Tensor
    terms: Tensor
    hits: Tensor
    ranks: Tensor | None = None  # unless `ranked`
    means: Tensor | None = None  # see `Terms`; unless `detail` is "means"


def contrast(
    pairs: Sequence[Pair],
    *,
    weights: Sequence[float] | None,
    divisor: int = 1,
    temperature: float | Tensor,
    symmetric: bool = False,
    normalize: bool = True,
    rows_first: int = 0,
    function: Function = "info_nce",
    mask: Mask = EVERYTHING,
    bias: Tensor | None = None,
    ranked: bool = False,
    beta: float = 1.0,
    detail: Detail = "rows",
    backend: str = "auto",
) -> Contrast:
    """The term of every row of every pair: x [(G,) M, D] with y [(G,) N, D]; see `Problems`.

    With `weights`, one per pair, the value is the weighted total and its gradients are made on the way, so
    that the backward pass costs next to nothing. Without, it is the terms, and any upstream gradient will do.
    The first `rows_first` pairs are [M, G, D] and [N, G, D] instead, batches of timesteps for example.
    What depends on the batch size goes into `divisor`: a compiled graph then serves every batch size.
    Unless `detail` is "rows", terms and hits of a total may be empty.
    No rows at all, as a rank may have among others, have no terms, whose gradients are 0.
    """
    x, y = zip(*pairs, strict=True)
    tau = temperature if isinstance(temperature, Tensor) else None
    if not any(t.numel() for t in x):
        nothing = _no_terms(*x, *y, tau, bias)
        value = nothing if weights is None else nothing.sum()
        ranks, means = nothing.long() if ranked else None, nothing.new_full((2, len(x)), torch.nan)
        return Contrast(value, nothing.detach(), nothing.bool(), ranks, means)
    if mask is not EVERYTHING:
        _check_mask(mask, x, y)
    traced = torch.compiler.is_compiling() or _intercepted(x[0])
    call = Call(
        select(
            backend, x, y, rows_first, function=function, single_entries=mask.left_out is not None
        ),
        None if weights is None else tuple([w if traced else w / divisor for w in weights]),
        0.0 if isinstance(temperature, Tensor) else float(temperature),
        symmetric,
        normalize,
        len(pairs),
        rows_first,
        function,
        mask,
        ranked=ranked,
        beta=beta,
        detail="rows" if ranked or weights is None else detail,
    )
    if traced:
        found = _in_operators(call, tau, bias, x, y)
        return found if weights is None else found._replace(value=found.value / divisor)
    if call.backend in PLAIN or in_forward_mode():
        return _plain(call, tau, bias, x, y)
    # Under torch.func, what has no gradient here may have one further out, and no kernel can read it as it is.
    if torch._C._are_functorch_transforms_active() or _differentiable(tau, bias, x, y):
        return Contrast(*autograd.value(call, tau, bias, (*x, *y)))
    result = implementation(call.backend).forward(call.problems(tau, bias, x, y))
    value = result.loss if weights is None else result.total
    return Contrast(value, *result[1:3], *result[4:])


def _check_mask(mask: Mask, x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> None:
    """Kernels read the tensors of a mask as they are: these must be what `Mask` says."""
    for tensor in (*(mask.ids or ()), *(() if mask.left_out is None else (mask.left_out,))):
        if tensor.dtype != torch.int64:
            raise TypeError(f"a mask holds {tensor.dtype}; its ids and entries must be int64")
    if mask.ids is not None:
        for ids, side in zip(mask.ids, (x[0], y[0]), strict=True):
            expected = side.shape[:-1] if side.dim() == 3 else (1, *side.shape[:-1])
            if ids.shape != expected:
                raise ValueError(f"a mask's ids have shape {ids.shape}; it must be {expected}")


def _no_terms(*tensors: Tensor | None) -> Tensor:
    """[0], with a gradient of 0 for each tensor."""
    empty = [t.flatten()[:0] for t in tensors if t is not None]
    dtype = reference.compute_dtype(empty[0].dtype)
    return torch.stack([t.to(dtype) for t in empty]).sum(0)


def _plain(
    call: Call,
    tau: Tensor | None,
    bias: Tensor | None,
    x: tuple[Tensor, ...],
    y: tuple[Tensor, ...],
) -> Contrast:
    value, terms, hits = call.plain(tau, bias, x, y)
    terms, problems = terms.detach(), call.problems(tau, bias, x, y)
    means = means_of(terms, hits, problems.rows) if call.detail == "means" else None
    return Contrast(value, terms, hits, plain.ranks(problems) if call.ranked else None, means)


def _in_operators(
    call: Call,
    tau: Tensor | None,
    bias: Tensor | None,
    x: tuple[Tensor, ...],
    y: tuple[Tensor, ...],
) -> Contrast:
    """In operators that the compiler and tracers know, but for the divisor."""
    if call.backend in PLAIN or in_transform():
        return _plain(call, tau, bias, x, y)
    tensors = operators.inputs_of(call, tau, bias, x, y)
    options = operators.options_of(call)
    if call.weights is not None and _differentiable(tau, bias, x, y):
        total, means, terms, hits, ranks, _ = operators.contrast_total(
            *tensors, call.weights, call.detail, *options
        )
        return Contrast(total, terms, hits, ranks if call.ranked else None, means)
    value, hits, ranks, _ = operators.contrast_terms(*tensors, *options)
    terms, problems = value.detach(), call.problems(tau, bias, x, y)
    means = means_of(terms, hits, problems.rows) if call.detail == "means" else None
    value = value if call.weights is None else plain.total(problems, value)
    return Contrast(value, terms, hits, ranks if call.ranked else None, means)


def _intercepted(x: Tensor) -> bool:
    """Whether operators are recorded, or tensors have no memory that a kernel could read."""
    return type(x) not in (Tensor, Parameter) or any(map(torch._C._get_dispatch_mode, TRACERS))


def _differentiable(
    tau: Tensor | None, bias: Tensor | None, x: tuple[Tensor, ...], y: tuple[Tensor, ...]
) -> bool:
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (tau, bias, *x, *y)
    )
