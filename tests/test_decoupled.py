"""`fused_dcl`, `fused_dclw` and their modules against the whole 2B×2B matrix in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree, no_worse_than_plain, weighted
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdc_kernels.cross_entropy import InfoNCEMetrics
from hdc_kernels.decoupled import DCL, DCLW, fused_dcl, fused_dclw
from hdc_kernels.nt_xent import fused_nt_xent


def plain(
    first: Tensor,
    second: Tensor,
    tau: float | Tensor,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """All rows with all rows, those of the same sample at −inf in the denominator."""
    z = torch.cat((first, second))
    z = F.normalize(z, dim=-1) if normalize else z
    s = z @ z.mT / tau
    sample = torch.arange(len(first)).repeat(2)
    positive = s.diagonal(offset=len(first)).repeat(2).view(2, -1)
    negative = s.masked_fill(sample[:, None] == sample, -math.inf).logsumexp(1).view(2, -1)
    loss = negative - weights * positive
    return loss if reduction == "none" else getattr(loss, reduction)()


def von_mises(first: Tensor, second: Tensor, sigma: float, normalize: bool = True) -> Tensor:
    """The paper's weights, [B]."""
    if normalize:
        first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    return 2 - len(first) * ((first * second).sum(1) / sigma).softmax(0).detach()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(2, 9),
    width=st.integers(1, 9),
    tau=st.sampled_from([0.05, 0.5, 3.0]),
    sigma=st.sampled_from([None, 0.5, 2.0]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backend=st.sampled_from(["auto", "torch", "chunked"]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients(
    batch: int,
    width: int,
    tau: float,
    sigma: float | None,
    normalize: bool,
    reduction: Any,
    backend: Any,
    seed: int,
) -> None:
    """Of both views and the temperature, with the weights of DCLW and without."""
    options = {"reduction": reduction, "normalize": normalize, "backend": backend}

    def ours(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        if sigma is None:
            return fused_dcl(a, b, temperature=t, **options)
        return fused_dclw(a, b, temperature=t, sigma=sigma, **options)

    def exact(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        weights = 1.0 if sigma is None else von_mises(a, b, sigma, normalize)
        return plain(a, b, t, weights, reduction, normalize)

    agree(
        ours,
        exact,
        randn(batch, width, seed=seed),
        randn(batch, width, seed=seed + 1),
        torch.tensor(tau, dtype=torch.float64),
        bound=1e-11,
        floor=1.0,
    )


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_weights_of_one_s_own_get_their_gradient(shape: tuple[int, ...]) -> None:
    """For samples or for rows."""
    agree(
        lambda a, b, w: fused_dcl(a, b, temperature=0.2, weights=w),
        lambda a, b, w: plain(a, b, 0.2, w),
        randn(5, 4),
        randn(5, 4, seed=1),
        randn(*shape, seed=2),
    )


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weights(reduction: Any, sigma: float | None, shape: tuple[int, ...]) -> None:
    """For samples or for rows, beside the weights of the positives; they get their gradient."""

    def ours(a: Tensor, b: Tensor, t: Tensor, w: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": t, "sample_weights": w, "reduction": reduction}
        return fused_dcl(a, b, **options) if sigma is None else fused_dclw(a, b, **options)

    def exact(a: Tensor, b: Tensor, t: Tensor, w: Tensor) -> Tensor:
        inner = 1.0 if sigma is None else von_mises(a, b, sigma)
        return weighted(plain(a, b, t, inner, "none"), w, reduction)

    tau = torch.tensor(0.3, dtype=torch.float64)
    agree(ours, exact, randn(5, 4), randn(5, 4, seed=1), tau, randn(*shape, seed=2).exp())


def test_nt_xent_is_dcl_with_the_positive_in_the_denominator() -> None:
    """NT-Xent = log(1 + exp DCL), row by row."""
    first, second = randn(5, 4), randn(5, 4, seed=1)
    decoupled = fused_dcl(first, second, temperature=0.3, reduction="none")
    together = fused_nt_xent(first, second, temperature=0.3, reduction="none")
    torch.testing.assert_close(decoupled.exp().log1p(), together, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [fused_dcl, fused_dclw])
def test_metrics(loss: Any, reduction: Any, backend: Any) -> None:
    """Of every row: its loss, the rank of its positive, and the denominator; the value stays."""
    first, second = randn(7, 4), randn(7, 4) + randn(7, 4, seed=1)
    first[2] = first[5]
    options: dict[str, Any] = {"reduction": reduction, "backend": backend}
    value, metrics = loss(first, second, return_metrics=True, **options)
    torch.testing.assert_close(value, loss(first, second, **options), rtol=1e-13, atol=0)
    assert isinstance(metrics, InfoNCEMetrics)
    weights = von_mises(first, second, 0.5) if loss is fused_dclw else 1.0
    terms = plain(first, second, 0.1, weights, "none")
    torch.testing.assert_close(metrics.loss, terms, rtol=1e-12, atol=1e-14)
    z = F.normalize(torch.cat((first, second)), dim=-1)
    sample = torch.arange(7).repeat(2)
    s = (z @ z.mT / 0.1).masked_fill(sample[:, None] == sample, -math.inf)
    torch.testing.assert_close(metrics.logsumexp, s.logsumexp(1).view(2, 7), rtol=1e-12, atol=0)
    ranks = (s >= (z * z.roll(7, 0)).sum(1, keepdim=True) / 0.1).sum(1)
    assert 0 < (ranks == 0).sum() < 14
    assert metrics.rank.tolist() == ranks.view(2, 7).tolist()
    assert metrics.accuracy.item() == pytest.approx((ranks == 0).double().mean().item())


@pytest.mark.parametrize("loss", [fused_dcl, fused_dclw])
def test_one_sample_is_refused(loss: Any) -> None:
    """It has no negatives, and their sum no logarithm."""
    with pytest.raises(ValueError, match=r"first has shape \[1, 4\]; B must be at least 2"):
        loss(randn(1, 4), randn(1, 4))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: Any) -> None:
    """First and second derivatives for both views, the temperature and both weights."""
    inputs = (randn(3, 3), randn(3, 3, seed=1), torch.tensor(0.4).double(), *randn(2, 3, seed=2))
    for x in inputs:
        x.requires_grad_()

    def loss(first: Tensor, second: Tensor, tau: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return fused_dcl(
            first,
            second,
            temperature=tau,
            weights=inner,
            sample_weights=outer,
            reduction=reduction,
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_equals_eager() -> None:
    """One graph, where the peer has five breaks; into C++ without weights, which takes long."""
    torch.compiler.reset()
    compiled = torch.compile(fused_dclw, fullgraph=True)
    views = randn(6, 5), randn(6, 5, seed=1)
    agree(compiled, fused_dclw, *views)

    def loss(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        return fused_dclw(first, second, sample_weights=weights)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    agree(compiled, loss, *views, randn(6, seed=2).exp())
    compiled = torch.compile(fused_dcl, fullgraph=True, backend="aot_eager")
    found, expected = (f(*views, return_metrics=True) for f in (compiled, fused_dcl))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 at most twice that of the plain loss in that dtype; a NaN fails every comparison."""
    half = [randn(24, 32, seed=k, dtype=dtype).requires_grad_() for k in range(2)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours = fused_dcl(*half, temperature=tau)
    theirs, truth = plain(*half, tau), plain(*exact, tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = (
        torch.autograd.grad(loss, x) for loss, x in ((ours, half), (theirs, half), (truth, exact))
    )
    for our, their, slope in zip(*slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_weights_is_no_worse_than_plain(dtype: torch.dtype) -> None:
    """Of positives and of rows."""
    inner, outer = randn(24, seed=2).float(), randn(2, 24, seed=3).exp().float()
    no_worse_than_plain(
        lambda a, b: fused_dcl(a, b, temperature=0.1, weights=inner, sample_weights=outer),
        lambda a, b: weighted(plain(a, b, 0.1, inner, "none"), outer, "mean"),
        *(randn(24, 32, seed=k, dtype=dtype) for k in range(2)),
    )


def test_autocast_changes_nothing() -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    views = randn(5, 4, dtype=torch.float32), randn(5, 4, seed=1, dtype=torch.float32)
    outside = fused_dclw(*views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_dclw(*views)
    assert torch.equal(inside, outside)


def test_nan_is_not_hidden() -> None:
    """It spoils the rows of all other samples, and its own positive's."""
    first = randn(3, 4)
    first[1, 2] = math.nan
    assert fused_dcl(first, randn(3, 4, seed=1), reduction="none").isnan().all()


def test_modules_equal_functions() -> None:
    """Every option reaches the function; a parameter is learnt."""
    first, second, weights = randn(5, 4), randn(5, 4, seed=1), randn(5, seed=2)
    for options in ({}, {"reduction": "none"}, {"normalize": False}, {"backend": "chunked"}):
        module = DCL(0.3, **options)
        given = {"weights": weights, "sample_weights": weights.exp()}
        expected = fused_dcl(first, second, temperature=0.3, **given, **options)
        assert torch.equal(module(first, second, **given), expected)
        by_hardness = DCLW(0.3, 0.7, **options)
        given = {"sample_weights": weights.exp()}
        expected = fused_dclw(first, second, temperature=0.3, sigma=0.7, **given, **options)
        assert torch.equal(by_hardness(first, second, **given), expected)
        for name, value in options.items():
            assert f"{name}={value!r}" in repr(module)
            assert f"{name}={value!r}" in repr(by_hardness)
    learnt = DCL(nn.Parameter(torch.tensor(0.2)))
    learnt(first, second).backward()
    assert learnt.temperature.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0.0; it must be positive and finite"),
        ({"sigma": "a"}, "sigma is a str; it must be a number"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be positive"),
        ({"reduction": "max"}, "reduction is 'max'; it must be one"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        fused_dclw(randn(3, 4), randn(3, 4, seed=1), **options)


@pytest.mark.parametrize("weights", [torch.ones(4), torch.ones(3, 2), torch.ones(())])
def test_weights_have_one_entry_for_each_sample_or_row(weights: Tensor) -> None:
    """[B] or [2, B]."""
    for name in ("weights", "sample_weights"):
        with pytest.raises(ValueError, match=rf"^{name} has shape .* must be \[3\] or \[2, 3\]"):
            fused_dcl(randn(3, 4), randn(3, 4, seed=1), **{name: weights})
