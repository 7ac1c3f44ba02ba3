"""What the tests of GPU backends share: problems with masks, float64 truth, and the error that plain PyTorch makes.

All of it is on the GPU, if there is one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hdc_kernels.backends import Implementation, Mask, Problems
from hdc_kernels.backends.plain import terms as specification

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class Result(NamedTuple):
    loss: Tensor
    total: Tensor
    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    temperature: Tensor
    bias: Tensor | None


def make(
    shapes, dtype=torch.float32, *, temperature=0.07, normalize=True, symmetric=False, noise=None
) -> Problems:
    """Random pairs of shapes (G, M, N, D); with `noise`, a query's key is the query and so much noise."""
    generator = torch.Generator().manual_seed(0)
    xs, ys = [], []
    for G, M, N, D in shapes:
        x = torch.randn(G, M, D, generator=generator)
        y = torch.randn(G, N, D, generator=generator)
        if noise is not None:
            y[:, :M] = x + noise * y[:, :M]
        scale = 1.0 if normalize else D**-0.5
        xs.append((x * scale).to(DEVICE, dtype))
        ys.append((y * scale).to(DEVICE, dtype))
    weights = tuple(0.5 + k for k in range(len(shapes)))
    return Problems(tuple(xs), tuple(ys), weights, temperature, normalize, symmetric)


def make_masked(
    shape, function, mask, dtype=torch.float32, *, temperature=0.07, normalize=True, symmetric=False
) -> Problems:
    """One pair, as `make`; the mask by name: "everything", "off" the diagonal, "ids", "same" and "off ids"."""
    G, M, N, _ = shape
    problems = make(
        [shape], dtype, temperature=temperature, normalize=normalize, symmetric=symmetric
    )
    generator = torch.Generator().manual_seed(2)
    # The lower halves are equal: ids are compared in all of their 64 bits.
    ids = tuple(
        (torch.randint(-2, 2, (G, rows), generator=generator) << 32).to(DEVICE) for rows in (M, N)
    )
    bias = 2 * torch.randn(G * M, generator=generator).to(DEVICE) - 2
    return problems._replace(
        function=function,
        mask=Mask(
            "off" not in mask, ids if mask in ("ids", "same", "off ids") else None, mask == "same"
        ),
        bias=bias if function == "softplus" else None,
    )


def differentiate(
    problems: Problems, dtype, upstream: Tensor | None, terms_of: Callable[[Problems], Tensor]
) -> Result:
    """Autograd through `terms_of` in `dtype`."""

    def leaf(t):
        return t.detach().to(DEVICE, dtype).requires_grad_()

    bias = None if problems.bias is None else leaf(problems.bias)
    inputs = problems._replace(
        x=tuple(map(leaf, problems.x)),
        y=tuple(map(leaf, problems.y)),
        temperature=leaf(torch.tensor(float(problems.temperature))),
        bias=bias,
    )
    loss = terms_of(inputs)
    parts = loss.split([x.shape[0] * x.shape[1] for x in inputs.x])
    total = sum(weight * part.sum() for weight, part in zip(inputs.weights, parts, strict=True))
    (total if upstream is None else (upstream.to(dtype) * loss).sum()).backward()
    return Result(
        loss.detach(),
        total.detach(),
        tuple(x.grad for x in inputs.x),
        tuple(y.grad for y in inputs.y),
        inputs.temperature.grad,
        None if bias is None else bias.grad,
    )


def exact(problems: Problems, upstream: Tensor | None = None) -> Result:
    """The specification in float64."""
    return differentiate(problems, torch.float64, upstream, lambda inputs: specification(inputs)[0])


def plain(problems: Problems, upstream: Tensor | None = None) -> Result:
    """What one writes without this library, in the embeddings' own dtype."""

    def terms(inputs):
        sizes = [x.shape[0] * x.shape[1] for x in inputs.x]
        biases = [None] * len(sizes) if inputs.bias is None else inputs.bias.split(sizes)
        pairs = zip(inputs.x, inputs.y, biases, strict=True)
        return torch.cat([plain_terms(x, y, bias, inputs).flatten() for x, y, bias in pairs])

    return differentiate(problems, problems.x[0].dtype, upstream, terms)


def plain_terms(x: Tensor, y: Tensor, bias: Tensor | None, problems: Problems) -> Tensor:
    if problems.normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    logits = (x @ y.mT / problems.temperature).masked_fill(left_out(problems), -math.inf)
    if problems.function == "softplus":
        shifted = logits + bias.view(*x.shape[:2], 1)
        return torch.logaddexp(shifted, shifted.new_zeros(())).sum(-1)
    if problems.function == "tilted":
        sharp, broad = (plain_logsumexp(f * logits) for f in (1 + problems.beta, problems.beta))
        return (sharp - broad).masked_fill(sharp == -math.inf, -math.inf)
    if problems.function == "logsumexp":
        rows = plain_logsumexp(logits)
        return (rows + plain_logsumexp(logits.mT)) / 2 if problems.symmetric else rows
    own = torch.arange(x.shape[1], device=DEVICE).expand(x.shape[:2])
    loss = F.cross_entropy(logits.mT, own, reduction="none")
    if problems.symmetric:
        loss = (loss + F.cross_entropy(logits, own, reduction="none")) / 2
    return loss


def plain_logsumexp(logits: Tensor) -> Tensor:
    """PyTorch's has no gradient where there is nothing to sum."""
    empty = (logits == -math.inf).all(-1)
    lse = logits.masked_fill(empty.unsqueeze(-1), 0).logsumexp(-1)
    return lse.masked_fill(empty, -math.inf)


def left_out(problems: Problems) -> Tensor:
    """The mask of every pair, or of the one that has ids; bool, to broadcast over its logits."""
    mask, info_nce = problems.mask, problems.function == "info_nce"
    if mask.ids is None and (mask.diagonal or info_nce):
        return torch.zeros((), dtype=torch.bool, device=DEVICE)
    diagonal = torch.eye(problems.x[0].shape[1], problems.y[0].shape[1], device=DEVICE).bool()
    if mask.ids is None:
        return diagonal
    equal = mask.ids[0].unsqueeze(2) == mask.ids[1].unsqueeze(1)
    out = ~equal if mask.same else equal
    return out & ~diagonal if info_nce else out if mask.diagonal else out | diagonal


def evaluate(backend: Implementation, problems: Problems, upstream: Tensor | None = None) -> Result:
    """What the backend makes of them, in dtypes and shapes as `backends` says."""
    if upstream is None:
        terms, gradients = backend.step(problems)
    else:
        terms = backend.forward(problems)
        gradients = backend.backward(problems, terms.lse, upstream)
    for gradient, x in zip((*gradients.x, *gradients.y), (*problems.x, *problems.y), strict=True):
        assert gradient.dtype == (torch.float32 if upstream is None else x.dtype)
        assert gradient.shape == x.shape
    return Result(terms.loss, terms.total, *gradients)


def error(actual: Tensor, expected: Tensor) -> float:
    """|actual − expected| / |expected|, of what is not −∞ in both."""
    assert actual.shape == expected.shape
    here = expected != -math.inf
    assert torch.equal(actual != -math.inf, here)
    return float((actual[here].double() - expected[here]).norm() / expected[here].norm())


def errors(actual: Result, expected: Result) -> dict[str, float]:
    found = {
        "loss": error(actual.loss, expected.loss),
        "temperature": error(actual.temperature, expected.temperature),
    }
    for name, mine, theirs in (("x", actual.x, expected.x), ("y", actual.y, expected.y)):
        for k, (a, e) in enumerate(zip(mine, theirs, strict=True)):
            found[f"{name}{k}"] = error(a, e)
    if expected.bias is not None:
        found["bias"] = error(actual.bias, expected.bias)
    return found


def check(
    backend: Implementation,
    problems: Problems,
    upstream: Tensor | None = None,
    *,
    bound: float | None = None,
) -> None:
    """At most twice plain PyTorch's error, at most `bound`.

    Two roundings are allowed besides: of a result, and of cosine/τ before a shift of up to 1/τ is subtracted.
    On a GPU the latter is one fused multiply-add, which the interpreter rounds twice.
    """
    expected = exact(problems, upstream)
    result = evaluate(backend, problems, upstream)
    found, allowed = errors(result, expected), errors(plain(problems, upstream), expected)
    unit = torch.finfo(problems.x[0].dtype).eps
    largest = 1 + problems.beta if problems.function == "tilted" else 1  # of cosines' factors
    slack = unit + 2.0**-25 * largest / float(problems.temperature)
    for name, value in found.items():
        assert value <= 2 * allowed[name] + slack, (name, value, allowed[name])
        if bound is not None and name[0] in "xy":
            assert value <= bound, (name, value)
    if upstream is None:
        assert float(result.total) == pytest.approx(float(expected.total), rel=10 * unit, abs=unit)
