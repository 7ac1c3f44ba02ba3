"""What the tests of all functions and masks share: problems with masks, float64 truth, and bounds.

The truth is a matrix of logits in float64, a matrix of what the mask lets through, and sums of exponentials:
it shares nothing with `backends/plain.py`, which is held against it as well, and both against the definition in loops.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contrast_problems import Shape, embeddings_of, problems_of, randn, rounding, spread, vectors
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import EVERYTHING, Function, Gradients, Mask, Problems, Terms

FUNCTIONS: tuple[Function, ...] = ("info_nce", "logsumexp", "softplus", "tilted")
ONE_WAY = "softplus", "tilted"  # never symmetric
MASKS = ("none", "diagonal", "ids", "same", "both", "entries")


class Truth(NamedTuple):
    """`scale`: the root of the sum of squares of what each gradient adds up, as norms."""

    terms: Terms
    gradients: Gradients
    scale: tuple[float, ...]
    temperature_scale: float


def ids_of(*shape: int, seed: int, different: int = 3) -> Tensor:
    """Random, a few of them, too large for int32 and for float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(different, shape, generator=generator) + 2**60


def mask_of(name: str, shape: Shape, seed: int = 0) -> Mask:
    """That of one pair; "both": ids of which the same count, and not the diagonal."""
    groups, rows, columns, _ = shape
    ids = ids_of(groups, rows, seed=seed), ids_of(groups, columns, seed=seed + 1)
    if name in ("none", "diagonal"):
        return Mask(diagonal=name == "none")
    if name == "entries":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(rows, columns, generator=generator) < 0.3
        return Mask(left_out=chosen.nonzero().T.contiguous())
    return Mask(diagonal=name != "both", ids=ids, same=name in ("same", "both"))


def sums_of(
    function: Function,
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.float32,
    *,
    mask: Mask = EVERYTHING,
    bias: float | None = None,
    **options: Any,
) -> Problems:
    """`problems_of` these shapes for this function; the bias is random unless given."""
    problems = problems_of(shapes, dtype, **options)
    if function == "softplus":
        rows = sum(g * m for g, m, _, _ in shapes)
        chosen = 2 * randn(rows, seed=9) if bias is None else torch.full((rows,), bias)
        problems = problems._replace(bias=chosen.to(reference.compute_dtype(dtype)))
    return problems._replace(function=function, mask=mask, beta=0.7)


def let_through(problems: Problems, pair: int) -> Tensor:
    """[G, M, N], whether the sum of row i goes over column j."""
    (groups, rows, _), columns = problems.x[pair].shape, problems.y[pair].shape[1]
    mask = problems.mask
    through = torch.ones(groups, rows, columns, dtype=torch.bool)
    if mask.ids is not None:
        difference = mask.ids[0].unsqueeze(2) - mask.ids[1].unsqueeze(1)
        through &= (difference == 0) == mask.same
    if mask.left_out is not None:
        through[0][tuple(mask.left_out)] = False
    if problems.function == "info_nce" or not mask.diagonal:
        through &= ~torch.eye(rows, columns, dtype=torch.bool)
    return through


def log_of_sum(logits: Tensor, through: Tensor, dimension: int) -> Tensor:
    """Sums of exponentials below a maximum that has no gradient; −∞ for an empty sum."""
    shown = torch.where(through, logits.detach(), -math.inf)
    highest = shown.amax(dimension, keepdim=True).clamp_min(-1e300)
    summed = torch.where(through, logits - highest, -math.inf).exp().sum(dimension)
    lse = highest.squeeze(dimension) + torch.where(summed > 0, summed, 1.0).log()
    return torch.where(through.any(dimension), lse, -math.inf)


def evaluate(problems: Problems, upstream: Tensor | None = None) -> Truth:
    """Everything a backend returns, in float64."""
    x, y = ([t.detach().double().requires_grad_() for t in side] for side in problems[:2])
    tau = torch.tensor(float(problems.temperature), dtype=torch.float64, requires_grad=True)
    sizes = [t.shape[0] * t.shape[1] for t in x]
    bias = torch.zeros(sum(sizes)) if problems.bias is None else problems.bias.detach()
    bias = bias.double().requires_grad_()
    losses, lses, logits = [], [], []
    for pair, (a, b, its_bias) in enumerate(zip(x, y, bias.split(sizes), strict=True)):
        if problems.normalize:
            a, b = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (a, b))
        s = a @ b.mT / tau
        through = let_through(problems, pair)
        ways = range(1 + problems.symmetric)
        if problems.function == "softplus":
            z = s + its_bias.view(s.shape[:2]).unsqueeze(-1)
            # The threshold is where log(1 + e^z) is z to 2⁻⁵²; the default of 20 is not enough here.
            losses.append(torch.where(through, F.softplus(z, threshold=40), 0.0).sum(-1))
            lse = s.new_zeros(1, *s.shape[:2])
        elif problems.function == "tilted":
            factors = 1 + problems.beta, problems.beta
            lse = torch.stack([log_of_sum(factor * s, through, -1) for factor in factors])
            losses.append(torch.where(through.any(-1), lse[0] - lse[1], -math.inf))
        else:
            lse = torch.stack([log_of_sum(s, through, -1 - way) for way in ways])
            positive = s.diagonal(dim1=-2, dim2=-1) if problems.function == "info_nce" else None
            both = lse if positive is None else F.softplus(lse - positive, threshold=40)
            losses.append(both.mean(0))
        lses.append(lse.detach().flatten(1))
        logits.append(s)
    loss = torch.cat([t.flatten() for t in losses])
    factors = spread(problems)
    upstream = factors if upstream is None else upstream.double()
    found = torch.autograd.grad(loss, (*x, *y, tau, bias, *logits), upstream, allow_unused=True)
    pairs, detached = len(x), loss.detach()
    slopes = [
        torch.zeros_like(s) if f is None else f for s, f in zip(logits, found[-pairs:], strict=True)
    ]
    d_bias = None if problems.bias is None else found[2 * pairs + 1]
    gradients = Gradients(found[:pairs], found[pairs : 2 * pairs], found[2 * pairs], d_bias)
    terms = Terms((detached * factors).sum(), detached, detached.isnan(), torch.cat(lses, 1))
    return Truth(terms, gradients, *scales(problems, slopes))


def scales(problems: Problems, slopes: Sequence[Tensor]) -> tuple[tuple[float, ...], float]:
    """Of dx and dy, and of dτ, where each logit's slope may be off on its own."""
    tau = float(problems.temperature)
    of_x, of_y, of_tau = [], [], 0.0
    for x, y, slope in zip(problems.x, problems.y, slopes, strict=True):
        xx, yy = (t.double().square().sum(-1) for t in (x, y))
        unit = (torch.ones_like(xx), torch.ones_like(yy)) if problems.normalize else (xx, yy)
        lengths = (xx, yy) if problems.normalize else (torch.ones_like(xx), torch.ones_like(yy))
        squares = slope.square() / tau**2
        of_x.append(
            float(((squares @ unit[1].unsqueeze(-1)).squeeze(-1) / lengths[0]).sum().sqrt())
        )
        of_y.append(
            float(((unit[0].unsqueeze(-2) @ squares).squeeze(-2) / lengths[1]).sum().sqrt())
        )
        largest = float((unit[0].amax() * unit[1].amax()).sqrt())
        of_tau += float(squares.sum().sqrt()) * largest / tau
    return (*of_x, *of_y), of_tau


def bound_of(problems: Problems, dtype: torch.dtype | None = None) -> float:
    """`rounding`, with the largest argument that an exponential has."""
    largest = 1.0
    for x, y in zip(problems.x, problems.y, strict=True):
        if not problems.normalize:
            largest = max(largest, float((x.double() @ y.double().mT).abs().max()))
    reach = largest / float(problems.temperature)
    if problems.bias is not None:
        reach += float(problems.bias.detach().abs().max())
    if problems.function == "tilted":
        reach *= 1 + problems.beta
    width = max(x.shape[-1] for x in problems.x)
    dtype = reference.compute_dtype(problems.x[0].dtype) if dtype is None else dtype
    return rounding(dtype, width, 1.0, reach)


def assert_equals_truth(
    problems: Problems,
    found: tuple[Terms, Gradients],
    truth: Truth,
    bound: float | None = None,
) -> None:
    """Every output within `bound` of its size or of what was added up to it, in dtypes and shapes as promised."""
    terms, gradients = found
    bound = bound_of(problems) if bound is None else bound
    wide = reference.compute_dtype(problems.x[0].dtype)
    assert (terms.total.dtype, terms.loss.dtype, terms.hits.dtype) == (wide, wide, torch.bool)
    assert terms.total.shape == gradients.temperature.shape == ()
    # A logsumexp may be near 0 and is still off by as much as a logit.
    floor = float(problems.function in ("logsumexp", "tilted"))
    assert_sums_equal(terms.loss, truth.terms.loss, bound, floor)
    if truth.terms.total.isfinite():
        magnitude = float((truth.terms.loss.abs() + floor) @ spread(problems).abs())
        assert abs(float(terms.total) - float(truth.terms.total)) <= bound * magnitude
    else:
        assert terms.total.item() == truth.terms.total.item()
    if problems.function != "softplus":
        assert terms.lse.dtype == torch.float64
        assert_sums_equal(terms.lse, truth.terms.lse, bound, 1.0)
    for ours, slope, size, x in zip(
        vectors(gradients),
        vectors(truth.gradients),
        truth.scale,
        embeddings_of(problems),
        strict=True,
    ):
        assert ours.shape == x.shape
        rounded = torch.finfo(ours.dtype)
        tiny = rounded.smallest_normal * rounded.eps * math.sqrt(x.numel())
        norm = float(slope.norm())
        assert float((ours - slope).norm()) <= bound * (size + norm) + rounded.eps * norm + tiny
    slope_of_tau = float(truth.gradients.temperature)
    error = abs(float(gradients.temperature) - slope_of_tau)
    assert error <= bound * (truth.temperature_scale + abs(slope_of_tau)) + 1e-300
    assert (gradients.bias is None) == (problems.bias is None)
    if problems.bias is not None:
        assert gradients.bias is not None
        assert gradients.bias.dtype == wide
        assert truth.gradients.bias is not None
        assert_sums_equal(gradients.bias, truth.gradients.bias, bound)


def assert_sums_equal(ours: Tensor, truth: Tensor, bound: float, floor: float = 0.0) -> None:
    """In their norm, or that of `floor` in their place; −∞ where it should be, and no NaN."""
    assert ours.shape == truth.shape
    some = truth.isfinite()
    assert torch.equal(ours[~some].double(), truth[~some])
    error = (ours - truth)[some].norm()
    assert float(error) <= bound * (float(truth[some].norm()) + floor * math.sqrt(truth.numel()))


def by_loops(problems: Problems) -> list[float]:
    """The terms as their definition reads, of problems with one pair, in Python floats."""
    x, y = (side[0].double().tolist() for side in (problems.x, problems.y))
    tau, mask, terms = float(problems.temperature), problems.mask, []

    def logit(a: list[float], b: list[float]) -> float:
        dot = math.fsum(p * q for p, q in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b) if problems.normalize else 1) / tau

    def counts(group: int, i: int, j: int) -> bool:
        if i == j and (problems.function == "info_nce" or not mask.diagonal):
            return False
        if mask.left_out is not None and [i, j] in mask.left_out.T.tolist():
            return False
        if mask.ids is None:
            return True
        equal = mask.ids[0][group, i].item() == mask.ids[1][group, j].item()
        return equal if mask.same else not equal

    def sums(group: int, s: list[list[float]], i: int, axis: int, factor: float = 1.0) -> float:
        """log Σ exp(factor·s) over row or column i."""
        across = range(len(s[0]) if axis else len(s))
        pairs = [(i, k) if axis else (k, i) for k in across]
        chosen = [factor * s[a][b] for a, b in pairs if counts(group, a, b)]
        return math.log(math.fsum(map(math.exp, chosen))) if chosen else -math.inf

    for group, (rows, columns) in enumerate(zip(x, y, strict=True)):
        s = [[logit(a, b) for b in columns] for a in rows]
        for i, row in enumerate(s):
            if problems.function == "softplus":
                assert problems.bias is not None
                bias = problems.bias[len(terms)].item()
                logits = [z + bias for j, z in enumerate(row) if counts(group, i, j)]
                terms.append(math.fsum(math.log1p(math.exp(z)) for z in logits))
                continue
            if problems.function == "tilted":
                sharp, broad = (sums(group, s, i, 1, f + problems.beta) for f in (1, 0))
                terms.append(-math.inf if sharp == -math.inf else sharp - broad)
                continue
            found = [sums(group, s, i, axis) for axis in ((1, 0) if problems.symmetric else (1,))]
            if problems.function == "info_nce":
                found = [math.log1p(math.exp(lse - row[i])) for lse in found]
            terms.append(math.fsum(found) / len(found))
    return terms


def cases(shapes: Sequence[Shape]) -> Iterator[tuple[Function, str, Shape, bool]]:
    """(function, mask, shape, symmetric): all that there are for these shapes."""
    for function, name, shape in itertools.product(FUNCTIONS, MASKS, shapes):
        groups, rows, columns, _ = shape
        if (function != "info_nce" or rows <= columns) and (name != "entries" or groups == 1):
            yield function, name, shape, False
            if rows == columns and function not in ONE_WAY:
                yield function, name, shape, True
