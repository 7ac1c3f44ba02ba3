"""What the C++ backend of `contrast` loses in 16 and 32 bits, at any temperature: no more than plain PyTorch."""

import math

import pytest
import torch
from contrast_problems import (
    FULL,
    HALF,
    Shape,
    assert_equals_exact,
    exact,
    in_two,
    plainly,
    problems_of,
    randn,
    rounding,
    vectors,
)
from equations import relative_error
from torch import Tensor

from hdc_kernels.backends import Problems, cpu
from hdc_kernels.contrast import contrast


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
