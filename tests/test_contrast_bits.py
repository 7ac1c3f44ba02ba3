"""What changes no bit of what the C++ backend finds: strides, what else is asked for, one tensor twice, chance."""

import itertools
from collections.abc import Callable

import pytest
import torch
from contrast_problems import FULL, LAYOUTS, Shape, in_two, on_threads, randn, vectors
from pairwise_truth import FUNCTIONS, ONE_WAY, assert_equals_truth, evaluate, mask_of, sums_of
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Function, Gradients, Mask, Terms, cpu
from hdc_kernels.checks import FLOATING


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
