"""The opt-in of backend "cpu" to bfloat16 products: PyTorch's own switch, and no worse than plain bfloat16."""

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from equations import relative_error
from torch import Tensor

from hdc_kernels.backends import Problems, cpu

pytestmark = pytest.mark.skipif(
    not cpu.multiplies_bfloat16(), reason="this CPU has no AVX-512 BF16 instructions"
)
SHAPES = [(1, 5, 3), (2, 33, 128), (1, 261, 70), (3, 17, 200), (1, 300, 16)]  # G, B, D


@pytest.fixture
def medium() -> Iterator[None]:
    """Opted in, and out again."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def problems_of(
    shape: tuple[int, int, int], dtype: torch.dtype, symmetric: bool, noise: float | None = None
) -> Problems:
    """Random embeddings, or with `noise` pairs that are equal but for it."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, y = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    if noise is not None:
        y = x + noise * y
    weights = (1 / (shape[0] * shape[1]),)
    return Problems((x.to(dtype),), (y.to(dtype),), weights, 0.07, True, symmetric)


def plainly(problems: Problems, dtype: torch.dtype) -> list[Tensor]:
    """Total and gradients as everyone writes them, in `dtype`."""
    x, y = (side[0].to(dtype).requires_grad_() for side in (problems.x, problems.y))
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT / problems.temperature
    labels = torch.arange(x.shape[1]).repeat(x.shape[0])
    loss = F.cross_entropy(logits.flatten(0, 1), labels)
    if problems.symmetric:
        loss = (loss + F.cross_entropy(logits.mT.flatten(0, 1), labels)) / 2
    return [loss, *torch.autograd.grad(loss, (x, y))]


def stepped(problems: Problems) -> list[Tensor]:
    """Total and gradients by one call."""
    terms, gradients = cpu.step(problems)
    return [terms.total, gradients.x[0], gradients.y[0]]


def in_two_passes(problems: Problems) -> list[Tensor]:
    """The same by forward and backward."""
    terms = cpu.forward(problems)
    upstream = torch.full_like(terms.loss, problems.weights[0])
    gradients = cpu.backward(problems, terms.lse, upstream)
    return [terms.total, gradients.x[0], gradients.y[0]]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [relative_error(a, e.detach()) for a, e in zip(found, expected, strict=True)]


@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("evaluate", [stepped, in_two_passes])
@pytest.mark.parametrize("noise", [None, 1e-2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_bfloat16(
    shape: tuple[int, int, int], dtype: torch.dtype, symmetric: bool, noise: float | None, evaluate
) -> None:
    """On random data and near convergence; 2⁻⁸ is what one rounding of a result to bfloat16 may do."""
    problems = problems_of(shape, dtype, symmetric, noise)
    exact = plainly(problems, torch.float64)
    theirs = errors(plainly(problems, torch.bfloat16), exact)
    for ours, plain in zip(errors(evaluate(problems), exact), theirs, strict=True):
        assert ours <= 2 * plain + 2**-8


def test_it_is_an_opt_in() -> None:
    """Without it float32 is float32; with it only float32 and bfloat16 change, and a lot less than 1 %."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problems = problems_of((1, 64, 128), dtype, False)
        exact = stepped(problems)
        torch.set_float32_matmul_precision("medium")
        found = stepped(problems)
        torch.set_float32_matmul_precision("highest")
        rounded = dtype in (torch.float32, torch.bfloat16)
        assert torch.equal(found[1], exact[1]) is not rounded
        assert relative_error(found[1], exact[1]) < 0.01


@pytest.mark.usefixtures("medium")
def test_equal_embeddings_still_tie() -> None:
    """Hits compare products with each other, whatever they are rounded to."""
    one = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0)).expand(1, 40, 128)
    terms, _ = cpu.step(Problems((one,), (one,), (1.0,), 0.07, True, False))
    assert not terms.hits.any()
