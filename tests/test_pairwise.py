"""The functions "logsumexp", "softplus", "tilted" of the primitive, masks, and `hdc_kernels.pairwise` on top of them.

The truth is a matrix of logits in float64, a matrix of what the mask lets through, and sums of exponentials:
it shares nothing with `backends/plain.py`, which is held against it as well.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrast_problems import (
    FULL,
    HALF,
    LAYOUTS,
    Shape,
    embeddings_of,
    has_instructions,
    in_a_new_process,
    in_two,
    leaves,
    on_threads,
    problems_of,
    randn,
    rounding,
    spread,
    vectors,
)
from equations import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hdc_kernels import reference
from hdc_kernels.backends import EVERYTHING, Function, Gradients, Mask, Problems, Terms, cpu, plain
from hdc_kernels.checks import FLOATING, Reduction
from hdc_kernels.contrast import contrast
from hdc_kernels.pairwise import logsumexp, softplus_sum, sums

REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean")
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


@pytest.mark.parametrize("normalize", [True, False])
def test_the_truth_and_plain_pytorch_are_the_definition(
    normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix that this file measures by, and backends "torch" and "chunked", gradients included."""
    monkeypatch.setattr(plain, "CHUNK", 12)  # one to four rows at a time
    for function, name, shape, symmetric in cases([(2, 4, 6, 3), (1, 5, 5, 4), (1, 6, 3, 4)]):
        problems = sums_of(
            function, [shape], torch.float64,
            mask=mask_of(name, shape), normalize=normalize, symmetric=symmetric,
        )  # fmt: skip
        truth = evaluate(problems)
        assert truth.terms.loss.tolist() == pytest.approx(by_loops(problems), rel=1e-13, abs=1e-14)
        for chunked in (False, True):
            wanted = [t.clone().requires_grad_() for t in embeddings_of(problems)]
            tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            bias = None if problems.bias is None else problems.bias.clone().requires_grad_()
            one = problems._replace(x=(wanted[0],), y=(wanted[1],), temperature=tau, bias=bias)
            loss, _ = plain.terms(one, chunked=chunked)
            inputs = [t for t in (*wanted, tau, bias) if t is not None]
            slopes = torch.autograd.grad(loss, inputs, spread(problems))
            assert_sums_equal(loss.detach(), truth.terms.loss, 1e-14, floor=1.0)
            expected = [*vectors(truth.gradients), truth.gradients.temperature]
            expected += [] if bias is None else [truth.gradients.bias]
            for ours, slope in zip(slopes, expected, strict=True):
                assert float((ours - slope).norm()) <= 1e-13 * max(1, float(slope.norm()))


# One row and one column; M < N, M = N, M > N; two problems; panels of 256 rows and blocks of 128 columns.
SHAPES: list[Shape] = [
    (1, 1, 1, 3), (1, 1, 7, 5), (1, 7, 1, 5), (2, 5, 9, 7), (2, 9, 5, 7), (3, 6, 6, 40),
    (1, 130, 260, 33), (1, 260, 130, 33), (1, 257, 257, 20),
]  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values(function: Function, dtype: torch.dtype, normalize: bool) -> None:
    """Forward, step and backward, with any upstream gradient; the largest of one mask on two threads."""
    for which, name, shape, symmetric in cases(SHAPES):
        if which != function:
            continue
        problems = sums_of(
            function, [shape], dtype, tau=0.5 if normalize else 3.0,
            mask=mask_of(name, shape), normalize=normalize, symmetric=symmetric,
        )  # fmt: skip
        upstream = randn(len(spread(problems)), seed=5)
        truth, other = evaluate(problems), evaluate(problems, upstream)
        with on_threads(2 if name == "both" and shape[1] > 100 else 1):
            found = cpu.step(problems), in_two(problems), in_two(problems, upstream)
        assert_equals_truth(problems, found[0], truth)
        assert_equals_truth(problems, found[1], truth)
        assert_equals_truth(problems, found[2], other)


TAILS = [
    (6, 127), (8, 128), (9, 129), (127, 8), (128, 9), (129, 17), (252, 255), (253, 31), (255, 256),
    (256, 1), (256, 256), (257, 129), (257, 257), (513, 12), (12, 513),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tails(function: Function) -> None:
    """A row or column left out, counted twice or masked by another's id at the edge of a tile, block or panel."""
    for rows, columns in TAILS:
        if function == "info_nce" and rows > columns:
            continue
        shape = (1, rows, columns, 5)
        for name in ("both", "entries"):
            symmetric = rows == columns and function not in ONE_WAY
            mask = mask_of(name, shape)
            problems = sums_of(function, [shape], torch.float64, mask=mask, symmetric=symmetric)
            truth = evaluate(problems)
            assert_equals_truth(problems, cpu.step(problems), truth)
            assert_equals_truth(problems, in_two(problems), truth)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_several_pairs(function: Function, diagonal: bool) -> None:
    """Of different sizes, with weights of either sign and 0: each row has its own bias."""
    shapes: list[Shape] = [(2, 5, 9, 7), (1, 130, 140, 33), (3, 6, 6, 3)]
    shapes += [] if function == "info_nce" else [(2, 9, 4, 6)]
    options: dict[str, Any] = {
        "mask": Mask(diagonal),
        "weights": [0.7, -1.3, 0.0, 2.0][: len(shapes)],
    }
    for dtype, threads in itertools.product(FULL, (1, 3)):
        problems = sums_of(function, shapes, dtype, **options)
        truth = evaluate(problems)
        with on_threads(threads):
            found = cpu.step(problems), in_two(problems)
        assert_equals_truth(problems, found[0], truth)
        assert_equals_truth(problems, found[1], truth)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_total_alone(function: Function) -> None:
    """Without anything of the rows, everything else is the same, bit by bit."""
    for symmetric in (False, True) if function not in ONE_WAY else (False,):
        shapes: list[Shape] = [(2, 5, 5, 7), (1, 130, 130, 33)]
        problems = sums_of(function, shapes, symmetric=symmetric, weights=[0.7, -1.3])
        bare = problems._replace(detail="total")
        (terms, gradients), (alone, same) = cpu.step(problems), cpu.step(bare)
        assert torch.equal(alone.total, terms.total)
        assert torch.equal(cpu.forward(bare).total, cpu.forward(problems).total)
        assert not any(t.numel() for t in (alone.loss, alone.hits, alone.lse))
        for ours, theirs in zip(vectors(same), vectors(gradients), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(same.temperature, gradients.temperature)


def plainly(problems: Problems) -> tuple[Tensor, list[Tensor]]:
    """What everyone writes, in the dtype of the inputs: the terms of one pair, and the gradients."""
    x, y = inputs = [t.detach().clone().requires_grad_() for t in embeddings_of(problems)]
    if problems.bias is not None:
        inputs.append(problems.bias.to(x.dtype).requires_grad_())
    a, b = (F.normalize(t, dim=-1) for t in (x, y)) if problems.normalize else (x, y)
    logits = a @ b.mT / float(problems.temperature)
    through = let_through(problems, 0)
    if problems.function == "softplus":
        shifted = logits + inputs[2].view(x.shape[:2]).unsqueeze(-1)
        loss = F.softplus(shifted).masked_fill(~through, 0.0).sum(-1)
    elif problems.function == "tilted":
        masked = logits.masked_fill(~through, -math.inf)
        factors = 1 + problems.beta, problems.beta
        sharp, broad = (torch.logsumexp(factor * masked, -1) for factor in factors)
        loss = sharp - broad
    else:
        if problems.function == "info_nce":
            through |= torch.eye(*through.shape[1:], dtype=torch.bool)
        masked = logits.masked_fill(~through, -math.inf)
        lses = [masked.logsumexp(-1 - way) for way in range(1 + problems.symmetric)]
        loss = torch.stack(lses).mean(0)
        if problems.function == "info_nce":
            loss = loss - logits.diagonal(dim1=-2, dim2=-1)
    loss = loss.flatten()
    slopes = torch.autograd.grad(loss, inputs, spread(problems).to(loss.dtype))
    return loss.detach(), list(slopes)


@pytest.mark.parametrize("tau", [1e-3, 0.07, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_worse_than_plain(function: Function, dtype: torch.dtype, tau: float) -> None:
    """Error against float64 on the same rounded numbers at most twice that of plain PyTorch, in every output."""
    for name, symmetric in itertools.product(MASKS, (False, True)):
        if symmetric and function in ONE_WAY:
            continue
        shape = (1, 90, 90 if symmetric else 140, 64)
        problems = sums_of(
            function, [shape], dtype, mask=mask_of(name, shape), tau=tau, symmetric=symmetric
        )
        truth, (loss, theirs) = evaluate(problems), plainly(problems)
        slopes = [*vectors(truth.gradients)]
        slopes += [] if truth.gradients.bias is None else [truth.gradients.bias]
        for terms, gradients in (cpu.step(problems), in_two(problems)):
            found = [g.to(dtype) for g in vectors(gradients)]
            found += [] if gradients.bias is None else [gradients.bias]
            assert_equals_truth(problems, (terms, gradients), truth)
            assert relative_error(terms.loss, truth.terms.loss) <= 2 * relative_error(
                loss, truth.terms.loss
            )
            for ours, their, slope in zip(found, theirs, slopes, strict=True):
                assert relative_error(ours, slope) <= 2 * relative_error(their, slope)


def strided(ids: Tensor) -> Tensor:
    """Every other one among others."""
    return torch.stack([ids, ids + 1], -1)[..., 0]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(
    function: Function, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """Strides of embeddings, ids and upstream gradients change nothing at all, not even the last bit."""
    shape = (2, 7, 9, 5)
    mask = mask_of("both", shape)
    assert mask.ids is not None
    other = mask._replace(ids=tuple(strided(t) for t in mask.ids))
    assert other.ids is not None
    assert not other.ids[0].is_contiguous()
    straight = sums_of(function, [shape], dtype, mask=mask)
    oblique = sums_of(function, [shape], dtype, mask=other, layout=layout)
    upstream = randn(14, seed=3)
    across = torch.stack([upstream, upstream + 1], -1)[:, 0]
    for expected, found in (
        (cpu.step(straight), cpu.step(oblique)),
        (in_two(straight, upstream), in_two(oblique, across)),
    ):
        for ours, same in zip(outputs(found), outputs(expected), strict=True):
            assert torch.equal(ours, same)


def outputs(found: tuple[Terms, Gradients]) -> list[Tensor]:
    """All that have a meaning."""
    terms, gradients = found
    lse = [] if gradients.bias is not None else [terms.lse]
    bias = [] if gradients.bias is None else [gradients.bias]
    return [*terms[:3], *lse, *vectors(gradients), gradients.temperature, *bias]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_gradients_of_y(function: Function) -> None:
    """Nothing else depends on whether they are asked for."""
    for dtype, columns in itertools.product(FLOATING, (20, 30)):
        shape = (2, 20, columns, 9)
        mask, both = mask_of("both", shape), columns == 20 and function not in ONE_WAY
        problems = sums_of(function, [shape], dtype, mask=mask, symmetric=both)
        for run in (cpu.step, in_two):
            terms, gradients = run(problems)
            found = run(problems._replace(needs_y=False))
            expected = outputs((terms, gradients._replace(y=())))
            for ours, same in zip(outputs(found), expected, strict=True):
                assert torch.equal(ours, same)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("function", ["info_nce", "logsumexp"])
@pytest.mark.parametrize("dtype", FULL)
def test_without_gradients_of_y_over_blocks(
    dtype: torch.dtype, function: Function, threads: int
) -> None:
    """Sums of blocks so far are scaled down as maxima rise: logits rise by 30 in all, and in some rows fall."""
    shape = (1, 20, 400, 9)
    problems = sums_of(function, [shape], dtype, tau=0.06)
    ascent = torch.linspace(-1, 1, 400, dtype=dtype).unsqueeze(1)
    direction = randn(9, seed=7, dtype=dtype)
    x, y = 0.3 * problems.x[0] + direction, 0.3 * problems.y[0] + ascent * direction
    x[0, 15:] *= -1
    ids = torch.arange(20).unsqueeze(0) % 5, torch.arange(400).unsqueeze(0) // 100
    ids[1][0, 150] = 4  # the rows of id 4 begin with a block of which nothing counts
    for mask in (EVERYTHING, Mask(ids=ids), Mask(ids=ids, same=True)):
        problems = problems._replace(x=(x,), y=(y,), mask=mask, ranked=function == "info_nce")
        with on_threads(threads):
            whole, gradients = cpu.step(problems)
            terms, alone = cpu.step(problems._replace(needs_y=False))
        assert alone.y == ()
        found = terms, alone._replace(y=gradients.y)
        assert_equals_truth(problems, found, evaluate(problems))
        assert torch.equal(terms.hits, whole.hits)
        if terms.ranks is not None and whole.ranks is not None:
            assert torch.equal(terms.ranks, whole.ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_everything_with_itself(
    dtype: torch.dtype, function: Function, layout: Callable[[Tensor], Tensor]
) -> None:
    """Packed once, as the same tensor is on both sides: the same bits as of a copy."""
    problems = sums_of(function, [(2, 70, 70, 16)], dtype, mask=Mask(diagonal=False), layout=layout)
    once = problems._replace(y=problems.x)
    twice = problems._replace(y=(layout(problems.x[0].clone()),))
    for run in (cpu.step, in_two):
        (ours, our_gradients), (terms, gradients) = run(once), run(twice)
        assert torch.equal(ours.loss, terms.loss)
        pairs = zip(vectors(our_gradients), vectors(gradients), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_bits_again(function: Function, dtype: torch.dtype) -> None:
    """A result depends on the number of threads, but not on chance."""
    for shape, threads in itertools.product([(1, 300, 200, 24), (5, 20, 40, 9)], (1, 2, 3)):
        if function == "info_nce" and shape[1] > shape[2]:
            shape = (1, 200, 300, 24)
        problems = sums_of(function, [shape], dtype, mask=mask_of("both", shape))
        for run in (cpu.step, in_two):
            with on_threads(threads):
                first, second = run(problems), run(problems)
            for ours, same in zip(outputs(first), outputs(second), strict=True):
                assert torch.equal(ours, same)


@settings(max_examples=80, deadline=None)
@given(
    function=st.sampled_from(FUNCTIONS),
    name=st.sampled_from(MASKS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(2, 40)),
    dtype=st.sampled_from(FLOATING),
    tau=st.sampled_from([0.01, 0.2, 1.0, 10.0]),
    normalize=st.booleans(),
    symmetric=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
    upstream=st.sampled_from([None, 1.0, 1e-3]),
    seed=st.integers(0, 10**6),
)
def test_any_sums(
    function: Function,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    tau: float,
    normalize: bool,
    symmetric: bool,
    layout: Callable[[Tensor], Tensor],
    threads: int,
    upstream: float | None,
    seed: int,
) -> None:
    """Whatever comes together; without norms τ grows with the logits, which would else be hundreds."""
    groups, rows, columns, width = shape
    symmetric = symmetric and function not in ONE_WAY
    groups = 1 if name == "entries" else groups
    columns = rows if symmetric else max(rows, columns) if function == "info_nce" else columns
    shape = (groups, rows, columns, width)
    problems = sums_of(
        function, [shape], dtype, tau=tau if normalize else tau * width, mask=mask_of(name, shape, seed),
        normalize=normalize, symmetric=symmetric, layout=layout,
    )  # fmt: skip
    given_upstream = None if upstream is None else upstream * randn(groups * rows, seed=seed)
    with on_threads(threads):
        found = cpu.step(problems) if given_upstream is None else in_two(problems, given_upstream)
    # The smallest sums have one term, and a gradient of a few vectors is a difference of them: 4 at worst.
    assert_equals_truth(problems, found, evaluate(problems, given_upstream), 4 * bound_of(problems))


COMPARISON = """
import test_pairwise as t
print(t.cpu.library().hdc_instruction_set().decode())
for function, name, shape, symmetric in t.cases([(2, 13, 20, 17), (1, 130, 140, 9), (1, 41, 41, 7)]):
    for dtype in t.FLOATING if name == "both" else t.FULL:
        problems = t.sums_of(function, [shape], dtype, mask=t.mask_of(name, shape), symmetric=symmetric)
        truth = t.evaluate(problems)
        t.assert_equals_truth(problems, t.cpu.step(problems), truth)
        t.assert_equals_truth(problems, t.in_two(problems), truth)
for bias in (-80.0, -10.0, 80.0):
    problems = t.sums_of("softplus", [(1, 9, 40, 8)], bias=bias)
    t.assert_equals_truth(problems, t.cpu.step(problems), t.evaluate(problems))
"""


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_instruction_sets(instructions: str) -> None:
    """Only the widest runs in this process; the others are for other people's CPUs."""
    found = in_a_new_process(COMPARISON, HDC_INSTRUCTION_SET=instructions).strip()
    if not has_instructions(instructions):
        pytest.skip(f"this CPU has no {instructions}")
    assert found == instructions


@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this CPU has no AVX-512 BF16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bfloat16_products(function: Function, dtype: torch.dtype) -> None:
    """With PyTorch's switch at "medium": logits as exact as products of bfloat16, and masks as they are."""
    before = torch.get_float32_matmul_precision()
    for which, name, shape, symmetric in cases(
        [(2, 9, 5, 7), (1, 131, 259, 33), (1, 131, 131, 70)]
    ):
        if which != function:
            continue
        problems = sums_of(function, [shape], dtype, mask=mask_of(name, shape), symmetric=symmetric)
        truth = evaluate(problems)
        # Of a term only the logits' factors are rounded, once each.
        bound = bound_of(problems, torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        try:
            found = cpu.step(problems), in_two(problems)
        finally:
            torch.set_float32_matmul_precision(before)
        assert_equals_truth(problems, found[0], truth, bound)
        assert_equals_truth(problems, found[1], truth, bound)


def nobody(columns: int) -> tuple[Tensor, Tensor]:
    """Ids of four rows, the second and last of which no column has, and of the columns."""
    return torch.tensor([[0, 7, 1, 8]]), torch.arange(columns).unsqueeze(0) % 2


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", ["cpu", "chunked", "torch"])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_rows_without_columns(
    weights: tuple[float, ...] | None, backend: str, dtype: torch.dtype
) -> None:
    """−∞ for a logsumexp, 0 for a softplus and for InfoNCE; no gradient and no NaN, τ and bias included."""
    empty = torch.tensor([False, True, False, True])
    sums: list[tuple[Function, int, float]] = [
        ("logsumexp", 6, -math.inf),
        ("logsumexp", 3, -math.inf),
        ("tilted", 6, -math.inf),
        ("softplus", 6, 0.0),
        ("softplus", 3, 0.0),
        ("info_nce", 6, 0.0),
    ]
    for function, columns, value in sums:
        x, y = leaves((4, 8), (columns, 8), dtype=dtype)
        tau = torch.tensor(0.5, requires_grad=True)
        bias = torch.full((4,), -1.0, dtype=reference.compute_dtype(dtype)).requires_grad_()
        result = contrast(
            [(x, y)], weights=weights, temperature=tau, function=function,
            mask=Mask(ids=nobody(columns), same=True), backend=backend,
            bias=bias if function == "softplus" else None,
        )  # fmt: skip
        assert torch.equal(result.terms == value, empty)
        assert not result.terms.isnan().any()
        if weights is not None:
            assert result.value.isfinite() if value == 0 else result.value == value
        inputs = [x, y, tau, *([bias] if function == "softplus" else [])]
        slopes = torch.autograd.grad(result.value.sum(), inputs)
        for slope in slopes:
            assert slope.isfinite().all()
        assert torch.equal(slopes[0].any(-1), ~empty)
        assert slopes[1].any(-1).sum() > 1
        assert slopes[2] != 0
        assert function != "softplus" or torch.equal(slopes[3] == 0, empty)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "torch"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_counts(function: Function, backend: str) -> None:
    """Every row without a column, in every way to say so: no gradient anywhere, in both directions too."""
    ids = torch.zeros(1, 5, dtype=torch.int64)
    entries = torch.ones(5, 5).nonzero().T.contiguous()
    masks = [Mask(ids=(ids, ids)), Mask(ids=(ids, ids + 1), same=True), Mask(left_out=entries)]
    for mask, weights, symmetric in itertools.product(masks, (None, (0.7,)), (False, True)):
        if symmetric and function in ONE_WAY:
            continue
        inputs = leaves((5, 8), (5, 8), (), dtype=torch.float32)
        tau = inputs[2].detach().abs().requires_grad_()
        bias = torch.ones(5, requires_grad=True) if function == "softplus" else None
        result = contrast(
            [(inputs[0], inputs[1])], weights=weights, temperature=tau, function=function,
            mask=mask, backend=backend, bias=bias, symmetric=symmetric,
        )  # fmt: skip
        assert (result.terms == (-math.inf if function in ("logsumexp", "tilted") else 0)).all()
        wanted = [inputs[0], inputs[1], tau, *([] if bias is None else [bias])]
        for slope in torch.autograd.grad(result.value.sum(), wanted):
            assert not slope.isnan().any()
            assert not slope.any()
    single = Mask(diagonal=False)
    x, y = leaves((1, 8), (1, 8))
    bias = torch.ones(1, dtype=torch.float64) if function == "softplus" else None
    options: dict[str, Any] = {"mask": single, "bias": bias, "backend": backend}
    value = contrast([(x, y)], weights=None, temperature=0.5, function=function, **options).value
    assert value.item() == (-math.inf if function in ("logsumexp", "tilted") else 0)
    assert not any(slope.any() for slope in torch.autograd.grad(value.sum(), (x, y)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_and_infinity(function: Function, dtype: torch.dtype, bad: float) -> None:
    """NaN in the terms where plain PyTorch has it: what is masked spoils none. No gradient lacks its NaN.

    With the logsumexp of a row all its coefficients are NaN, those of masked columns too: there a gradient
    may be NaN that is 0 in plain PyTorch.
    """
    shape = (1, 7, 7, 8)
    for name, symmetric, in_y in itertools.product(MASKS, (False, True), (False, True)):
        if symmetric and function in ONE_WAY:
            continue
        clean = sums_of(function, [shape], dtype, mask=mask_of(name, shape), symmetric=symmetric)
        spoilt = [t.clone() for t in embeddings_of(clean)]
        spoilt[in_y][0, 2, 5] = bad
        problems = clean._replace(x=(spoilt[0],), y=(spoilt[1],))
        wanted = [t.clone().requires_grad_() for t in spoilt]
        tau = torch.tensor(0.5, requires_grad=True)
        one = problems._replace(x=(wanted[0],), y=(wanted[1],), temperature=tau)
        loss, _ = plain.terms(one)
        slopes = torch.autograd.grad(loss, (*wanted, tau), spread(problems).to(loss.dtype))
        before = cpu.forward(clean)
        for terms, gradients in (cpu.step(problems), in_two(problems)):
            assert torch.equal(terms.loss.isnan(), loss.isnan())
            kept = ~loss.isnan()
            assert torch.equal(terms.loss[kept], before.loss[kept])
            assert torch.equal(terms.total.isnan(), loss.isnan().any())
            found = (*vectors(gradients), gradients.temperature)
            for ours, same in zip(found, slopes, strict=True):
                assert ours.isnan()[same.isnan()].all()
            if not symmetric:
                assert torch.equal(found[0].isnan(), slopes[0].isnan())


@pytest.mark.parametrize("bias", [-80.0, -10.0, 0.0, 10.0, 80.0])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_softplus_of_large_biases(tau: float, bias: float) -> None:
    """Sums of e⁻⁸⁰ and of 80 in float32, each row relative to itself: at most twice plain PyTorch's error."""
    shape = (1, 200, 300, 64)
    problems = sums_of("softplus", [shape], bias=bias, tau=tau, mask=mask_of("ids", shape))
    truth, (loss, theirs) = evaluate(problems), plainly(problems)
    assert truth.gradients.bias is not None

    def worst(ours: Tensor, exact: Tensor) -> float:
        return float(((ours - exact) / exact).abs().amax())

    eps = torch.finfo(torch.float32).eps
    for terms, gradients in (cpu.step(problems), in_two(problems)):
        assert gradients.bias is not None
        assert worst(terms.loss, truth.terms.loss) <= 2 * worst(loss, truth.terms.loss) + eps
        slopes = truth.gradients.bias
        assert worst(gradients.bias, slopes) <= 2 * worst(theirs[2], slopes) + eps
        assert_equals_truth(problems, (terms, gradients), truth)


# hdc_kernels.pairwise


def all_functions(
    x: Tensor, y: Tensor, tau: Tensor | float, bias: Tensor | float, **options: Any
) -> Tensor:
    """One of each; a sum that has everyone's gradient."""
    found = (
        logsumexp(x, y, temperature=tau, **options),
        softplus_sum(x, y, bias, temperature=tau, **options),
        sums("tilted", x, y, beta=0.7, temperature=tau, **options).value,
    )
    return torch.cat([f.flatten() for f in found])


def masks_of_pair(rows: int, columns: int) -> list[Mask]:
    """Without one, and of each kind; every row has a column, since differences of −∞ are none."""
    ids = torch.arange(rows).unsqueeze(0) % 2, torch.arange(columns).unsqueeze(0) % 2
    return [
        Mask(),
        Mask(False),
        Mask(ids=ids),
        Mask(False, ids, True),
        mask_of("entries", (1, rows, columns, 0)),
    ]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("backend", ["auto", "cpu", "chunked", "torch"])
def test_reductions_and_biases(backend: str, dtype: torch.dtype) -> None:
    """Float64 for float64, else float32; a bias is a number, one element in any shape, or one for each row."""
    x, y = randn(6, 8, dtype=dtype), randn(9, 8, seed=1, dtype=dtype)
    wide = reference.compute_dtype(dtype)
    for mask in masks_of_pair(6, 9):
        options: dict[str, Any] = {"temperature": 0.5, "mask": mask, "backend": backend}
        per_row = torch.full((6,), -1.5)
        biases: list[Tensor | float] = [-1.5, torch.tensor(-1.5), torch.tensor([-1.5]), per_row]
        problems = sums_of("softplus", [(1, 6, 9, 8)], torch.float64, mask=mask, bias=-1.5)
        problems = problems._replace(x=(x[None],), y=(y[None],))
        loose = {"rtol": bound_of(problems, wide), "atol": bound_of(problems, wide)}
        terms = evaluate(problems).terms.loss.to(wide)
        for bias in (*biases, per_row.half(), per_row.double()):
            found = [softplus_sum(x, y, bias, reduction=r, **options) for r in REDUCTIONS]
            expected = terms, terms.sum(), terms.mean()
            torch.testing.assert_close(found, list(expected), **loose)
        terms = evaluate(problems._replace(function="logsumexp", bias=None)).terms.loss.to(wide)
        found = [logsumexp(x, y, reduction=r, **options) for r in REDUCTIONS]
        torch.testing.assert_close(found, [terms, terms.sum(), terms.mean()], **loose)


@pytest.mark.parametrize(
    ("backend", "reduction"), [("cpu", "none"), ("cpu", "mean"), ("chunked", "none")]
)
def test_gradcheck(reduction: Reduction, backend: str) -> None:
    """First and second derivatives against differences, with a learnable temperature and bias."""
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    for rows, columns, shape in ((3, 4, (3,)), (4, 2, ()), (2, 3, (1,))):
        x, y = leaves((rows, 2), (columns, 2))
        bias = randn(*shape, seed=7).requires_grad_()
        for mask in masks_of_pair(rows, columns)[:: 1 if rows == 3 else 3]:
            options = {"mask": mask, "reduction": reduction, "backend": backend}

            def value(*inputs: Tensor, options: dict[str, Any] = options) -> Tensor:
                return all_functions(*inputs, **options)

            # A row without a column is −∞, of which there are no differences.
            whole = value(x, y, tau, bias).isfinite()

            def finite(*inputs: Tensor, whole: Tensor = whole) -> Tensor:
                return value(*inputs)[whole]

            assert whole.any()
            assert torch.autograd.gradcheck(finite, (x, y, tau, bias))
            assert torch.autograd.gradgradcheck(finite, (x, y, tau, bias))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_symmetric_logsumexp(reduction: Reduction) -> None:
    """The mean with the columns', first and second derivatives included."""
    x, y = leaves((4, 3), (4, 3))
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"mask": Mask(False), "reduction": reduction}

    def value(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        return logsumexp(x, y, temperature=tau, symmetric=True, backend="cpu", **options)

    there, back = (logsumexp(*pair, temperature=tau, **options) for pair in ((x, y), (y, x)))
    torch.testing.assert_close(value(x, y, tau), (there + back) / 2, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(value, (x, y, tau))
    assert torch.autograd.gradgradcheck(value, (x, y, tau))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_func(reduction: Reduction, dtype: torch.dtype) -> None:
    """`grad` and `vjp` give what autograd gives, to the last bit."""
    x, y = leaves((6, 8), (9, 8), dtype=dtype)
    tau, bias = torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    inputs = (x, y, tau, bias)
    for mask in masks_of_pair(6, 9):

        def value(*inputs: Tensor, mask: Mask = mask) -> Tensor:
            return all_functions(*inputs, mask=mask, reduction=reduction, backend="cpu")

        eager = value(*inputs)
        upstream = randn(*eager.shape, seed=5).to(eager.dtype)
        expected = torch.autograd.grad(eager, inputs, upstream)
        detached = [t.detach() for t in inputs]
        output, pull_back, *_ = torch.func.vjp(value, *detached)
        assert torch.equal(output, eager)

        def loss(*inputs: Tensor, value: Any = value, upstream: Tensor = upstream) -> Tensor:
            return (value(*inputs) * upstream).sum()

        slopes = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*detached)
        for ours, again, same in zip(pull_back(upstream), slopes, expected, strict=True):
            assert torch.equal(ours, same)
            assert torch.equal(again, same)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_way_to_call_backward(reduction: Reduction) -> None:
    """Twice, inside autocast, for some inputs only: the same bits; and nothing recorded under no_grad."""
    tau, bias = torch.tensor(0.5, requires_grad=True), torch.full((6,), -1.0, requires_grad=True)
    x, y = leaves((6, 8), (9, 8), dtype=torch.float32)
    inputs = (x, y, tau, bias)
    for mask in masks_of_pair(6, 9):
        options: dict[str, Any] = {"mask": mask, "reduction": reduction, "backend": "cpu"}
        value = all_functions(*inputs, **options)
        ones = torch.ones_like(value)
        expected = torch.autograd.grad(value, inputs, ones, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = all_functions(*inputs, **options)
            in_autocast = torch.autograd.grad(inside, inputs, ones)
        assert torch.equal(inside, value)
        for found in (torch.autograd.grad(value, inputs, ones), in_autocast):
            for ours, same in zip(found, expected, strict=True):
                assert torch.equal(ours, same)
        with torch.no_grad():
            assert not all_functions(*inputs, **options).requires_grad
            torch.testing.assert_close(all_functions(*inputs, **options), value.detach())
        for wanted, slope in zip(range(4), expected, strict=True):
            alone = [t.detach().requires_grad_(k == wanted) for k, t in enumerate(inputs)]
            all_functions(*alone, **options).backward(ones)
            for k, t in enumerate(alone):
                assert (t.grad is not None) == (k == wanted)
                assert t.grad is None or torch.equal(t.grad, slope)


# torch.compile


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_operators_are_sound(function: Function, symmetric: bool) -> None:
    """Schemas, fake tensors, autograd and dynamic shapes of all three, with ids or entries, and a bias."""
    if symmetric and function in ONE_WAY:
        pytest.skip("it has no second direction")
    for name, shape in (("both", (2, 5, 5, 4)), ("entries", (1, 6, 6, 4))):
        mask = mask_of(name, shape)
        problems = sums_of(function, [shape], mask=mask, symmetric=symmetric)
        x, y = ([t.requires_grad_() for t in side] for side in (problems.x, problems.y))
        tau = torch.tensor(0.3, requires_grad=True)
        bias = None if problems.bias is None else problems.bias.requires_grad_()
        selected = (*(mask.ids or (None, None)), mask.left_out)
        rest = (0.0, symmetric, True, 0, "cpu", function, mask.diagonal, mask.same, False, 0.7)
        operators = torch.ops.hdc_kernels
        torch.library.opcheck(
            operators.contrast_total, (x, y, tau, bias, *selected, [0.5], "rows", *rest)
        )
        torch.library.opcheck(operators.contrast_terms, (x, y, tau, bias, *selected, *rest))
        with torch.no_grad():
            terms, _, _, lse = operators.contrast_terms(x, y, tau, bias, *selected, *rest)
        detached = [None if t is None else t.detach() for t in (tau, bias)]
        x, y = ([t.detach() for t in side] for side in (x, y))
        arguments = (x, y, *detached, *selected, lse, torch.ones_like(terms), *rest)
        torch.library.opcheck(operators.contrast_gradient, arguments)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(reduction: Reduction) -> None:
    """One graph without a break; values and gradients to rounding, with masks, bias and temperature."""
    x, y = leaves((6, 8), (9, 8), dtype=torch.float32)
    for mask, shape in zip(masks_of_pair(6, 9), [(), (6,), (1,), (6,), ()], strict=True):
        torch.compiler.reset()
        compiled = torch.compile(all_functions, fullgraph=True, backend="aot_eager")
        inputs = (
            x,
            y,
            torch.tensor(0.5, requires_grad=True),
            torch.full(shape, -1.0, requires_grad=True),
        )
        value = all_functions(*inputs, mask=mask, reduction=reduction)
        ours = compiled(*inputs, mask=mask, reduction=reduction)
        torch.testing.assert_close(ours, value, rtol=1e-6, atol=0)
        upstream = randn(*value.shape, seed=5, dtype=torch.float32)
        for slope, same in zip(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(value, inputs, upstream),
            strict=True,
        ):
            assert relative_error(slope, same) <= 1e-6


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_dynamic_batch(reduction: Reduction) -> None:
    """A batch that was marked dynamic, and its ids and biases, compile once for all sizes."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, y: Tensor, bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        mask = Mask(diagonal=False, ids=(rows, columns))
        return all_functions(x, y, 0.5, bias, mask=mask, reduction=reduction).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch in (6, 9, 17, 4):
        x, y, bias = leaves((batch, 8), (2 * batch, 8), (batch,), dtype=torch.float32)
        ids = torch.arange(batch).unsqueeze(0), torch.arange(2 * batch).unsqueeze(0)
        for t, dimension in ((x, 0), (y, 0), (bias, 0), (ids[0], 1), (ids[1], 1)):
            torch._dynamo.mark_dynamic(t, dimension)
        found = torch.autograd.grad(compiled(x, y, bias, *ids), (x, y, bias))
        expected = torch.autograd.grad(loss(x, y, bias, *ids), (x, y, bias))
        for ours, same in zip(found, expected, strict=True):
            assert relative_error(ours, same) <= 1e-6
    assert counter.frame_count == 1


PEAK = """
import torch
from hdc_kernels.backends import Mask
from hdc_kernels.pairwise import logsumexp, softplus_sum

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def grows(batch, function, *bias):
    pair = [torch.randn(batch, 128).requires_grad_() for _ in range(2)]
    ids = torch.arange(batch).unsqueeze(0) // 2
    before = high_water()
    function(*pair, *bias, temperature=0.07, mask=Mask(ids=(ids, ids)), reduction=REDUCTION).sum().backward()
    return high_water() - before

torch.set_num_threads(2)
for function in (logsumexp,), (softplus_sum, -10.0):
    grows(8, *function)
print(grows(16384, *FUNCTION))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("function", "reduction"), [("logsumexp,", "mean"), ("softplus_sum, -10.0", "none")]
)
def test_peak_memory(function: str, reduction: str) -> None:
    """In MiB: 80 for a batch of 16,384 with ids, whose logits would be 1,024 and whose mask 256."""
    script = PEAK.replace("FUNCTION", f"({function})").replace("REDUCTION", repr(reduction))
    grown = int(in_a_new_process(script)) / 1024
    assert 16 <= grown <= 80  # two gradients of 8 MiB at the very least: the measurement works
