"""The Triton backend under the registered operators: `torch.library.opcheck`, and `torch.compile` without a break."""

from typing import Any, NamedTuple

import pytest
import torch
from gpu_problems import DEVICE, GPU
from torch import Tensor

from hdc_kernels.backends import Detail, Function
from hdc_kernels.contrast import contrast

pytest.importorskip("hdc_kernels.backends.triton", exc_type=ModuleNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log(0)


class Case(NamedTuple):
    """Pairs of (G, M, N, D) and what they become."""

    shapes: tuple[tuple[int, int, int, int], ...]
    dtype: torch.dtype
    function: Function = "info_nce"
    symmetric: bool = False
    learned: bool = True
    ids: bool = False
    detail: Detail = "rows"
    transposed: bool = False  # columns of a matrix, which kernels do not read as they are

    def inputs(self) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
        """x, y, τ and softplus's bias, all of which want gradients."""
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            made = torch.randn(shape, generator=generator).to(DEVICE, dtype)
            return made.requires_grad_()

        def embeddings(groups: int, rows: int, width: int) -> Tensor:
            if self.transposed:
                return leaf(groups, width, rows, dtype=self.dtype).detach().mT.requires_grad_()
            return leaf(groups, rows, width, dtype=self.dtype)

        x = [embeddings(G, M, D) for G, M, _, D in self.shapes]
        y = [embeddings(G, N, D) for G, _, N, D in self.shapes]
        tau = torch.tensor(0.3, device=DEVICE).requires_grad_() if self.learned else None
        rows = sum(G * M for G, M, _, _ in self.shapes)
        return x, y, tau, leaf(rows) if self.function == "softplus" else None

    def masks(self) -> tuple[Tensor | None, Tensor | None, None]:
        """Ids of rows and columns, and no single entries."""
        if not self.ids:
            return None, None, None
        G, M, N, _ = self.shapes[0]
        rows, columns = (torch.arange(G * n, device=DEVICE).view(G, n) % 3 for n in (M, N))
        return rows, columns, None


CASES = [
    Case(((1, 5, 5, 8), (2, 4, 6, 3)), torch.float32, detail="means"),
    Case(((1, 5, 5, 8),), torch.bfloat16, symmetric=True, learned=False, detail="total"),
    Case(((1, 5, 5, 8),), torch.float16),
    Case(((1, 5, 7, 8),), torch.float16, "logsumexp", ids=True),
    Case(((1, 5, 7, 8),), torch.float32, "softplus"),
    Case(((1, 5, 5, 8),), torch.float32, transposed=True),
    Case(((2, 5, 7, 8),), torch.bfloat16, "softplus", transposed=True),
    Case(((1, 5, 7, 8),), torch.float32, "tilted", learned=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_are_sound(case: Case) -> None:
    """Schemas, fake tensors (shapes, dtypes and strides), autograd and dynamic shapes of all three."""
    operators = torch.ops.hdc_kernels
    x, y, tau, bias = case.inputs()
    temperature = 0.0 if case.learned else 0.3
    rest = (temperature, case.symmetric, True, 0, "triton", case.function, True, False, False, 1.0)
    selected = case.masks()
    weights = [0.5, -1.5][: len(x)]
    inputs = (x, y, tau, bias, *selected, weights, case.detail, *rest)
    torch.library.opcheck(operators.contrast_total, inputs)
    torch.library.opcheck(operators.contrast_terms, (x, y, tau, bias, *selected, *rest))
    x, y = ([t.detach() for t in side] for side in (x, y))
    tau, bias = (None if t is None else t.detach() for t in (tau, bias))
    terms, _, _, lse = operators.contrast_terms(x, y, tau, bias, *selected, *rest)
    arguments = (x, y, tau, bias, *selected, lse, torch.ones_like(terms), *rest)
    torch.library.opcheck(operators.contrast_gradient, arguments)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager(case: Case, weighted: bool) -> None:
    """One graph, the same kernels: the same bits, or nearly, as PyTorch may fuse what is around them."""
    torch.compiler.reset()
    x, y, tau, bias = case.inputs()
    leaves = [t for t in (*x, *y, tau, bias) if t is not None]
    options: dict[str, Any] = {
        "weights": [0.5, -1.5][: len(x)] if weighted else None,
        "temperature": 0.3 if tau is None else tau,
        "symmetric": case.symmetric,
        "function": case.function,
        "backend": "triton",
        "bias": bias,
    }

    def loss() -> Tensor:
        return contrast(list(zip(x, y, strict=True)), **options).value.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    results = [(value, torch.autograd.grad(value, leaves)) for value in (compiled(), loss())]
    (ours, slopes), (eager, expected) = results
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)
    rounding = 2 * torch.finfo(case.dtype).eps
    for found, exact in zip(slopes, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=rounding, atol=1e-7)
