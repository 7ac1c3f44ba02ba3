"""The primitive `contrast` and its C++ backend: against float64, in every dtype, layout and thread count.

`tests/test_info_nce.py` holds the public functions against the paper; here is what is under them: several
pairs at once, extra negatives, any upstream gradient, autograd, torch.func, torch.compile, and memory.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equations import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from hdc_kernels import fused_hd_nce, fused_info_nce, reference
from hdc_kernels.backends import Gradients, Problems, Terms, cpu, plain
from hdc_kernels.checks import FLOATING
from hdc_kernels.contrast import Contrast, contrast

HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float64, torch.float32)
Shape = tuple[int, int, int, int]  # G, M, N, D
Pairs = Sequence[tuple[Tensor, Tensor]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that do not depend on the order of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random tensors that require gradients, no two alike."""
    return [randn(*s, seed=k, dtype=dtype).requires_grad_() for k, s in enumerate(shapes)]


def problems_of(
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.float32,
    *,
    tau: float | Tensor = 0.5,
    normalize: bool = True,
    symmetric: bool = False,
    weights: Sequence[float] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Problems:
    """Random problems of these shapes; weights 1.5, −0.5, … unless given."""
    x = [randn(g, m, d, seed=2 * k) for k, (g, m, n, d) in enumerate(shapes)]
    y = [randn(g, n, d, seed=2 * k + 1) for k, (g, m, n, d) in enumerate(shapes)]
    return Problems(
        tuple(layout(t.to(dtype)) for t in x),
        tuple(layout(t.to(dtype)) for t in y),
        tuple(weights or (1.5 - 2 * k for k in range(len(shapes)))),
        tau,
        normalize,
        symmetric,
    )


def spread(problems: Problems) -> Tensor:
    """The weights, one per row: the upstream gradient that makes `backward` equal `step`."""
    rows = [x.shape[0] * x.shape[1] for x in problems.x]
    weights = zip(rows, problems.weights, strict=True)
    return torch.cat([torch.full((r,), w, dtype=torch.float64) for r, w in weights])


def exact(problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """In float64 through autograd: positives and negatives apart, so that nothing cancels."""
    x, y = ([t.detach().double().requires_grad_() for t in side] for side in problems[:2])
    tau = torch.as_tensor(problems.temperature, dtype=torch.float64).detach().reshape(())
    tau = tau.clone().requires_grad_()
    losses, hits, lses = [], [], []
    for a, b in zip(x, y, strict=True):
        logits = reference.cosine_logits(a, b, tau, normalize=problems.normalize)
        diagonal = torch.eye(*logits.shape[-2:], dtype=torch.bool)
        negatives = logits.masked_fill(diagonal, -math.inf)
        positive = logits.diagonal(dim1=-2, dim2=-1)
        lse = torch.stack([negatives.logsumexp(-1 - way) for way in range(1 + problems.symmetric)])
        # The threshold is where log(1 + e^z) is z to 2⁻⁵²; the default of 20 is not enough here.
        losses.append(F.softplus(lse - positive, threshold=40).mean(0).flatten())
        hits.append(reference.top1(logits).flatten())
        lses.append(lse.detach().flatten(1))
    loss = torch.cat(losses)
    factors = spread(problems)
    upstream = factors if upstream is None else upstream.double()
    found = torch.autograd.grad(loss, (*x, *y, tau), upstream)
    loss = loss.detach()
    terms = Terms(loss @ factors, loss, torch.cat(hits), torch.cat(lses, 1))
    return terms, Gradients(found[: len(x)], found[len(x) : -1], found[-1])


def in_two(problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """FORWARD, then BACKWARD."""
    terms = cpu.forward(problems)
    upstream = spread(problems) if upstream is None else upstream
    return terms, cpu.backward(problems, terms.lse, upstream.to(terms.loss.dtype))


def vectors(gradients: Gradients) -> tuple[Tensor, ...]:
    """Those of x, then those of y."""
    return (*gradients.x, *gradients.y)


def rounding(dtype: torch.dtype, width: int, tau: float, largest: float = 1.0) -> float:
    """How far a result may be off, relative to its norm, with every logit off on its own.

    A sum of D products is off by about √D·u times its largest term, twice that for two norms, and a few
    more u for the rest; a logit, `largest` over τ, by the relative error of its dot product; a
    probability relatively by what the logit is off absolutely; and the float64 truth is no better in
    its own u. The factor 2 is for the luck of one draw.
    """
    return 2 * torch.finfo(dtype).eps * (math.sqrt(width) + 4) * max(1, largest / tau)


def assert_equals_exact(
    problems: Problems, found: tuple[Terms, Gradients], bound: float, upstream: Tensor | None = None
) -> None:
    """Every output, each in its norm, within `bound`, and in dtypes and shapes as `backends` says."""
    terms, gradients = found
    truth, slopes = exact(problems, upstream)
    wide = reference.compute_dtype(problems.x[0].dtype)
    assert (terms.total.dtype, terms.loss.dtype, terms.lse.dtype) == (wide, wide, torch.float64)
    assert terms.total.shape == gradients.temperature.shape == ()
    magnitude = float((truth.loss * spread(problems)).abs().sum())
    assert abs(float(terms.total) - float(truth.total)) <= bound * magnitude
    assert relative_error(terms.loss, truth.loss) <= bound if truth.loss.any() else True
    assert torch.equal(terms.lse.isneginf(), truth.lse.isneginf())
    some = truth.lse.isfinite()
    # A logsumexp may be near 0: its error is that of a logit, however large.
    assert (terms.lse - truth.lse)[some].abs().amax().item() <= 4 * bound if some.any() else True
    for ours, slope, x in zip(vectors(gradients), vectors(slopes), _inputs(problems), strict=True):
        assert ours.shape == x.shape
        if slope.any():
            assert relative_error(ours, slope) <= bound + torch.finfo(ours.dtype).eps
        else:
            assert not ours.any()
    # dτ is a sum of terms of either sign, each a dot product of a gradient with its vector.
    rows = sum(float(s.norm() * x.double().norm()) for s, x in _parts(problems, upstream))
    slope_of_tau = float(gradients.temperature) - float(slopes.temperature)
    assert abs(slope_of_tau) <= bound * (rows / float(problems.temperature) + 1e-300)


def _inputs(problems: Problems) -> tuple[Tensor, ...]:
    return (*problems.x, *problems.y)


def _parts(problems: Problems, upstream: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of the unit vectors, and these: the scale of dτ."""
    if problems.normalize:
        unit = [tuple(reference.l2_normalize(t.double()) for t in s) for s in problems[:2]]
        problems = problems._replace(x=unit[0], y=unit[1], normalize=False)
    return zip(exact(problems, upstream)[1].x, problems.x, strict=True)


def test_the_library_was_built() -> None:
    """Without it every test of backend "cpu" would run in plain PyTorch, and pass."""
    assert cpu.is_available()
    assert cpu.library().hdc_instruction_set().decode() in ("avx512", "avx2", "portable")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Around the kernel's own sizes: 6 and 8 rows a tile, blocks of 128 columns, panels of 252 or 256 rows.
TAILS = [
    (1, 1), (1, 2), (5, 6), (6, 7), (7, 7), (8, 9), (9, 9), (17, 31), (33, 33), (127, 129), (128, 128),
    (129, 130), (129, 129), (1, 257), (251, 256), (253, 255), (255, 257), (257, 257), (257, 300),
]  # fmt: skip
WIDTHS = [1, 3, 31, 33, 128, 200]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", FULL)
def test_tails(dtype: torch.dtype, threads: int, set_threads: Callable[[int], None]) -> None:
    """A row, column or dimension left out or counted twice at the edge of a tile, block or panel."""
    set_threads(threads)
    for (rows, columns), width in (
        *itertools.product(TAILS, WIDTHS if threads == 1 else WIDTHS[1::3]),
        *itertools.product([(9, 17), (33, 33)], [513, 2048]),
    ):
        # In one dimension all cosines are ±1 and all gradients 0: there, without norms.
        problems = problems_of([(1, rows, columns, width)], dtype, normalize=width > 1)
        largest = 1.0 if width > 1 else float(problems.x[0].abs().max() * problems.y[0].abs().max())
        bound = rounding(dtype, width, 0.5, largest)
        assert_equals_exact(problems, cpu.step(problems), bound)
        assert_equals_exact(problems, in_two(problems), bound)
        if rows == columns:
            problems = problems._replace(symmetric=True)
            assert_equals_exact(problems, cpu.step(problems), bound)
            assert_equals_exact(problems, in_two(problems), bound)


SEVERAL: list[Shape] = [(2, 5, 9, 7), (1, 6, 6, 40), (3, 1, 1, 3), (4, 8, 10, 1), (1, 130, 260, 33)]
SQUARE: list[Shape] = [(2, 5, 5, 7), (1, 260, 260, 33), (3, 1, 1, 3), (4, 8, 8, 2)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FULL)
def test_several_pairs(
    dtype: torch.dtype,
    symmetric: bool,
    normalize: bool,
    threads: int,
    set_threads: Callable[[int], None],
) -> None:
    """Pairs of any G, M, N, D with weights of either sign and 0, side by side and together on threads."""
    set_threads(threads)
    shapes = SQUARE if symmetric else [s for s in SEVERAL if normalize or s[3] > 1]
    weights = [0.7, -1.3, 2.0, 0.0, 1e-3][: len(shapes)]
    problems = problems_of(
        shapes, dtype, tau=0.8, normalize=normalize, symmetric=symmetric, weights=weights
    )
    if normalize and not symmetric:  # in one dimension, see test_tails
        problems = problems._replace(
            x=(*problems.x[:3], problems.x[3].expand(4, 8, 2).contiguous(), problems.x[4]),
            y=(*problems.y[:3], randn(4, 10, 2, seed=99, dtype=dtype), problems.y[4]),
        )
    logits = [x.double() @ y.double().mT for x, y in zip(problems.x, problems.y, strict=True)]
    largest = 1.0 if normalize else max(float(s.abs().max()) for s in logits)
    bound = rounding(dtype, 40, 0.8, largest)
    assert_equals_exact(problems, cpu.step(problems), bound)
    assert_equals_exact(problems, in_two(problems), bound)
    upstream = randn(len(spread(problems)), seed=5)
    assert_equals_exact(problems, in_two(problems, upstream), bound, upstream)


def test_exact_is_the_specification() -> None:
    """The truth that this file measures by is the function that `reference.py` spells out."""
    for symmetric in (False, True):
        problems = problems_of([(2, 5, 5, 4), (1, 3, 3, 2)], torch.float64, symmetric=symmetric)
        terms, gradients = exact(problems)
        inputs = [t.clone().requires_grad_() for t in _inputs(problems)]
        losses = []
        for x, y in zip(inputs[:2], inputs[2:], strict=True):
            logits = reference.cosine_logits(x, y, 0.5)
            losses.append(reference.info_nce(logits, symmetric=symmetric).flatten())
        loss = torch.cat(losses)
        assert relative_error(terms.loss, loss.detach()) < 1e-14
        total = (loss * spread(problems)).sum()
        for ours, theirs in zip(
            vectors(gradients), torch.autograd.grad(total, inputs), strict=True
        ):
            assert relative_error(ours, theirs) < 1e-14


@pytest.mark.parametrize("dtype", FULL)
def test_upstream_gradients(dtype: torch.dtype) -> None:
    """Per row: negative, none at all, and so large that only float32's exponent still holds it."""
    problems = problems_of([(1, 40, 50, 16), (2, 3, 9, 8)], dtype)
    bound = rounding(dtype, 16, 0.5)
    upstream = randn(46, seed=3)
    upstream[::3] = 0
    upstream[1::6] *= 1e30
    assert_equals_exact(problems, in_two(problems, upstream), bound, upstream.to(dtype))
    zero = torch.zeros(46, dtype=dtype)
    for gradient in vectors(in_two(problems, zero)[1]):
        assert not gradient.any()
    only = zero.clone()
    only[7] = -2.0
    found = in_two(problems, only)[1]
    assert found.x[0].any(-1).nonzero().tolist() == [[0, 7]]
    assert found.y[0].any(-1).all()
    assert not found.x[1].any()
    assert not found.y[1].any()
    # Strided, as autograd may hand it over.
    strided = torch.stack([upstream, upstream + 1], -1).to(dtype)[:, 0]
    for ours, same in zip(
        vectors(in_two(problems, strided)[1]), vectors(in_two(problems, upstream)[1]), strict=True
    ):
        assert torch.equal(ours, same)


def transposed(x: Tensor) -> Tensor:
    """The embeddings lie in columns."""
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    """Stride 2, with NaN between."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def groups_last(x: Tensor) -> Tensor:
    """The problems lie closest together."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def sliced(x: Tensor) -> Tensor:
    """Out of wider and longer storage, at an odd offset, among NaN."""
    return F.pad(x, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    torch.Tensor.contiguous,
    transposed,
    every_other,
    groups_last,
    sliced,
]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", FLOATING)
def test_layouts(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    """Strides change nothing at all, not even the last bit."""
    shapes: list[Shape] = [(2, 7, 9, 5), (1, 6, 6, 40)]
    straight, strided = (problems_of(shapes, dtype, layout=f) for f in (LAYOUTS[0], layout))
    assert not strided.x[0].is_contiguous()
    for run in (cpu.step, in_two):
        expected, found = run(straight), run(strided)
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(vectors(found[1]), vectors(expected[1]), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(found[1].temperature, expected[1].temperature)


@pytest.mark.parametrize("weights", [None, [1.0]])
def test_repeated_rows(weights: list[float] | None) -> None:
    """Stride 0 in rows, in problems and in dimensions: each copy has its gradient, autograd sums them."""
    for base, shape in (((1, 8), (6, 8)), ((1, 6, 8), (3, 6, 8)), ((6, 1), (6, 8))):
        y = randn(*shape, seed=4)
        (x,) = leaves(base)
        value = contrast([(x.expand(shape), y)], weights=weights, temperature=0.5).value
        (found,) = torch.autograd.grad(value.sum(), x)
        value = contrast(
            [(x.expand(shape).contiguous(), y)], weights=weights, temperature=0.5
        ).value
        (same,) = torch.autograd.grad(value.sum(), x)
        assert found.any()
        assert torch.equal(found, same)


layouts = st.sampled_from(LAYOUTS)
shapes_of_pairs = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(0, 20), st.integers(2, 40)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes_of_pairs,
    dtype=st.sampled_from(FULL),
    tau=st.sampled_from([0.05, 0.2, 1.0, 10.0]),
    normalize=st.booleans(),
    symmetric=st.booleans(),
    layout=layouts,
    threads=st.integers(1, 3),
    both=st.booleans(),
)
def test_any_problems(
    shapes: list[Shape],
    dtype: torch.dtype,
    tau: float,
    normalize: bool,
    symmetric: bool,
    layout: Callable[[Tensor], Tensor],
    threads: int,
    both: bool,
) -> None:
    """Whatever comes together; without norms τ grows with the logits, which would else be hundreds."""
    shapes = [(g, m, m if symmetric else m + extra, d) for g, m, extra, d in shapes]
    widest = max(s[3] for s in shapes)
    problems = problems_of(
        shapes,
        dtype,
        tau=tau if normalize else tau * widest,
        normalize=normalize,
        symmetric=symmetric,
        layout=layout,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = cpu.step(problems) if both else in_two(problems)
    torch.set_num_threads(before)
    # The smallest sums have one term, and a gradient of a few vectors is a difference of them: 4 at worst.
    assert_equals_exact(problems, found, 4 * rounding(dtype, widest, tau, 2.0))


def plainly(problems: Problems) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What everyone writes, in the dtype of the inputs: the loss and its gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in _inputs(problems)]
    losses = []
    for k, (x, y) in enumerate(
        zip(inputs[: len(problems.x)], inputs[len(problems.x) :], strict=True)
    ):
        if problems.normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        logits = (x @ y.mT / float(problems.temperature)).flatten(0, 1)
        labels = torch.arange(x.shape[1]).repeat(x.shape[0])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if problems.symmetric:
            back = (y @ x.mT / float(problems.temperature)).flatten(0, 1)
            loss = (loss + F.cross_entropy(back, labels, reduction="sum")) / 2
        losses.append(loss * problems.weights[k])
    loss = torch.stack(losses).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs)


def distance(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative, over all of them."""
    flat = [torch.cat([g.double().flatten() for g in side]) for side in (gradients, truth)]
    return relative_error(*flat)


@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(
    dtype: torch.dtype, symmetric: bool, tau: float
) -> None:
    """Error against float64 on the same rounded numbers at most twice that of plain PyTorch."""
    shapes: list[Shape] = [(1, 48, 48, 64), (2, 9, 9, 33)] if symmetric else [(1, 40, 60, 64)]
    weights = [1 / 48] * len(shapes)
    problems = problems_of(shapes, dtype, tau=tau, symmetric=symmetric, weights=weights)
    truth, slopes = exact(problems)
    loss, theirs = plainly(problems)
    for terms, gradients in (cpu.step(problems), in_two(problems)):
        assert abs(terms.total - truth.total) <= 2 * abs(loss - truth.total)
        found = [g.to(dtype) for g in vectors(gradients)]
        for ours, their, slope in zip(found, theirs, vectors(slopes), strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours, slope) <= 2 * relative_error(their, slope)
            # All but rounding the result is done in float32: half a unit in the last place, and denormals.
            tiny = (
                torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * slope.numel() ** 0.5
            )
            bound = torch.finfo(dtype).eps / 2 + rounding(torch.float32, 64, tau)
            assert float((ours - slope).norm()) <= bound * float(slope.norm()) + tiny


def converged(batch: int, width: int = 128) -> tuple[Tensor, Tensor]:
    """A query and its key, almost the same."""
    query = randn(1, batch, width)
    return query.float(), (query + 1e-3 * randn(1, batch, width, seed=1)).float()


@pytest.mark.parametrize("tau", [1e-3, 0.01, 0.05, 0.07, 0.2, 1.0, 10.0])
@pytest.mark.parametrize("batch", [128, 1024])
@pytest.mark.parametrize("data", ["random", "converged"])
def test_accuracy_of_float32(data: str, batch: int, tau: float) -> None:
    """3e-6 at τ = 0.07 and above, growing with 1/τ below, on either kind of data; no worse than plain.

    What float32 cannot hold, below its smallest normal number, is lost in both: at τ = 0.001 a converged
    gradient is e⁻⁶⁵⁰. Either may be ahead where both are at a few roundings of the result, 3e-7, or by the
    order in which it adds up a dot product: over seeds that is 0.9 to 1.1, at small τ as at large.
    """
    x, y = (
        converged(batch) if data == "converged" else (randn(1, batch, 128, seed=s) for s in (0, 1))
    )
    problems = Problems((x.float(),), (y.float(),), (1 / batch,), tau, True, False)
    _, truth = exact(problems)
    _, theirs = plainly(problems)
    tiny = torch.finfo(torch.float32).smallest_normal * math.sqrt(x.numel())
    for symmetric in (False, True):
        problems = problems._replace(symmetric=symmetric)
        if symmetric:
            _, truth = exact(problems)
            _, theirs = plainly(problems)
        for _, gradients in (cpu.step(problems), in_two(problems)):
            for ours, their, slope in zip(vectors(gradients), theirs, vectors(truth), strict=True):
                size = float(slope.norm())
                error, plain_error = (float((g - slope).norm()) for g in (ours, their))
                assert error <= 3e-6 * max(1, 0.07 / tau) * size + tiny
                assert error <= max(3e-7 * size, 1.2 * plain_error) + tiny


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_large_logits(size: float, dtype: torch.dtype) -> None:
    """Without norms up to ±1e4: exp of none of them fits, of their differences all do."""
    x, y = randn(1, 30, 16, dtype=dtype), randn(1, 33, 16, seed=1, dtype=dtype)
    y *= size / (x.double() @ y.double().mT).abs().max().item()
    for symmetric in (False, True):
        keys = y[:, :30] if symmetric else y
        problems = Problems((x,), (keys,), (1.0,), 1.0, False, symmetric)
        for found in (cpu.step(problems), in_two(problems)):
            assert_equals_exact(problems, found, rounding(dtype, 16, 1.0, size))


@pytest.mark.parametrize("tau", [1e-3, 0.01, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("dtype", FULL)
def test_temperatures(dtype: torch.dtype, tau: float) -> None:
    """From 0.001 to 10, as a number and as a tensor of any dtype."""
    problems = problems_of([(1, 30, 33, 16)], dtype, tau=tau)
    for temperature in (tau, torch.tensor(tau, dtype=torch.float64), torch.tensor([tau])):
        one = problems._replace(temperature=temperature)
        for found in (cpu.step(one), in_two(one)):
            assert_equals_exact(one, found, rounding(dtype, 16, tau))


@pytest.mark.parametrize("dtype", FLOATING)
def test_a_batch_of_one(dtype: torch.dtype) -> None:
    """No negatives: loss 0, a hit, no gradient; with extra negatives a loss like any other."""
    for symmetric in (False, True):
        problems = problems_of([(3, 1, 1, 8)], dtype, symmetric=symmetric)
        for terms, gradients in (cpu.step(problems), in_two(problems)):
            assert terms.loss.tolist() == [0.0, 0.0, 0.0]
            assert terms.hits.all()
            assert terms.lse.isneginf().all()
            assert not any(g.any() for g in vectors(gradients))
            assert gradients.temperature == 0
    problems = problems_of([(3, 1, 4, 8)], dtype)
    assert exact(problems)[0].loss.gt(0.1).all()
    bound = rounding(torch.promote_types(dtype, torch.float32), 8, 0.5)
    assert_equals_exact(problems, cpu.step(problems), bound)


@pytest.mark.parametrize("dtype", FLOATING)
def test_zero_vectors(dtype: torch.dtype) -> None:
    """Cosine 0 with everything, gradient exactly 0, no NaN; a vector of 1e-13 is one, of 1e-11 is none."""
    problems = problems_of([(1, 6, 9, 8)], dtype)
    x, y = problems.x[0], problems.y[0]
    x[0, 1], y[0, 2], y[0, 7] = 0, 0, 0
    if dtype not in HALF:
        x[0, 3] = torch.tensor([1e-13, *[0] * 7])
        x[0, 4] = torch.tensor([1e-11, *[0] * 7])
    bound = rounding(torch.promote_types(dtype, torch.float32), 8, 0.5)
    for terms, gradients in (cpu.step(problems), in_two(problems)):
        assert_equals_exact(problems, (terms, gradients), bound)
        zero = [1] if dtype in HALF else [1, 3]
        assert (~gradients.x[0].any(-1))[0].nonzero().flatten().tolist() == zero
        assert (~gradients.y[0].any(-1))[0].nonzero().flatten().tolist() == [2, 7]
        assert not terms.hits[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_and_infinity(dtype: torch.dtype, bad: float) -> None:
    """A cosine with an infinite vector is none: NaN in its own term, or from a key in all; never a hit."""
    for symmetric in (False, True):
        clean = problems_of([(2, 4, 4, 8)], dtype, symmetric=symmetric)
        before = cpu.forward(clean)
        for spoilt_is_key in (False, True):
            x, y = clean.x[0].clone(), clean.y[0].clone()
            (y if spoilt_is_key else x)[1, 2, 5] = bad
            problems = clean._replace(x=(x,), y=(y,))
            whole = symmetric or spoilt_is_key
            spoilt = [False] * 4 + ([True] * 4 if whole else [False, False, True, False])
            for terms, gradients in (cpu.step(problems), in_two(problems)):
                assert terms.loss.isnan().tolist() == spoilt
                assert terms.total.isnan()
                assert torch.equal(terms.loss[:4], before.loss[:4])
                assert torch.equal(terms.hits[:4], before.hits[:4])
                logits = reference.cosine_logits(x, y, 0.5)
                assert torch.equal(terms.hits, reference.top1(logits).flatten())
                assert not terms.hits[6]
                assert not spoilt_is_key or not terms.hits[4:].any()
                # The other problem knows nothing of it, this one's keys all do.
                assert gradients.x[0][0].isfinite().all()
                assert gradients.y[0][0].isfinite().all()
                assert gradients.x[0][1, 2].isnan().all()
                assert gradients.y[0][1].isnan().all()
                if not whole:
                    assert gradients.x[0][1, [0, 1, 3]].isfinite().all()
                assert gradients.temperature.isnan()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("batch", [2, 7, 130])
def test_equal_embeddings_are_no_hits(batch: int, dtype: torch.dtype) -> None:
    """A collapsed encoder ties everywhere: chance level must not read as perfect retrieval."""
    row = randn(1, 1, 37, dtype=dtype)
    x = row.expand(2, batch, 37)
    for normalize, symmetric in itertools.product((True, False), repeat=2):
        problems = Problems((x,), (x,), (1.0,), 0.07, normalize, symmetric)
        for terms, _ in (cpu.step(problems), in_two(problems)):
            assert not terms.hits.any()
            assert terms.loss.double().sub(math.log(batch)).abs().max() < 1e-5 * math.log(batch) + (
                0 if normalize else 37 / 0.07 * torch.finfo(terms.loss.dtype).eps * 8
            )


@pytest.mark.parametrize("dtype", FLOATING)
def test_hits(dtype: torch.dtype) -> None:
    """Where keys resemble their queries a little, some hit and some miss: the same as in the reference."""
    x, noise = randn(3, 70, 12), randn(3, 90, 12, seed=1)
    y = noise.clone()
    y[:, :70] += 0.8 * x
    for columns, symmetric in ((90, False), (70, True)):
        problems = Problems(
            (x.to(dtype),), (y[:, :columns].to(dtype),), (1.0,), 0.2, True, symmetric
        )
        expected = exact(problems)[0].hits
        assert 20 < expected.sum() < 190
        for terms, _ in (cpu.step(problems), in_two(problems)):
            assert torch.equal(terms.hits, expected)
            value = contrast([(problems.x[0], problems.y[0])], weights=None, temperature=0.2)
            assert torch.equal(value.hits, expected)


@pytest.mark.parametrize("weights", [None, [1 / 64]])
@pytest.mark.parametrize("batch", [64])
def test_loss_scale(batch: int, weights: list[float] | None) -> None:
    """65536 times a gradient that float16 cannot hold is that gradient, rounded once."""
    query, key = (t[0].half() for t in converged(batch, 64))
    query, key = query.requires_grad_(), key.requires_grad_()
    value = contrast([(query, key)], weights=weights, temperature=0.05).value.sum()
    assert value.dtype == torch.float32
    share = 1.0 if weights is None else weights[0]
    problems = Problems((query[None],), (key[None],), (share,), 0.05, True, False)
    truth = vectors(exact(problems)[1])
    unscaled = torch.autograd.grad(value, (query, key), retain_graph=True)
    scaled = torch.autograd.grad(value * 65536, (query, key))
    for plain_one, one, slope in zip(unscaled, scaled, truth, strict=True):
        slope = slope[0]
        rounded = (slope * 65536).half()
        assert one.dtype == torch.float16
        assert one.isfinite().all()
        assert rounded.abs().max() > torch.finfo(torch.float16).smallest_normal
        # float32 may fall on the other side of a rounding boundary, nothing more.
        assert (one - rounded).abs().le(rounded.abs() * 2**-10 + 2**-24).all()
        assert (one != rounded).double().mean() < 0.01
        assert relative_error(one, slope * 65536) < 2**-11 + 1e-4
        assert relative_error(plain_one, slope) > 10 * relative_error(one, slope * 65536)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(dtype: torch.dtype, symmetric: bool, set_threads: Callable[[int], None]) -> None:
    """Two runs are the same bits; another number of threads adds up in another order, no more."""
    shapes: list[Shape] = [(1, 300, 300 if symmetric else 400, 40), (5, 30, 30, 9), (2, 6, 6, 8)]
    problems = problems_of(shapes, dtype, symmetric=symmetric)
    bound = rounding(torch.float32, 40, 0.5)
    for threads in (1, 2, 3):
        set_threads(threads)
        for run in (cpu.step, in_two):
            (terms, gradients), (again, gradients_again) = run(problems), run(problems)
            assert_equals_exact(problems, (terms, gradients), bound)
            for ours, same in zip(
                (*terms, *vectors(gradients), gradients.temperature),
                (*again, *vectors(gradients_again), gradients_again.temperature),
                strict=True,
            ):
                assert torch.equal(ours, same)


SMALLER_TEAM = """
import torch
from hdc_kernels import fused_info_nce
torch.set_num_threads(3)
x = torch.randn(2, 4, 50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
query, key = x.clone().requires_grad_()
for query, key in ((x[0], x[1]), (x[0, 0], x[1, 0])):
    for symmetric in (False, True):
        for reduction in ("none", "mean"):
            found = []
            for backend in ("cpu", "torch"):
                q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
                options = dict(symmetric=symmetric, reduction=reduction, backend=backend)
                loss = fused_info_nce(q, k, **options)
                found.append((loss, *torch.autograd.grad(loss.sum(), (q, k))))
            for ours, theirs in zip(*found):
                assert (ours - theirs).norm() <= 1e-12 * theirs.norm(), (query.shape, options)
"""


def in_a_new_process(script: str, **environment: str) -> str:
    """What the script prints."""
    # -P: the installed package, not the sources, which lack the library.
    command = [sys.executable, "-P", "-c", script]
    everything = {**os.environ, **environment}
    done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give a smaller team, by OMP_THREAD_LIMIT or OMP_DYNAMIC: no rows may be left out."""
    in_a_new_process(SMALLER_TEAM, OMP_THREAD_LIMIT="2")


COMPARISON = """
import sys
sys.path.insert(0, sys.argv[1])
from test_contrast import *
print(cpu.library().hdc_instruction_set().decode())
shapes = [(1, 1, 2, 3), (2, 13, 20, 17), (1, 130, 259, 33), (1, 7, 9, 200)]
for dtype in FULL:
    for run in (cpu.step, in_two):
        for options in (dict(), dict(normalize=False, tau=30.0)):
            problems = problems_of(shapes, dtype, **options)
            assert_equals_exact(problems, run(problems), rounding(dtype, 200, 0.5))
        problems = problems_of([(1, 259, 259, 33), (3, 7, 7, 5)], dtype, symmetric=True)
        assert_equals_exact(problems, run(problems), rounding(dtype, 33, 0.5))
for dtype in HALF:
    problems = problems_of(shapes, dtype)
    assert_equals_exact(problems, cpu.step(problems), rounding(torch.float32, 200, 0.5))
"""


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_instruction_sets(name: str) -> None:
    """Only the widest runs in this process; the others are for other people's CPUs."""
    script = COMPARISON.replace("sys.argv[1]", repr(os.path.dirname(__file__)))  # noqa: PTH120
    found = in_a_new_process(script, HDC_INSTRUCTION_SET=name).strip()
    if name != "portable" and torch.backends.cpu.get_cpu_capability() not in _WITH[name]:
        pytest.skip(f"this CPU has no {name}")
    assert found == name


_WITH = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}


# Autograd


def evaluate(*arguments: Any) -> Tensor:
    """The value of one pair: x, y, τ, weights, backend, symmetric."""
    x, y, tau, weights, backend, symmetric = arguments
    return contrast(
        [(x, y)], weights=weights, temperature=tau, backend=backend, symmetric=symmetric
    ).value


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("weights", [None, (0.7, -1.2)])
def test_gradcheck(weights: tuple[float, ...] | None, backend: str, symmetric: bool) -> None:
    """First and second derivatives against differences, for two pairs and the temperature."""
    inputs = leaves((2, 3, 2), (2, 3, 2), (2, 4), (2 if symmetric else 4, 4))
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def value(tau: Tensor, *xy: Tensor) -> Tensor:
        pairs = [(xy[0], xy[1]), (xy[2], xy[3])]
        options: dict[str, Any] = {"symmetric": symmetric, "backend": backend}
        return contrast(pairs, weights=weights, temperature=tau, **options).value

    assert torch.autograd.gradcheck(value, (tau, *inputs))
    assert torch.autograd.gradgradcheck(value, (tau, *inputs))


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_only_some_inputs_require_gradients(
    weights: tuple[float, ...] | None, backend: str
) -> None:
    """The gradient of one does not depend on who else wants theirs, and nobody else gets one."""
    values = (randn(4, 3), randn(6, 3, seed=1), torch.tensor(0.6, dtype=torch.float64))
    everyone = [t.clone().requires_grad_() for t in values]
    value = evaluate(*everyone, weights, backend, False).sum()
    expected = torch.autograd.grad(value, everyone)
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [t.clone().requires_grad_(w) for t, w in zip(values, wanted, strict=True)]
        value = evaluate(*inputs, weights, backend, False).sum()
        assert value.requires_grad == any(wanted)
        if any(wanted):
            value.backward()
        for t, w, slope in zip(inputs, wanted, expected, strict=True):
            assert (t.grad is not None) == w
            assert t.grad is None or torch.equal(t.grad, slope)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_one_tensor_on_both_sides(weights: tuple[float, ...] | None, symmetric: bool) -> None:
    """It gets the sum of both gradients."""
    (x,) = leaves((5, 4))
    y = x.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    both = evaluate(x, x, 0.5, weights, "cpu", symmetric).sum()
    apart = evaluate(y, other, 0.5, weights, "cpu", symmetric).sum()
    (ours,) = torch.autograd.grad(both, x)
    first, second = torch.autograd.grad(apart, (y, other))
    assert first.any()
    assert torch.equal(ours, first + second)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("tau_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_learnable_temperature(
    weights: tuple[float, ...] | None, tau_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Its gradient has its shape and dtype, whatever the embeddings' are."""
    x, y = leaves((9, 8), (11, 8), dtype=torch.float32)
    tau = torch.full(shape, 0.3, dtype=tau_dtype, requires_grad=True)
    value = evaluate(x, y, tau, weights, "cpu", False).sum()
    value.backward()
    assert value.dtype == torch.float32
    assert tau.grad is not None
    assert (tau.grad.shape, tau.grad.dtype) == (shape, tau_dtype)
    share = 1.0 if weights is None else weights[0]
    problems = Problems((x[None],), (y[None],), (share,), tau, True, False)
    truth = exact(problems)[1].temperature
    bound = 4 * rounding(torch.float32, 8, 0.3)
    assert tau.grad.item() == pytest.approx(truth.item(), rel=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_two_backward_passes(weights: tuple[float, ...] | None, dtype: torch.dtype) -> None:
    """With different upstream gradients: what was kept for the second is as it was before the first."""
    x, y = leaves((6, 8), (6, 8), dtype=dtype)
    shape = () if weights else (6,)
    upstreams = [torch.ones(shape), randn(*shape, seed=3).float(), torch.ones(shape)]
    value = evaluate(x, y, 0.5, weights, "cpu", False)
    found = []
    for upstream in upstreams:
        value.backward(upstream, retain_graph=True)
        assert x.grad is not None
        found.append(x.grad.clone())
        x.grad.zero_()  # as optimizer.zero_grad(set_to_none=False)
    for upstream, ours in zip(upstreams, found, strict=True):
        fresh = evaluate(x, y, 0.5, weights, "cpu", False)
        assert torch.equal(ours, torch.autograd.grad(fresh, x, upstream)[0])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_a_gradient_belongs_to_whoever_asked(weights: tuple[float, ...] | None) -> None:
    """Changing it in place, as hooks do, neither changes another one nor forbids the next."""
    x, y = leaves((6, 8), (6, 8), dtype=torch.float32)
    value = evaluate(x, y, 0.5, weights, "cpu", False).sum()
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x, retain_graph=True)
    before = second.clone()
    first.mul_(2)
    assert torch.equal(second, before)
    assert torch.equal(torch.autograd.grad(value, x)[0], before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_autocast(weights: tuple[float, ...] | None, symmetric: bool) -> None:
    """Neither pass is touched by it, not even if the backward pass runs inside."""
    inputs = leaves((16, 32), (16, 32), dtype=torch.float32)
    outside = evaluate(*inputs, 0.07, weights, "cpu", symmetric)
    expected = torch.autograd.grad(outside.sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(*inputs, 0.07, weights, "cpu", symmetric)
        found = torch.autograd.grad(inside.sum(), inputs)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    for ours, same in zip(found, expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_derivatives_up_to_the_fourth(
    weights: tuple[float, ...] | None, symmetric: bool, backend: str
) -> None:
    """A penalty on gradients, on its gradients, and so on: equal to plain PyTorch's at every depth."""

    def depths(backend: str) -> list[Tensor]:
        x, y = leaves((4, 3), (4, 3))
        tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        upstream = randn(*(() if weights else (4,)), seed=9).requires_grad_()
        variables = (x, y, tau, upstream)
        value = (evaluate(x, y, tau, weights, backend, symmetric) * upstream).sum()
        found: list[Tensor] = []
        for _ in range(4):
            slopes = torch.autograd.grad(value, variables, create_graph=True)
            found += slopes
            value = torch.stack([(s**2).sum() for s in slopes]).sum()
        return found

    for ours, theirs in zip(depths(backend), depths("torch"), strict=True):
        assert relative_error(ours, theirs.detach()) < 1e-12


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_second_derivatives_of_a_composition(
    weights: tuple[float, ...] | None, create_graph: bool, backend: str
) -> None:
    """One input made of the other, or an upstream gradient made of both, must not count twice."""

    def square(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return evaluate(x, y, 0.6, weights, backend, False).sum() ** 2

    def chain(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return evaluate(x, x * y, 0.6, weights, backend, False).sum()

    for loss in (square, chain):
        found = []
        for used in (backend, "torch"):
            x, y = leaves((4, 3), (4, 3))
            slopes = torch.autograd.grad(loss(x, y, used), (x, y), create_graph=True)
            penalty = torch.stack([(s**2).sum() for s in slopes]).sum()
            found.append(torch.autograd.grad(penalty, (x, y), create_graph=create_graph))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs.detach()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalty_in_training_dtypes(dtype: torch.dtype) -> None:
    """The second derivative is computed in float32 too: no worse than plain PyTorch's in float32."""

    def penalised(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = [randn(9, 16, seed=s).bfloat16().to(dtype).requires_grad_() for s in (0, 1)]
        value = evaluate(*inputs, 0.5, (1 / 9,), backend, False)
        slopes = torch.autograd.grad(value, inputs, create_graph=True)
        penalty = value + sum((s.float() if s.dtype in HALF else s).norm() for s in slopes)
        return list(torch.autograd.grad(penalty, inputs))

    truth = penalised(torch.float64, "torch")
    # The first derivative was rounded to this dtype before it was penalised, the second once more.
    bound = 2 * torch.finfo(dtype).eps + 4 * rounding(torch.float32, 16, 0.5)
    for ours, slope in zip(penalised(dtype, "cpu"), truth, strict=True):
        assert relative_error(ours, slope) < bound


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_nothing_is_recorded_where_nothing_is_wanted(
    weights: tuple[float, ...] | None, backend: str
) -> None:
    """Under no_grad and inference_mode, and never for the terms and hits beside the value."""
    x, y = leaves((6, 8), (6, 8))
    options: dict[str, Any] = {"weights": weights, "temperature": 0.5, "backend": backend}
    recorded = contrast([(x, y)], **options)
    assert recorded.value.requires_grad
    assert not recorded.terms.requires_grad
    assert not recorded.hits.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = contrast([(x, y)], **options)
        for ours, same in zip(result, recorded, strict=True):
            assert not ours.requires_grad
            assert ours.grad_fn is None
            torch.testing.assert_close(ours, same.detach(), rtol=1e-14, atol=1e-14)
    with torch.inference_mode():
        inside = torch.ones(3, 2)
        assert contrast([(inside, inside)], **options).value.is_inference()


@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_changing_an_input_in_place(weights: tuple[float, ...] | None) -> None:
    """PyTorch says that a saved tensor was modified, instead of a gradient for other numbers."""
    for changed in range(3):
        x, y = leaves((6, 8), (6, 8))
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        inputs = [x * 1, y * 1, tau * 1]
        value = evaluate(*inputs, weights, "cpu", False).sum()
        inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_hooks(weights: tuple[float, ...] | None) -> None:
    """Those of tensors see the gradient and may replace it, those of saved tensors move them away and back."""
    x, y = leaves((6, 8), (6, 8))
    expected = torch.autograd.grad(evaluate(x, y, 0.5, weights, "cpu", False).sum(), x)[0]
    moved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        moved.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = evaluate(x, y, 0.5, weights, "cpu", False).sum()
    assert len(moved) >= 2
    handle = x.register_hook(lambda g: 3 * g)
    value.backward()
    handle.remove()
    assert x.grad is not None
    assert torch.equal(x.grad, 3 * expected)


# torch.func


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_func(dtype: torch.dtype, symmetric: bool, reduction: Any) -> None:
    """`grad` and `vjp` give what autograd gives, to the last bit."""
    x, y = leaves((6, 8), (6, 8), dtype=dtype)
    tau = torch.tensor(0.5, requires_grad=True)

    def loss(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        return fused_info_nce(
            x, y, temperature=tau, symmetric=symmetric, reduction=reduction, backend="cpu"
        )

    value = loss(x, y, tau)
    upstream = randn(*value.shape, seed=5).to(value.dtype)
    inputs = (x, y, tau)
    expected = torch.autograd.grad(value, inputs, upstream)
    plain_inputs = [t.detach() for t in inputs]
    output, pull_back, *_ = torch.func.vjp(loss, *plain_inputs)
    assert torch.equal(output, value)
    for ours, same in zip(pull_back(upstream), expected, strict=True):
        assert torch.equal(ours, same)
    slopes = torch.func.grad(lambda *t: (loss(*t) * upstream).sum(), argnums=(0, 1, 2))
    for ours, same in zip(slopes(*plain_inputs), expected, strict=True):
        assert torch.equal(ours, same)


# torch.compile


def operator_arguments() -> list[tuple[Any, ...]]:
    """(x, y, tau, temperature, symmetric, normalize, rows_first) as the operators take them."""

    def ready(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in tensors]

    x, y = randn(2, 5, 4), randn(2, 5, 4, seed=1)
    tau = torch.tensor(0.3, requires_grad=True)
    wide = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    extra = randn(9, 4, seed=2)
    return [
        (ready(x), ready(y), None, 0.5, False, True, 0),
        (ready(x[0], x), ready(extra, y), tau, 0.0, False, True, 0),
        (ready(x.float(), x[0].float()), ready(y.float(), y[0].float()), wide, 0.0, True, False, 1),
        (ready(x.half()), ready(y.half()), tau, 0.0, True, True, 1),
        (ready(x[0].bfloat16()), ready(extra.bfloat16()), None, 0.5, False, False, 0),
        (ready(transposed(x), groups_last(x)), ready(sliced(y), every_other(y)), tau, 0.0, False, True, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(6))
def test_operators_are_sound(case: int) -> None:
    """Schemas, fake tensors (shapes, dtypes and strides), autograd and dynamic shapes of all three."""
    x, y, tau, *options = operator_arguments()[case]
    operators = torch.ops.hdc_kernels
    weights = [0.5, -1.5][: len(x)]
    nothing = (None, None, None)  # neither a bias nor ids
    rest = (*options, "cpu", "info_nce", True, False)
    torch.library.opcheck(operators.contrast_total, (x, y, tau, *nothing, weights, *rest))
    torch.library.opcheck(operators.contrast_terms, (x, y, tau, *nothing, *rest))
    with torch.no_grad():
        terms, _, lse = operators.contrast_terms(x, y, tau, *nothing, *rest)
    x, y = ([t.detach() for t in side] for side in (x, y))
    tau = None if tau is None else tau.detach()
    arguments = (x, y, tau, *nothing, lse, torch.ones_like(terms), *rest)
    torch.library.opcheck(operators.contrast_gradient, arguments)


def total_loss(x: Tensor, y: Tensor, tau: Tensor | float) -> Tensor:
    """Of two pairs, weighted."""
    return contrast([(x, y), (y, x)], weights=(0.3, 0.9), temperature=tau).value


def terms_loss(x: Tensor, y: Tensor, tau: Tensor | float) -> Tensor:
    """Squared terms: an upstream gradient of each row's own."""
    return contrast([(x, y)], weights=None, temperature=tau).value.square().sum()


def none_loss(x: Tensor, y: Tensor, tau: Tensor | float) -> Tensor:
    """The public function without a reduction."""
    return fused_info_nce(x, y, temperature=tau, symmetric=True, reduction="none").square().sum()


def mean_loss(x: Tensor, y: Tensor, tau: Tensor | float) -> Tensor:
    """The public function as it is mostly called: its weight depends on the batch."""
    return fused_info_nce(x, y, temperature=tau)


def hd_loss(x: Tensor, y: Tensor, tau: Tensor | float) -> Tensor:
    """A spatial and a temporal pair."""
    clips = x.unflatten(-1, (2, -1)), y.unflatten(-1, (2, -1))
    return fused_hd_nce([clips], [(x, y)], alpha=(0.5,), beta=(0.75,), temperature=tau)


COMPILED = [total_loss, terms_loss, none_loss, mean_loss, hd_loss]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts, nor afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("loss", COMPILED)
def test_compiled_equals_eager(
    loss: Callable[..., Tensor], learnable: bool, dtype: torch.dtype
) -> None:
    """One graph without a break that holds our operator; values to rounding, under autocast too."""
    x, y = leaves((6, 8), (6, 8), dtype=dtype)
    tau = torch.tensor(0.3, requires_grad=True) if learnable else 0.3
    inputs = [t for t in (x, y, tau) if isinstance(t, Tensor)]
    called: list[str] = []

    def record(module: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module

    compiled = torch.compile(
        loss, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    value = loss(x, y, tau)
    expected = torch.autograd.grad(value, inputs)
    for autocast in (False, True):
        called.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = compiled(x, y, tau)
            found = torch.autograd.grad(ours, inputs)
        kind = "terms" if loss in (terms_loss, none_loss) else "total"
        assert any(f"hdc_kernels.contrast_{kind}" in name for name in called)
        assert not any("mm" in name or "exp." in name or "softmax" in name for name in called)
        torch.testing.assert_close(ours, value, rtol=1e-6, atol=0)
        for slope, same in zip(found, expected, strict=True):
            assert slope.dtype == same.dtype
            # In half precision a last bit of float32 may decide a rounding.
            assert relative_error(slope, same) <= max(1e-6, torch.finfo(slope.dtype).eps / 2)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("loss", COMPILED)
def test_dynamic_batch(loss: Callable[..., Tensor]) -> None:
    """A batch that was marked dynamic compiles once for all sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch in (6, 9, 17, 4):
        x, y = leaves((batch, 8), (batch, 8), dtype=torch.float32)
        for t in (x, y):
            torch._dynamo.mark_dynamic(t, 0)
        found = torch.autograd.grad(compiled(x, y, 0.3), (x, y))
        expected = torch.autograd.grad(loss(x, y, 0.3), (x, y))
        for ours, same in zip(found, expected, strict=True):
            assert relative_error(ours, same) <= 1e-6
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_gradients() -> None:
    """Evaluation compiles as well, and its loss is the same."""
    x, y = randn(6, 8, dtype=torch.float32), randn(6, 8, seed=1, dtype=torch.float32)
    for loss in COMPILED:
        ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y, 0.3)
        torch.testing.assert_close(ours, loss(x, y, 0.3), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    """The compiler that users run: total and terms in one function, with a network before them."""

    def network(x: Tensor, weight: Tensor, tau: Tensor) -> Tensor:
        query, key = (x @ weight).tanh(), (x @ weight).sin()
        return total_loss(query, key, tau) + terms_loss(query, key, tau)

    inputs = leaves((6, 5), (5, 8), dtype=torch.float32)
    tau = torch.tensor(0.5, requires_grad=True)
    value = network(inputs[0], inputs[1], tau)
    ours = torch.compile(network, fullgraph=True)(*inputs, tau)
    torch.testing.assert_close(ours, value, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(value, (*inputs, tau))
    for slope, same in zip(torch.autograd.grad(ours, (*inputs, tau)), expected, strict=True):
        assert relative_error(slope, same) <= 2e-6


@pytest.mark.usefixtures("fresh_compiler")
def test_second_derivatives_of_a_compiled_loss_are_refused() -> None:
    """They would need the logits; PyTorch says so instead of a wrong number."""
    x, y = leaves((6, 8), (6, 8))
    for loss in (total_loss, terms_loss):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        # With another term beside it the whole has a second derivative, whether or not this one has.
        value = compiled(x, y, 0.3) + (x**3).sum()

        def penalise(value: Tensor = value) -> None:
            slope = torch.autograd.grad(value, x, create_graph=True)[0]
            torch.autograd.grad(slope.square().sum(), x)

        with pytest.raises(RuntimeError, match="double backward"):
            penalise()


# Memory

PEAK = """
import torch
from hdc_kernels import fused_info_nce

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def grows(batch):
    pair = [torch.randn(batch, 128).requires_grad_() for _ in range(2)]
    before = high_water()
    fused_info_nce(*pair, backend="cpu").backward()
    return high_water() - before

torch.set_num_threads(2)
grows(8), grows(8)
print(grows(128), grows(16384))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory() -> None:
    """In MiB: 110 for a batch of 16,384, whose logits would be 1,024, and 4 for one of 128."""
    small, large = (int(kib) / 1024 for kib in in_a_new_process(PEAK).split())
    assert small <= 4
    assert 16 <= large <= 110  # two gradients of 8 MiB at the very least: the measurement works


# Backend "chunked"


@pytest.mark.parametrize("chunk", [1, 60, 137, 10**9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [None, (0.7, -0.2)])
def test_chunked_equals_whole(
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, ...] | None,
    symmetric: bool,
    chunk: int,
) -> None:
    """In chunks of one row, of a few with a rest, and in one: terms, hits and gradients."""
    monkeypatch.setattr(plain, "CHUNK", chunk)
    shapes: list[Shape] = [(2, 13, 13 if symmetric else 17, 5), (1, 4, 4, 3)]
    problems = problems_of(shapes, torch.float64)
    found = []
    for backend in ("chunked", "torch"):
        inputs = [t.clone().requires_grad_() for t in _inputs(problems)]
        tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        result = contrast(
            list(zip(inputs[:2], inputs[2:], strict=True)),
            weights=weights,
            temperature=tau,
            symmetric=symmetric,
            backend=backend,
        )
        upstream = randn(*result.value.shape, seed=8)
        slopes = torch.autograd.grad(result.value, (*inputs, tau), upstream)
        found.append((result, slopes))
    (ours, our_slopes), (theirs, their_slopes) = found
    assert isinstance(ours, Contrast)
    assert torch.equal(ours.hits, theirs.hits)
    assert relative_error(ours.value, theirs.value.detach()) < 1e-14
    assert relative_error(ours.terms, theirs.terms) < 1e-14
    for slope, same in zip(our_slopes, their_slopes, strict=True):
        assert relative_error(slope, same) < 1e-13


def test_chunks_hold_no_more_than_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at a time as fit into CHUNK logits, at least one."""
    sizes: list[int] = []
    original = reference.cosine_logits

    def spy(*arguments: Any, **options: Any) -> Tensor:
        logits = original(*arguments, **options)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(reference, "cosine_logits", spy)
    x, y = randn(2, 10, 4), randn(2, 13, 4, seed=1)
    for chunk, expected in ((100, [78, 78, 78, 26]), (10**6, [260]), (1, [26] * 10)):
        monkeypatch.setattr(plain, "CHUNK", chunk)
        sizes.clear()
        contrast([(x, y)], weights=None, temperature=0.5, backend="chunked")
        assert sizes == expected
