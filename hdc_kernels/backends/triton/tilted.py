"""The tilted mean as two logsumexps, at τ/(1 + β) and τ/β: two passes, where the C++ kernels need one."""

from collections.abc import Callable

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Gradients, Problems, Terms, plain


def forward(problems: Problems, logsumexp: Callable[[Problems], Terms]) -> Terms:
    """Terms out of those that `logsumexp` makes."""
    of_sharp, of_broad = _parts(problems)
    sharp, broad = logsumexp(of_sharp), logsumexp(of_broad._replace(ranked=False))
    # In float64: logsumexps are large at a small temperature, and their difference is not.
    difference = (sharp.lse - broad.lse).masked_fill(sharp.lse == -torch.inf, -torch.inf)
    loss = difference[0].to(sharp.loss.dtype)
    lse = torch.cat((sharp.lse, broad.lse))
    return Terms(plain.total(problems, loss), loss, sharp.hits, lse, sharp.ranks)


def backward(
    problems: Problems,
    lse: Tensor,
    upstream: Tensor,
    logsumexp: Callable[[Problems, Tensor, Tensor, torch.dtype], Gradients],
    dtype: torch.dtype,
) -> Gradients:
    """Gradients in `dtype` out of those that `logsumexp` makes, in the dtype that it is told."""
    exact = reference.compute_dtype(problems.x[0].dtype)
    sharp, broad = _parts(problems)
    a = logsumexp(sharp, lse[:1].contiguous(), upstream, exact)
    b = logsumexp(broad, lse[1:].contiguous(), -upstream, exact)
    return Gradients(
        tuple((p + q).to(dtype) for p, q in zip(a.x, b.x, strict=True)),
        tuple((p + q).to(dtype) for p, q in zip(a.y, b.y, strict=True)),
        a.temperature / (1 + problems.beta) + b.temperature / problems.beta,
    )


def _parts(problems: Problems) -> tuple[Problems, Problems]:
    tau, beta = problems.temperature, problems.beta
    if isinstance(tau, Tensor):  # before it is divided, in 16 bits perhaps
        tau = tau.to(reference.compute_dtype(problems.x[0].dtype))
    both = problems._replace(function="logsumexp")
    return both._replace(temperature=tau / (1 + beta)), both._replace(temperature=tau / beta)
