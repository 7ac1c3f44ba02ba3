"""`contrast` under autograd and torch.func: derivatives of every order, hooks, autocast, in-place changes."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from contrast_problems import HALF, exact, leaves, randn, rounding
from equations import relative_error
from torch import Tensor

from hdc_kernels import fused_info_nce
from hdc_kernels.backends import Mask, Problems
from hdc_kernels.contrast import contrast


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


@pytest.mark.parametrize("backend", ["cpu", "torch", "chunked"])
def test_details(backend: str) -> None:
    """What is asked for beside the total changes neither it nor its gradients; means are those of the rows."""
    inputs = leaves((2, 3, 2), (2, 3, 2), (2, 4), (4, 4))
    options: dict[str, Any] = {"weights": (0.7, -1.2), "temperature": 0.6, "backend": backend}

    def total(detail: str, *xy: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = contrast([(xy[0], xy[1]), (xy[2], xy[3])], detail=detail, **options)
        return found.value, [] if found.means is None else [found.means]

    rows = contrast([inputs[:2], inputs[2:]], **options)
    slopes = torch.autograd.grad(rows.value, inputs)
    of_rows = torch.stack([rows.terms, rows.hits.double()]).split([6, 2], 1)
    expected = torch.stack([pair.mean(1) for pair in of_rows], 1)
    whole = torch.compile(total, fullgraph=True)
    for detail in ("total", "means"):
        alone = partial(total, detail)
        transformed = torch.func.grad_and_value(alone, (0, 1, 2, 3), has_aux=True)
        tangents, result = transformed(*inputs)
        torch.testing.assert_close(tangents, slopes, rtol=1e-13, atol=1e-15)
        with torch.no_grad():
            results = [result, alone(*inputs)]
        for result in (alone(*inputs), whole(detail, *inputs)):
            results.append(result)
            gradients = torch.autograd.grad(result[0], inputs)
            torch.testing.assert_close(gradients, slopes, rtol=1e-13, atol=1e-15)
        for value, means in results:
            torch.testing.assert_close(value, rows.value, rtol=1e-13, atol=0)
            if detail == "means":
                assert not means[0].requires_grad
                torch.testing.assert_close(means[0], expected, rtol=1e-13, atol=0)


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
    """Under no_grad and inference_mode, and never for the terms, hits and ranks beside the value."""
    x, y = leaves((6, 8), (6, 8))
    options: dict[str, Any] = {"weights": weights, "temperature": 0.5, "backend": backend}
    options["ranked"] = True
    recorded = contrast([(x, y)], **options)
    assert recorded.value.requires_grad
    assert not recorded.terms.requires_grad
    assert not recorded.hits.requires_grad
    assert recorded.ranks is not None
    assert not recorded.ranks.requires_grad
    assert recorded.means is None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = contrast([(x, y)], **options)
        for ours, same in zip(result[:4], recorded[:4], strict=True):
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_func(dtype: torch.dtype, symmetric: bool, reduction: Any) -> None:
    """`grad` and `vjp` give what autograd gives, to the last bit; `vjp` without grad mode, too."""
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
    with torch.no_grad():
        _, without_grad, *_ = torch.func.vjp(loss, *plain_inputs)
        pulled = without_grad(upstream)
    for found in (pull_back(upstream), pulled):
        assert all(map(torch.equal, found, expected))
    slopes = torch.func.grad(lambda *t: (loss(*t) * upstream).sum(), argnums=(0, 1, 2))
    for ours, same in zip(slopes(*plain_inputs), expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("weights", [None, (0.7,)])
def test_changing_ids_in_place(weights: tuple[float, ...] | None) -> None:
    """Before a backward pass that reads them: an error, not a gradient of other ids."""
    x, y = leaves((6, 4), (6, 4))
    ids = torch.arange(6).unsqueeze(0) % 2
    value = contrast([(x, y)], weights=weights, temperature=0.5, mask=Mask(ids=(ids, ids))).value
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_masks_that_kernels_cannot_read() -> None:
    """Other integers than int64 and other shapes are refused, not misread."""
    x, y = randn(6, 4), randn(6, 4)
    for ids, error in (
        (torch.arange(6).int().unsqueeze(0), TypeError),
        (torch.arange(6), ValueError),
    ):
        with pytest.raises(error, match="mask"):
            contrast([(x, y)], weights=None, temperature=0.5, mask=Mask(ids=(ids, ids)))
