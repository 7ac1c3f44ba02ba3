"""The functions "logsumexp", "softplus" and "tilted" of `contrast`, and its masks, by float64, in every CPU backend.

What may change no bit of them is in `test_contrast_bits.py`; `hdc_kernels.pairwise` on top, in `test_pairwise.py`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

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
    randn,
    spread,
    vectors,
)
from equations import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise_truth import (
    FUNCTIONS,
    MASKS,
    ONE_WAY,
    assert_equals_truth,
    assert_sums_equal,
    bound_of,
    by_loops,
    cases,
    evaluate,
    let_through,
    mask_of,
    sums_of,
)
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Function, Mask, Problems, cpu, plain
from hdc_kernels.checks import FLOATING
from hdc_kernels.contrast import contrast


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
import contrast_problems as c, pairwise_truth as t
from hdc_kernels.backends import cpu
from hdc_kernels.checks import FLOATING
print(cpu.library().hdc_instruction_set().decode())
for function, name, shape, symmetric in t.cases([(2, 13, 20, 17), (1, 130, 140, 9), (1, 41, 41, 7)]):
    for dtype in FLOATING if name == "both" else c.FULL:
        problems = t.sums_of(function, [shape], dtype, mask=t.mask_of(name, shape), symmetric=symmetric)
        truth = t.evaluate(problems)
        t.assert_equals_truth(problems, cpu.step(problems), truth)
        t.assert_equals_truth(problems, c.in_two(problems), truth)
for bias in (-80.0, -10.0, 80.0):
    problems = t.sums_of("softplus", [(1, 9, 40, 8)], bias=bias)
    t.assert_equals_truth(problems, cpu.step(problems), t.evaluate(problems))
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
