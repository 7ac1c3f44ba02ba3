"""`fused_nt_xent` and `NTXent` against the whole 2B×2B matrix in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdc_kernels.nt_xent import NTXent, fused_nt_xent


def plain(
    first: Tensor,
    second: Tensor,
    tau: float | Tensor,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """What everyone writes: all rows with all rows, themselves at −inf."""
    z = torch.cat((first, second))
    z = F.normalize(z, dim=-1) if normalize else z
    s = (z @ z.mT / tau).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    loss = F.cross_entropy(s, torch.arange(len(z)).roll(len(first)), reduction=reduction)
    return loss.view(2, -1) if reduction == "none" else loss


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(2, 9),
    width=st.integers(1, 9),
    tau=st.sampled_from([0.05, 0.5, 3.0]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backend=st.sampled_from(["auto", "torch", "chunked"]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients(
    batch: int, width: int, tau: float, normalize: bool, reduction: Any, backend: Any, seed: int
) -> None:
    """Of both views and the temperature."""
    agree(
        lambda a, b, t: fused_nt_xent(
            a, b, temperature=t, reduction=reduction, normalize=normalize, backend=backend
        ),
        lambda a, b, t: plain(a, b, t, reduction, normalize),
        randn(batch, width, seed=seed),
        randn(batch, width, seed=seed + 1),
        torch.tensor(tau, dtype=torch.float64),
        bound=1e-11,
        floor=1.0,
    )


def test_one_sample_has_nothing_to_learn() -> None:
    """Each row has its positive and nothing else."""
    first, second = randn(1, 4).requires_grad_(), randn(1, 4, seed=1).requires_grad_()
    loss = fused_nt_xent(first, second)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (first, second)):
        assert gradient.count_nonzero() == 0


def test_the_order_of_the_views_does_not_matter() -> None:
    """It is symmetric by definition."""
    first, second = randn(5, 4), randn(5, 4, seed=1)
    there, back = (
        fused_nt_xent(*views, reduction="none") for views in ((first, second), (second, first))
    )
    torch.testing.assert_close(there, back.flip(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: Any) -> None:
    """First and second derivatives for both views and the temperature."""
    inputs = (randn(3, 3), randn(3, 3, seed=1), torch.tensor(0.4, dtype=torch.float64))
    for x in inputs:
        x.requires_grad_()

    def loss(first: Tensor, second: Tensor, tau: Tensor) -> Tensor:
        return fused_nt_xent(first, second, temperature=tau, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_equals_eager() -> None:
    """One graph, where the peer has two breaks."""
    torch.compiler.reset()
    compiled = torch.compile(fused_nt_xent, fullgraph=True)
    agree(compiled, fused_nt_xent, randn(6, 5), randn(6, 5, seed=1))


@pytest.mark.parametrize("tau", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 at most twice that of the plain loss in that dtype; a NaN fails every comparison."""
    half = [randn(24, 32, seed=k, dtype=dtype).requires_grad_() for k in range(2)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours = fused_nt_xent(*half, temperature=tau)
    theirs, truth = plain(*half, tau), plain(*exact, tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = (
        torch.autograd.grad(loss, x) for loss, x in ((ours, half), (theirs, half), (truth, exact))
    )
    for our, their, slope in zip(*slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


def test_nan_is_not_hidden() -> None:
    """One spoils every row, for each compares with it."""
    first = randn(3, 4)
    first[1, 2] = math.nan
    assert fused_nt_xent(first, randn(3, 4, seed=1), reduction="none").isnan().all()


def test_module_equals_function() -> None:
    """Every option reaches the function; a parameter is learnt."""
    first, second = randn(5, 4), randn(5, 4, seed=1)
    for options in ({}, {"reduction": "none"}, {"normalize": False}, {"backend": "chunked"}):
        module = NTXent(0.3, **options)
        assert torch.equal(
            module(first, second), fused_nt_xent(first, second, temperature=0.3, **options)
        )
        for name, value in options.items():
            assert f"{name}={value!r}" in repr(module)
    module = NTXent(nn.Parameter(torch.tensor(0.2)))
    module(first, second).backward()
    assert module.temperature.grad is not None


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((randn(3, 4), randn(2, 4)), {}, r"second has shape \[2, 4\] but first has \[3, 4\]"),
        ((randn(2, 3, 4), randn(2, 3, 4)), {}, r"first has shape \[2, 3, 4\]; it must be \[B, D\]"),
        ((randn(3, 4), randn(3, 4)), {"temperature": 0}, "temperature is 0; it must be positive"),
        ((randn(3, 4), randn(3, 4)), {"reduction": "max"}, "reduction is 'max'; it must be one"),
        ((randn(3, 4), randn(3, 4)), {"backend": "gpu"}, "backend is 'gpu'; it must be one"),
    ],
)
def test_errors(inputs: tuple[Tensor, Tensor], options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises(ValueError, match=message):
        fused_nt_xent(*inputs, **options)
