"""`contrast` under torch.compile: operators, one graph for every batch size, and what it refuses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contrast_problems import every_other, groups_last, leaves, randn, sliced, transposed
from equations import relative_error
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from hdc_kernels import fused_hd_nce, fused_info_nce
from hdc_kernels.contrast import contrast


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
    nothing = (None, None, None, None)  # neither a bias nor ids nor entries left out
    rest = (*options, "cpu", "info_nce", True, False, False, 1.0)
    for detail in ("total", "means", "rows"):
        inputs = (x, y, tau, *nothing, weights, detail, *rest)
        torch.library.opcheck(operators.contrast_total, inputs)
    torch.library.opcheck(operators.contrast_terms, (x, y, tau, *nothing, *rest))
    with torch.no_grad():
        terms, _, _, lse = operators.contrast_terms(x, y, tau, *nothing, *rest)
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
