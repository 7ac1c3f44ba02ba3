"""`hdc_kernels.pairwise`: reductions, biases, derivatives, transforms, torch.compile and memory.

The functions themselves are in `test_contrast_functions.py`.
"""

import sys
from typing import Any

import pytest
import torch
from contrast_problems import in_a_new_process, leaves, randn
from equations import relative_error
from pairwise_truth import FUNCTIONS, ONE_WAY, bound_of, evaluate, mask_of, sums_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hdc_kernels import reference
from hdc_kernels.backends import Function, Mask
from hdc_kernels.checks import FLOATING, Reduction
from hdc_kernels.pairwise import logsumexp, softplus_sum, sums

REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean")


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


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_columns(reduction: Reduction, dtype: torch.dtype) -> None:
    """A sum over nothing, without a gradient, whatever was in the kernel's memory before."""
    options: dict[str, Any] = {"reduction": reduction, "backend": "cpu"}
    scalars = torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    nan = torch.full((6, 8), torch.nan, dtype=dtype, requires_grad=True)
    all_functions(nan, nan.detach(), *scalars, **options).sum().backward()
    inputs = *leaves((6, 8), (0, 8), dtype=dtype), *scalars
    found = all_functions(*inputs, **options)
    for logarithm, softplus, tilted in found.detach().view(3, -1).T:
        assert logarithm == tilted == -torch.inf
        assert softplus == 0
    for slope in torch.autograd.grad(found, inputs, torch.ones_like(found)):
        assert torch.equal(slope, torch.zeros_like(slope))


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
