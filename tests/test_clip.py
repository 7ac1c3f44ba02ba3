"""`fused_clip` and `CLIP` against both cross-entropies of the whole matrix in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdc_kernels.clip import CLIP, fused_clip


def plain(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """What everyone writes."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    s, own = scale * image @ text.mT, torch.arange(len(image))
    there, back = (F.cross_entropy(x, own, reduction=reduction) for x in (s, s.mT))
    return (there + back) / 2


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 9),
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
    """Of images, texts and the temperature."""
    agree(
        lambda a, b, t: fused_clip(
            a, b, temperature=t, reduction=reduction, normalize=normalize, backend=backend
        ),
        lambda a, b, t: plain(a, b, 1 / t, reduction, normalize),
        randn(batch, width, seed=seed),
        randn(batch, width, seed=seed + 1),
        torch.tensor(tau, dtype=torch.float64),
        bound=1e-11,
        floor=1.0,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: Any) -> None:
    """First and second derivatives for images, texts and the temperature."""
    inputs = (randn(4, 3), randn(4, 3, seed=1), torch.tensor(0.3, dtype=torch.float64))
    for x in inputs:
        x.requires_grad_()

    def loss(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
        return fused_clip(image, text, temperature=tau, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_the_module_learns_its_scale() -> None:
    """It starts at 1/0.07, has open_clip's name, and gets the gradient of log(1/τ)."""
    module = CLIP().double()
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]
    assert module.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-7)
    image, text = randn(6, 4), randn(6, 4, seed=1)
    loss = module(image, text)
    loss.backward()
    log_scale = module.logit_scale.detach().clone().requires_grad_()
    exact = plain(image, text, log_scale.exp())
    (slope,) = torch.autograd.grad(exact, log_scale)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    assert module.logit_scale.grad is not None
    assert module.logit_scale.grad.item() == pytest.approx(slope.item(), rel=1e-11)


def test_the_scale_stays_within_its_bound_and_comes_back() -> None:
    """A step over the bound is undone by the next forward pass, where the gradient is not 0."""
    module = CLIP(max_scale=100.0).double()
    with torch.no_grad():
        module.logit_scale.fill_(math.log(1000))
    image = randn(6, 4)
    text = image.roll(1, 0)  # every positive is wrong: the scale should fall
    loss = module(image, text)
    assert module.logit_scale.exp().item() == pytest.approx(100)
    assert loss.item() == pytest.approx(plain(image, text, 100.0).item(), rel=1e-12)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    loss.backward()
    optimizer.step()
    assert module.logit_scale.exp().item() < 100


def test_two_forward_passes_before_the_backward_pass() -> None:
    """Bounding the parameter in place does not invalidate an earlier graph."""
    module = CLIP(100.0).double()
    losses = [module(randn(4, 3, seed=k), randn(4, 3, seed=k + 2)) for k in range(2)]
    torch.stack(losses).sum().backward()
    assert module.logit_scale.grad is not None


def test_no_bound() -> None:
    """With infinity, the scale is free."""
    module = CLIP(1000.0, max_scale=math.inf).double()
    module(randn(4, 3), randn(4, 3, seed=1))
    assert module.logit_scale.exp().item() == pytest.approx(1000)


def test_state_dict() -> None:
    """The scale is saved."""
    module, other = CLIP(3.0), CLIP(5.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.logit_scale, module.logit_scale)


def test_compiled_equals_eager() -> None:
    """One graph, of the module, too."""
    torch.compiler.reset()
    image, text = randn(6, 5), randn(6, 5, seed=1)
    agree(torch.compile(fused_clip, fullgraph=True), fused_clip, image, text)
    module = CLIP().double()
    with torch.no_grad():
        module.logit_scale.fill_(6.0)
    agree(torch.compile(module, fullgraph=True), module, image, text)
    assert module.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 at most twice that of the plain loss in that dtype; a NaN fails every comparison."""
    half = [randn(24, 32, seed=k, dtype=dtype).requires_grad_() for k in range(2)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours = fused_clip(*half, temperature=tau)
    theirs, truth = plain(*half, 1 / tau), plain(*exact, 1 / tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = (
        torch.autograd.grad(loss, x) for loss, x in ((ours, half), (theirs, half), (truth, exact))
    )
    for our, their, slope in zip(*slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


def test_module_equals_function() -> None:
    """Every option reaches the function, and shows in the module's text."""
    image, text = randn(5, 4), randn(5, 4, seed=1)
    for options in ({}, {"reduction": "none"}, {"normalize": False}, {"backend": "torch"}):
        module = CLIP(5.0, **options).double()
        expected = fused_clip(image, text, temperature=(-module.logit_scale).exp(), **options)
        assert torch.equal(module(image, text), expected)
        for name, value in options.items():
            assert f"{name}={value!r}" in repr(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; it must be positive, finite and at most max_scale, 100.0"),
        ({"scale": 101}, "scale is 101; it must be positive, finite and at most max_scale"),
        ({"scale": math.inf, "max_scale": math.inf}, "scale is inf"),
        ({"max_scale": math.nan}, "max_scale, nan"),
        ({"scale": "1"}, "scale is a str; it must be a number"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_errors_of_the_module(options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        CLIP(**options)


def test_errors() -> None:
    """Every image has one text."""
    with pytest.raises(ValueError, match=r"text has shape \[4, 4\] but image has \[3, 4\]"):
        fused_clip(randn(3, 4), randn(4, 4))
