"""`fused_siglip` and `SigLIP` against the paper's sum over the whole matrix, in float64."""

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from embeddings import leaf
from equations import relative_error
from torch import Tensor

from hdc_kernels.checks import FLOATING, Backend, Reduction
from hdc_kernels.siglip import SigLIP, fused_siglip

BACKENDS = [b for b in get_args(Backend) if b not in ("triton", "cuda")]
REDUCTIONS = get_args(Reduction)
HALF = (torch.bfloat16, torch.float16)


def scalar(value: float) -> Tensor:
    """A learnable number."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def plain(image: Tensor, text: Tensor, tau: Any, bias: Any, *, normalize: bool = True) -> Tensor:
    """Every image's sum over the texts, from the matrix of pairs."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = image @ text.mT / tau + bias
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_are_the_papers(
    reduction: Reduction, normalize: bool, backend: Backend
) -> None:
    """For square and further texts, a mild and a strong scale: 1e-12 is 5,000 roundings."""
    for seed, (texts, tau_value, bias_value) in enumerate(
        [(7, 0.1, -10.0), (7, 0.01, 3.0), (11, 1.0, 0.0)]
    ):
        image, text = leaf(7, 5, seed=seed), leaf(texts, 5, seed=seed + 10)
        tau, bias = scalar(tau_value), scalar(bias_value)
        inputs = (image, text, tau, bias)
        loss = fused_siglip(
            image,
            text,
            temperature=tau,
            bias=bias,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
        )
        terms = plain(*inputs, normalize=normalize)
        expected = {"none": terms, "sum": terms.sum(), "mean": terms.sum() / 7}[reduction]
        assert loss.dtype == torch.float64
        assert relative_error(loss, expected) < 1e-12
        upstream = leaf(7, seed=seed + 20).detach() if reduction == "none" else None
        found = torch.autograd.grad(loss, inputs, upstream)
        exact = torch.autograd.grad(expected, inputs, upstream)
        for ours, truth in zip(found, exact, strict=True):
            assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction: Reduction) -> None:
    """First and second derivatives for image, text, temperature and bias."""

    def loss(image: Tensor, text: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
        return fused_siglip(image, text, temperature=tau, bias=bias, reduction=reduction)

    inputs = (leaf(3, 3), leaf(4, 3, seed=1), scalar(0.3), scalar(-1.0))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_equals_eager() -> None:
    """One graph, without a break, forward and backward."""
    torch.compiler.reset()
    inputs = (leaf(6, 5), leaf(6, 5, seed=1), scalar(0.2), scalar(-2.0))

    def loss(image: Tensor, text: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
        return fused_siglip(image, text, temperature=tau, bias=bias)

    losses = [f(*inputs) for f in (torch.compile(loss, fullgraph=True), loss)]
    assert relative_error(losses[0], losses[1]) < 1e-13
    ours, exact = (torch.autograd.grad(value, inputs) for value in losses)
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 on the same numbers, loss and gradients, at most twice the plain loss's.

    A NaN, as of an overflow at τ = 0.01, fails every comparison.
    """
    half = (leaf(33, 64, dtype=dtype), leaf(33, 64, seed=1, dtype=dtype))
    exact = tuple(x.detach().double().requires_grad_() for x in half)
    truth = plain(*exact, tau, -10.0).mean()
    ours = fused_siglip(*half, temperature=tau)
    theirs = plain(*half, tau, -10.0).mean()
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = torch.autograd.grad(truth, exact)
    found = zip(torch.autograd.grad(ours, half), torch.autograd.grad(theirs, half), strict=True)
    for slope, (our, their) in zip(slopes, found, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_batch_of_one(dtype: torch.dtype, backend: Backend) -> None:
    """One pair, which belongs together: log(1 + exp(−(1/τ·cos + b)))."""
    image = leaf(1, 8, dtype=dtype)
    loss = fused_siglip(image, image.detach(), temperature=0.5, bias=-1.0, backend=backend)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend: Backend) -> None:
    """A NaN image spoils its own term, a NaN text every one."""
    clean, spoilt = leaf(3, 4).detach(), leaf(3, 4).detach()
    spoilt[1, 2] = math.nan
    by_image = fused_siglip(spoilt, clean, reduction="none", backend=backend)
    assert by_image.isnan().tolist() == [False, True, False]
    assert fused_siglip(clean, spoilt, reduction="none", backend=backend).isnan().all()


def test_autocast_changes_nothing() -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    inputs = (leaf(9, 16, dtype=torch.float32), leaf(9, 16, seed=1, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_siglip(*inputs)
    assert torch.equal(inside, fused_siglip(*inputs))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_of_one_element(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """However one number is wrapped, the loss keeps its shape and dtype, the number gets its gradient."""
    image, text = leaf(5, 4, dtype=torch.float32), leaf(5, 4, seed=1, dtype=torch.float32)
    tau = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    bias = torch.full(shape, -2.0, dtype=dtype, requires_grad=True)
    terms = fused_siglip(image, text, temperature=tau, bias=bias, reduction="none")
    assert terms.shape == (5,)
    assert terms.dtype == torch.float32
    found = torch.autograd.grad(terms.sum(), (tau, bias))
    numbers = (scalar(0.25), scalar(-2.0))
    exact = torch.autograd.grad(plain(image.double(), text.double(), *numbers).sum(), numbers)
    for ours, truth in zip(found, exact, strict=True):
        assert ours.shape == shape
        assert ours.item() == pytest.approx(truth.item(), rel=max(torch.finfo(dtype).eps, 1e-5))


def test_module_learns_the_papers_scale_and_bias() -> None:
    """log 10 and −10 at first; both are parameters under open_clip's names, and get their gradients."""
    module = SigLIP().double()
    assert {name: p.item() for name, p in module.named_parameters()} == {
        "logit_scale": pytest.approx(math.log(10)),
        "logit_bias": -10.0,
    }
    image, text = leaf(6, 4), leaf(6, 4, seed=1)
    loss = module(image, text)
    scale, bias = scalar(module.logit_scale.item()), scalar(-10.0)
    expected = plain(image, text, 1 / scale.exp(), bias).mean()
    assert relative_error(loss, expected) < 1e-12
    found = torch.autograd.grad(loss, (module.logit_scale, module.logit_bias))
    for ours, truth in zip(found, torch.autograd.grad(expected, (scale, bias)), strict=True):
        assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"normalize": False}, {"backend": "torch"}]
)
def test_module_equals_function(options: dict[str, Any]) -> None:
    """Every option reaches the function, and shows in the module's text."""
    image, text = leaf(5, 4), leaf(5, 4, seed=1)
    module = SigLIP(4.0, -3.0, **options).double()
    expected = fused_siglip(image, text, temperature=0.25, bias=-3.0, **options)
    torch.testing.assert_close(module(image, text), expected, rtol=1e-6, atol=0)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be positive"),
        ({"bias": "b"}, TypeError, "bias is a str; it must be a number or a tensor"),
        ({"bias": math.inf}, ValueError, "bias is inf; it must be finite"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias is a float32 tensor \[2\]; as a tensor"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; it must be one of"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; it must be one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """One line that says what was given and what is allowed."""
    with pytest.raises(error, match=message):
        fused_siglip(leaf(3, 4), leaf(3, 4), **options)


def test_wrong_inputs() -> None:
    """Every image has its text; one set of problems; numbers for the module."""
    with pytest.raises(ValueError, match=r"text has shape \[2, 4\] but image has \[3, 4\]"):
        fused_siglip(leaf(3, 4), leaf(2, 4))
    with pytest.raises(ValueError, match=r"image has shape \[2, 3, 4\]; it must be \[B, D\]"):
        fused_siglip(leaf(2, 3, 4), leaf(2, 3, 4))
    with pytest.raises(ValueError, match="scale is 0; it must be positive and finite"):
        SigLIP(0)
    with pytest.raises(TypeError, match="scale is a str; it must be a number"):
        SigLIP("10")  # type: ignore[arg-type]
