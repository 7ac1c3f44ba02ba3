"""The C++ backend of `contrast`: values, layouts, threads, instruction sets and special values, by float64.

`tests/test_info_nce.py` holds the public functions against the paper; here is what is under them: several
pairs at once, extra negatives, any upstream gradient, and memory. What half precision and small temperatures
cost is in `test_contrast_precision.py`, other functions and masks in `test_contrast_functions.py`.
"""

import itertools
import math
import sys
from collections.abc import Callable

import pytest
import torch
from contrast_problems import (
    FULL,
    HALF,
    LAYOUTS,
    Shape,
    assert_equals_exact,
    embeddings_of,
    exact,
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

from hdc_kernels import reference
from hdc_kernels.backends import Problems, cpu
from hdc_kernels.checks import FLOATING
from hdc_kernels.contrast import contrast


def test_the_library_was_built() -> None:
    """Without it every test of backend "cpu" would run in plain PyTorch, and pass."""
    assert cpu.is_available()
    assert cpu.library().hdc_instruction_set().decode() in ("avx512", "avx2", "portable")


# Around the kernel's own sizes: 6 and 8 rows a tile, blocks of 128 columns, panels of 252 or 256 rows.
TAILS = [
    (1, 1), (1, 2), (5, 6), (6, 7), (7, 7), (8, 9), (9, 9), (17, 31), (33, 33), (127, 129), (128, 128),
    (129, 130), (129, 129), (1, 257), (251, 256), (253, 255), (255, 257), (257, 257), (257, 300),
]  # fmt: skip
WIDTHS = [1, 3, 31, 33, 128, 200]


@pytest.mark.parametrize(
    "tau", [0.5, 0.02]
)  # cosines are raised as they are, or relative to a maximum
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", FULL)
def test_tails(dtype: torch.dtype, threads: int, tau: float) -> None:
    """A row, column or dimension left out or counted twice at the edge of a tile, block or panel."""
    for (rows, columns), width in (
        *itertools.product(TAILS, WIDTHS if threads == 1 else WIDTHS[1::3]),
        *itertools.product([(9, 17), (33, 33)], [513, 2048]),
    ):
        # In one dimension all cosines are ±1 and all gradients 0: there, without norms.
        problems = problems_of([(1, rows, columns, width)], dtype, tau=tau, normalize=width > 1)
        largest = 1.0 if width > 1 else float(problems.x[0].abs().max() * problems.y[0].abs().max())
        bound = rounding(dtype, width, tau, largest)
        for symmetric in (False, True) if rows == columns else (False,):
            problems = problems._replace(symmetric=symmetric)
            for run in (cpu.step, in_two):
                with on_threads(threads):
                    found = run(problems)
                assert_equals_exact(problems, found, bound)


SEVERAL: list[Shape] = [(2, 5, 9, 7), (1, 6, 6, 40), (3, 1, 1, 3), (4, 8, 10, 1), (1, 130, 260, 33)]
SQUARE: list[Shape] = [(2, 5, 5, 7), (1, 260, 260, 33), (3, 1, 1, 3), (4, 8, 8, 2)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FULL)
def test_several_pairs(dtype: torch.dtype, symmetric: bool, normalize: bool, threads: int) -> None:
    """Pairs of any G, M, N, D with weights of either sign and 0, side by side and together on threads."""
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
    upstream = randn(len(spread(problems)), seed=5)
    with on_threads(threads):
        found = cpu.step(problems), in_two(problems), in_two(problems, upstream)
    assert_equals_exact(problems, found[0], bound)
    assert_equals_exact(problems, found[1], bound)
    assert_equals_exact(problems, found[2], bound, upstream)


@pytest.mark.parametrize("needs_y", [True, False])
def test_layouts_of_groups(needs_y: bool) -> None:
    """Rows first or without groups: the results of [G, rows, D], in the shapes that were given."""
    shapes: list[Shape] = [(3, 5, 7, 6), (1, 4, 9, 33), (2, 6, 6, 8)]
    grouped = problems_of(shapes)._replace(needs_y=needs_y)
    x, y = (
        (side[0].transpose(0, 1).contiguous(), side[1][0], side[2])
        for side in (grouped.x, grouped.y)
    )
    given = grouped._replace(x=x, y=y, rows_first=1)
    for same, expected in zip(given.grouped()[:2], grouped[:2], strict=True):
        assert all(torch.equal(*pair) for pair in zip(same, expected, strict=True))
    for run in (cpu.step, in_two):
        terms, gradients = run(given)
        expected_terms, expected = run(grouped)
        assert torch.equal(terms.loss, expected_terms.loss)
        assert len(gradients.y) == (3 if needs_y else 0)
        for ours, theirs in zip(
            vectors(gradients), vectors(expected.ungrouped(given)), strict=True
        ):
            assert torch.equal(ours, theirs)
        for slope, t in zip(gradients.x, x, strict=True):
            assert slope.shape == t.shape


def test_exact_is_the_specification() -> None:
    """The truth that this file measures by is the function that `reference.py` spells out."""
    for symmetric in (False, True):
        problems = problems_of([(2, 5, 5, 4), (1, 3, 3, 2)], torch.float64, symmetric=symmetric)
        terms, gradients = exact(problems)
        inputs = [t.clone().requires_grad_() for t in embeddings_of(problems)]
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


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", FLOATING)
def test_layouts(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    """Strides change nothing at all, not even the last bit."""
    shapes: list[Shape] = [(2, 7, 9, 5), (1, 6, 6, 40)]
    straight, strided = (problems_of(shapes, dtype, layout=f) for f in (LAYOUTS[0], layout))
    assert not strided.x[0].is_contiguous()
    for run in (cpu.step, in_two):
        expected, found = run(straight), run(strided)
        for ours, theirs in zip(found[0][:4], expected[0][:4], strict=True):
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
    with on_threads(threads):
        found = cpu.step(problems) if both else in_two(problems)
    # The smallest sums have one term, and a gradient of a few vectors is a difference of them: 4 at worst.
    assert_equals_exact(problems, found, 4 * rounding(dtype, widest, tau, 2.0))


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(dtype: torch.dtype, symmetric: bool) -> None:
    """Two runs are the same bits; another number of threads adds up in another order, no more."""
    shapes: list[Shape] = [(1, 300, 300 if symmetric else 400, 40), (5, 30, 30, 9), (2, 6, 6, 8)]
    problems = problems_of(shapes, dtype, symmetric=symmetric)
    bound = rounding(torch.float32, 40, 0.5)
    for threads in (1, 2, 3):
        for run in (cpu.step, in_two):
            with on_threads(threads):
                (terms, gradients), (again, gradients_again) = run(problems), run(problems)
            assert_equals_exact(problems, (terms, gradients), bound)
            for ours, same in zip(
                (*terms[:4], *vectors(gradients), gradients.temperature),
                (*again[:4], *vectors(gradients_again), gradients_again.temperature),
                strict=True,
            ):
                assert torch.equal(ours, same)


@pytest.mark.parametrize("rows", [1000, 2200])
def test_a_large_symmetric_step(rows: int) -> None:
    """Up to 2,048 rows the exponentials are kept for the second sweep, beyond they are made again."""
    problems = problems_of([(1, rows, rows, 8)], torch.float32, tau=0.07, symmetric=True)
    for threads in (1, 2):
        with on_threads(threads):
            found = cpu.step(problems)
        assert_equals_exact(problems, found, rounding(torch.float32, 8, 0.07))


SMALLER_TEAM = """
import torch
from hdc_kernels import fused_info_nce
from hdc_kernels.backends import cpu
torch.set_num_threads(3)
cpu.LEAST_SHARE = 1
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


def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give a smaller team, by OMP_THREAD_LIMIT or OMP_DYNAMIC: no rows may be left out."""
    in_a_new_process(SMALLER_TEAM, OMP_THREAD_LIMIT="2")


COMPARISON = """
import torch
from contrast_problems import FULL, HALF, assert_equals_exact, in_two, problems_of, rounding
from hdc_kernels.backends import cpu
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
    found = in_a_new_process(COMPARISON, HDC_INSTRUCTION_SET=name).strip()
    if not has_instructions(name):
        pytest.skip(f"this CPU has no {name}")
    assert found == name


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
    """In MiB: 80 for a batch of 16,384, whose logits would be 1,024, and 4 for one of 128."""
    small, large = (int(kib) / 1024 for kib in in_a_new_process(PEAK).split())
    assert small <= 4
    assert 16 <= large <= 80  # two gradients of 8 MiB at the very least: the measurement works
