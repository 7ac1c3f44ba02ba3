"""`fused_info_nce` and `InfoNCE` against the paper's Eq. 1 in plain Python, in every backend."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import equations
import pytest
import torch
import torch.nn.functional as F
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdc_kernels import InfoNCE, fused_info_nce
from hdc_kernels.checks import FLOATING, Backend, Reduction

BACKENDS = [b for b in get_args(Backend) if b not in ("triton", "cuda")]  # GPUs': elsewhere
REDUCTIONS = get_args(Reduction)
HALF = (torch.bfloat16, torch.float16)


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A query and a key, leaves that require their gradients."""
    query, key = randn(*shape, seed=2 * seed), randn(*shape, seed=2 * seed + 1)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def plain(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """What everyone writes: in half precision, the error that ours is measured by."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature
    return F.cross_entropy(logits, torch.arange(len(query)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_are_eq_1(
    reduction: Reduction, symmetric: bool, normalize: bool, backend: Backend
) -> None:
    """ "sum" is Eq. 1, "mean" divides by B, "none" keeps the terms; 1e-10 is 1e5 roundings."""
    query, key = pair(6, 5)
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    loss = fused_info_nce(
        query,
        key,
        temperature=tau,
        symmetric=symmetric,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    inputs = (query.tolist(), key.tolist(), 0.07)
    terms = (equations.symmetric if symmetric else equations.info_nce)(*inputs, normalize)
    share = 1 / 6 if reduction == "mean" else 1.0
    expected = terms if reduction == "none" else share * math.fsum(terms)
    assert loss.dtype == torch.float64
    assert equations.relative_error(loss, expected) < 1e-12

    weights = [0.5, -2.0, 1.0, 0.0, 3.0, -0.1] if reduction == "none" else [share] * 6
    upstream = torch.tensor(weights, dtype=torch.float64) if reduction == "none" else None
    found = torch.autograd.grad(loss, (query, key, tau), upstream)
    slope = equations.symmetric_gradient if symmetric else equations.info_nce_gradient
    for ours, exact in zip(found, slope(*inputs, weights, normalize), strict=True):
        assert equations.relative_error(ours, exact) < 1e-10


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction: Reduction, symmetric: bool) -> None:
    """First and second derivatives for query, key and temperature: a gradient penalty works."""
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(query: Tensor, key: Tensor, tau: Tensor) -> Tensor:
        return fused_info_nce(query, key, temperature=tau, symmetric=symmetric, reduction=reduction)

    inputs = (*pair(4, 3), tau)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_the_batch_are_negatives_of_every_query(backend: Backend) -> None:
    """N > B: they are in every denominator and get a gradient, but are nobody's positive."""
    query, key = randn(3, 4).requires_grad_(), randn(8, 4, seed=1).requires_grad_()
    loss = fused_info_nce(query, key, temperature=0.2, reduction="sum", backend=backend)
    expected = equations.info_nce(query.tolist(), key.tolist(), 0.2)
    assert loss.item() == pytest.approx(math.fsum(expected), rel=1e-12)
    found = torch.autograd.grad(loss, (query, key))
    exact = equations.info_nce_gradient(query.tolist(), key.tolist(), 0.2, [1.0] * 3)
    for ours, truth in zip(found, exact[:2], strict=True):
        assert equations.relative_error(ours, truth) < 1e-10


def test_symmetric_needs_a_query_for_every_key() -> None:
    """A key without a query has no positive in the other direction."""
    with pytest.raises(
        ValueError, match=r"key has shape \[5, 3\] but query has \[4, 3\]; they must"
    ):
        fused_info_nce(randn(4, 3), randn(5, 3), symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_leading_dimensions_are_independent_problems(symmetric: bool) -> None:
    """One call equals a loop over calls, in the loss and in the gradients."""
    query, key = pair(2, 3, 4, 5)
    terms = fused_info_nce(query, key, symmetric=symmetric, reduction="none")
    assert terms.shape == (2, 3, 4)
    gradients = torch.autograd.grad(terms.sum(), (query, key))
    for index in itertools.product(range(2), range(3)):
        one = [x.detach()[index].requires_grad_() for x in (query, key)]
        alone = fused_info_nce(*one, symmetric=symmetric, reduction="none")
        torch.testing.assert_close(terms[index], alone, rtol=1e-13, atol=0)
        for ours, exact in zip(gradients, torch.autograd.grad(alone.sum(), one), strict=True):
            assert equations.relative_error(ours[index], exact) < 1e-13
    mean = fused_info_nce(query, key, symmetric=symmetric)
    assert mean.item() == pytest.approx(terms.sum().item() / 24, rel=1e-13)


def contiguous(x: Tensor) -> Tensor:
    """As it comes."""
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """The embeddings lie in columns."""
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    """Stride 2, with NaN between: whoever reads past the stride shows it."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def sliced(x: Tensor) -> Tensor:
    """A slice out of wider and longer storage, at an odd offset, again among NaN."""
    return F.pad(x, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2]


def batch_last(x: Tensor) -> Tensor:
    """The outermost dimension varies fastest."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


layouts = st.sampled_from([contiguous, transposed, every_other, sliced, batch_last])


@settings(max_examples=60, deadline=None)
@given(
    lead=st.sampled_from([(), (2,), (3, 1)]),
    batch=st.integers(1, 9),
    width=st.integers(1, 9),
    tau=st.sampled_from([1e-3, 0.01, 0.07, 1.0, 10.0]) | st.floats(1e-3, 10.0),
    dtype=st.sampled_from(FLOATING),
    query_layout=layouts,
    key_layout=layouts,
    symmetric=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_temperature(
    lead: tuple[int, ...],
    batch: int,
    width: int,
    tau: float,
    dtype: torch.dtype,
    query_layout: Callable[[Tensor], Tensor],
    key_layout: Callable[[Tensor], Tensor],
    symmetric: bool,
    reduction: Reduction,
    backend: Backend,
    seed: int,
) -> None:
    """Against Eq. 1 with bounds that follow from the rounding u of the dtype it is computed in.

    A cosine of D products is off by about (D + 4)·u, a logit by that over τ, a term by twice that. A
    gradient is a probability, relatively as wrong as the logit is absolutely, times a unit vector over
    τ|x|, and that of a key sums B of them. With |x| ≥ 1 and upstream gradients of at most 1, twice as
    much is 16 (D + B)·u / τ · max(1, 1/τ) for up to 9 embeddings. The gradient is then rounded once more
    to the dtype of the input.
    """
    embeddings = []
    for layout, offset in ((query_layout, 0), (key_layout, 1)):
        x = randn(*lead, batch, width, seed=seed + offset)
        x = (x * (1.01 / x.norm(dim=-1, keepdim=True)).clamp_min(1)).to(dtype)
        embeddings.append(layout(x).requires_grad_())
    query, key = embeddings
    loss = fused_info_nce(
        query,
        key,
        temperature=tau,
        symmetric=symmetric,
        reduction=reduction,
        backend=backend,
    )
    upstream = randn(*loss.shape, seed=seed + 2).clamp(-1, 1).to(loss.dtype)
    found = torch.autograd.grad(loss, (query, key), upstream)

    count = math.prod(lead) * batch
    share = 1 / count if reduction == "mean" else 1.0
    weights = (upstream.double() * share).expand(*lead, batch)
    terms = torch.empty(*lead, batch, dtype=torch.float64)
    exact = [torch.empty_like(x, dtype=torch.float64) for x in embeddings]
    slope = equations.symmetric_gradient if symmetric else equations.info_nce_gradient
    for index in itertools.product(*map(range, lead)):
        inputs = (query[index].tolist(), key[index].tolist(), tau)
        one = (equations.symmetric if symmetric else equations.info_nce)(*inputs)
        terms[index] = torch.tensor(one, dtype=torch.float64)
        for gradient, rows in zip(exact, slope(*inputs, weights[index].tolist()), strict=False):
            gradient[index] = torch.tensor(rows, dtype=torch.float64)

    u = torch.finfo(loss.dtype).eps
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    expected = terms if reduction == "none" else terms.sum() * share
    rows = count if reduction == "sum" else 1
    torch.testing.assert_close(
        loss.double(), expected, rtol=0, atol=8 * (width + batch + 2) * u * max(1, 1 / tau) * rows
    )
    for gradient, ours in zip(exact, found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(),
            gradient,
            rtol=torch.finfo(dtype).eps,
            atol=16 * (width + batch) * u / tau * max(1, 1 / tau),
        )


def test_expanded_queries() -> None:
    """Stride 0: the gradient of one batch used against three adds up."""
    query, key = pair(4, 5)[0], randn(3, 4, 5, seed=7)
    loss = fused_info_nce(query.expand(3, 4, 5), key, reduction="sum")
    exact = [
        equations.info_nce_gradient(query.tolist(), k.tolist(), 0.07, [1.0] * 4)[0] for k in key
    ]
    (found,) = torch.autograd.grad(loss, query)
    assert equations.relative_error(found, torch.tensor(exact, dtype=torch.float64).sum(0)) < 1e-10


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_batch_of_one_has_nothing_to_learn(dtype: torch.dtype, symmetric: bool) -> None:
    """No negatives: the positive has probability 1."""
    query, key = pair(1, 8, dtype=dtype)
    loss = fused_info_nce(query, key, symmetric=symmetric)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (query, key)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_zero_vectors(dtype: torch.dtype, backend: Backend) -> None:
    """Cosine 0 with everything, gradient exactly 0, and no NaN anywhere."""
    query, key = pair(4, 8, dtype=dtype)
    with torch.no_grad():
        query[1] = 0
        key[2] = 0
    terms = fused_info_nce(query, key, reduction="none", backend=backend)
    assert terms[1].item() == pytest.approx(math.log(4), rel=4 * torch.finfo(terms.dtype).eps)
    exact = equations.info_nce(query.tolist(), key.tolist(), 0.07)
    assert equations.relative_error(terms, exact) < 100 * torch.finfo(terms.dtype).eps
    d_query, d_key = torch.autograd.grad(terms.sum(), (query, key))
    assert d_query.count_nonzero(-1).ne(0).tolist() == [True, False, True, True]
    assert d_key.count_nonzero(-1).ne(0).tolist() == [True, True, False, True]
    assert d_query.isfinite().all()
    assert d_key.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING)
def test_only_zero_vectors(dtype: torch.dtype) -> None:
    """A dead encoder: chance, log B, and no gradient."""
    query = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
    loss = fused_info_nce(query, query, symmetric=True)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_is_not_hidden(dtype: torch.dtype, backend: Backend) -> None:
    """A NaN query spoils its own term, a NaN key every one, either spoils the mean."""
    clean = randn(3, 4, dtype=dtype)
    spoilt = clean.clone()
    spoilt[1, 2] = math.nan
    by_query = fused_info_nce(spoilt, clean, reduction="none", backend=backend)
    assert by_query.isnan().tolist() == [False, True, False]
    by_key = fused_info_nce(clean, spoilt, reduction="none", backend=backend)
    assert by_key.isnan().all()
    assert fused_info_nce(spoilt, clean, backend=backend).isnan()


@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 on the same numbers, loss and gradients, at most twice the plain loss's.

    The plain loss runs in that dtype. A NaN, as of an overflow at τ = 0.01, fails every comparison.
    """
    half = pair(32, 64, dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in half)
    truth = plain(*exact, tau)
    slopes = torch.autograd.grad(truth, exact)
    ours, theirs = fused_info_nce(*half, temperature=tau), plain(*half, tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    found = zip(torch.autograd.grad(ours, half), torch.autograd.grad(theirs, half), strict=True)
    for slope, (our, their) in zip(slopes, found, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


def test_autocast_changes_nothing() -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    query, key = pair(16, 32, dtype=torch.float32)
    outside = fused_info_nce(query, key, symmetric=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_info_nce(query, key, symmetric=True)
    assert torch.equal(inside, outside)
    for ours, exact in zip(
        torch.autograd.grad(inside, (query, key)),
        torch.autograd.grad(outside, (query, key)),
        strict=True,
    ):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_temperature_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """However one number is wrapped, the loss keeps its shape and dtype, the number gets its gradient."""
    query, key = pair(5, 4, dtype=torch.float32)
    tau = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    terms = fused_info_nce(query, key, temperature=tau, reduction="none")
    assert terms.shape == (5,)
    assert terms.dtype == torch.float32
    (found,) = torch.autograd.grad(terms.sum(), tau)
    _, _, exact = equations.info_nce_gradient(query.tolist(), key.tolist(), 0.25, [1.0] * 5)
    assert found.shape == shape
    assert found.item() == pytest.approx(exact, rel=max(torch.finfo(dtype).eps, 1e-5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"symmetric": True},
        {"reduction": "none"},
        {"normalize": False},
        {"backend": "torch"},
    ],
)
def test_module_equals_function(options: dict[str, Any]) -> None:
    """Every option reaches the function, and shows in the module's text."""
    query, key = pair(5, 4)
    module = InfoNCE(**options)
    assert torch.equal(module(query, key), fused_info_nce(query, key, **options))
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)


def test_module_learns_its_temperature() -> None:
    """A parameter is found by optimizers, moves and is saved with the module, and gets its gradient."""
    module = InfoNCE(nn.Parameter(torch.tensor(0.2)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module.double()
    query, key = pair(5, 4)
    module(query, key).backward()
    tau = module.temperature
    assert isinstance(tau, nn.Parameter)
    assert tau.dtype == torch.float64
    assert tau.grad is not None
    _, _, exact = equations.info_nce_gradient(query.tolist(), key.tolist(), tau.item(), [0.2] * 5)
    assert tau.grad.item() == pytest.approx(exact, rel=1e-10)

    other = InfoNCE(nn.Parameter(torch.tensor(0.9)))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(query, key), InfoNCE(torch.tensor(0.2))(query, key))
    assert module.to("meta").temperature.device.type == "meta"


def test_compiled_equals_eager() -> None:
    """One graph, without a break, forward and backward."""
    torch.compiler.reset()
    query, key = pair(6, 5)
    compiled = torch.compile(fused_info_nce, fullgraph=True)
    losses = [f(query, key, temperature=0.1, symmetric=True) for f in (compiled, fused_info_nce)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    ours, exact = (torch.autograd.grad(loss, (query, key)) for loss in losses)
    assert equations.relative_error(ours[0], exact[0]) < 1e-13
    assert equations.relative_error(ours[1], exact[1]) < 1e-13
