"""`fused_hn_nce` and `HNNCE` against both papers' formulas over the whole matrix, in float64."""

import math
from typing import Any, get_args

import info_nce
import peer_imports
import pytest
import torch
import torch.nn.functional as F
from agreement import agree, no_worse_than_plain, weighted
from embeddings import leaf, randn
from equations import relative_error
from torch import Tensor, nn

from hdc_kernels.checks import FLOATING, Backend, Reduction
from hdc_kernels.cross_entropy import InfoNCEMetrics
from hdc_kernels.hard_negatives import HNNCE, fused_hn_nce
from hdc_kernels.info_nce import fused_info_nce

BACKENDS = [b for b in get_args(Backend) if b not in ("triton", "cuda")]
REDUCTIONS = get_args(Reduction)
HALF = (torch.bfloat16, torch.float16)


def scalar(value: float) -> Tensor:
    """A learnable number."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def plain(
    query: Tensor,
    key: Tensor,
    tau: Any,
    alpha: float = 1.0,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    *,
    labels: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Every query's loss, by exponentials as the papers have it."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = query @ key.mT / tau
    labels = torch.arange(len(query)) if labels is None else labels
    negative = labels[:, None] != labels
    positive = logits.diagonal().exp()
    others = torch.where(negative, logits, -torch.inf).exp()
    weights = torch.where(negative, beta * logits, -torch.inf).exp()
    count = negative.sum(-1).to(logits.dtype)  # times τ⁺ an integer would become float32
    total = (others * weights).sum(-1) * count / weights.sum(-1)
    if tau_plus:
        total = (total - tau_plus * count * positive) / (1 - tau_plus)
        least = torch.as_tensor(-1 / tau).exp()
        total = torch.maximum(total, count * least)
    return -(positive / (alpha * positive + total)).log()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("alpha", "beta", "tau_plus"),
    [(1.0, 0.0, 0.0), (1.0, 0.25, 0.0), (0.0, 2.0, 0.0), (1.0, 1.0, 0.1), (0.5, 0.0, 0.02)],
)
def test_loss_and_gradients_are_the_papers(
    alpha: float,
    beta: float,
    tau_plus: float,
    reduction: Reduction,
    normalize: bool,
    backend: Backend,
) -> None:
    """In both directions, too. At 0.1 some queries are at the lower bound, and some are not."""
    query, key, tau = leaf(7, 5), leaf(7, 5, seed=1), scalar(0.5)
    inputs = (query, key, tau)
    weighting = {"alpha": alpha, "beta": beta, "tau_plus": tau_plus}
    for symmetric in (False, True):
        loss = fused_hn_nce(
            query,
            key,
            temperature=tau,
            symmetric=symmetric,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            **weighting,
        )
        terms = plain(*inputs, **weighting, normalize=normalize)
        if symmetric:
            terms = (terms + plain(key, query, tau, **weighting, normalize=normalize)) / 2
        expected = {"none": terms, "sum": terms.sum(), "mean": terms.mean()}[reduction]
        assert loss.dtype == torch.float64
        assert relative_error(loss, expected) < 1e-12
        upstream = leaf(7, seed=2).detach() if reduction == "none" else None
        found = torch.autograd.grad(loss, inputs, upstream)
        for ours, truth in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
            assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weights(reduction: Reduction, symmetric: bool) -> None:
    """Of queries; the weights get their gradient."""

    def ours(query: Tensor, key: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        return fused_hn_nce(
            query,
            key,
            temperature=tau,
            symmetric=symmetric,
            sample_weights=weights,
            reduction=reduction,
        )

    def exact(query: Tensor, key: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        terms = plain(query, key, tau)
        terms = (terms + plain(key, query, tau)) / 2 if symmetric else terms
        return weighted(terms, weights, reduction)

    agree(ours, exact, randn(5, 4), randn(5, 4, seed=1), scalar(0.5), randn(5, seed=2).exp())


def test_without_weights_it_is_info_nce() -> None:
    """β = 0 and α = 1, also at a temperature where exponentials overflow."""
    query, key = leaf(9, 5), leaf(9, 5, seed=1)
    for tau in (1.0, 0.07, 1e-3):
        for symmetric in (False, True):
            ours = fused_hn_nce(query, key, temperature=tau, beta=0.0, symmetric=symmetric)
            same = fused_info_nce(query, key, temperature=tau, symmetric=symmetric)
            assert relative_error(ours, same) < 1e-12


def test_without_weights_it_is_other_packages_losses() -> None:
    """info-nce-pytorch's; and HCL of two views lightly's NT-Xent. No package has the weights."""
    query, key = randn(6, 5), randn(6, 5, seed=1)
    agree(
        lambda *pair: fused_hn_nce(*pair, temperature=0.3, beta=0.0),
        lambda *pair: info_nce.info_nce(*pair, temperature=0.3),
        *(query, key),
    )
    agree(
        lambda a, b: fused_hn_nce(
            torch.cat((a, b)),
            torch.cat((b, a)),
            temperature=0.3,
            beta=0.0,
            labels=torch.arange(6).repeat(2),
        ),
        peer_imports.lightly().NTXentLoss(0.3),
        *(query, key),
    )


def test_two_views_as_in_hcl() -> None:
    """Robinson et al.: 2B anchors with 2B − 2 negatives each, the views of all other images."""
    a, b, tau, tau_plus, beta = leaf(6, 8), leaf(6, 8, seed=1), 0.5, 0.1, 1.0
    loss = fused_hn_nce(
        torch.cat((a, b)),
        torch.cat((b, a)),
        temperature=tau,
        beta=beta,
        tau_plus=tau_plus,
        labels=torch.arange(6).repeat(2),
    )
    out = F.normalize(torch.cat((a, b)), dim=-1)
    similar = (out @ out.T / tau).exp()
    image = torch.arange(12) % 6
    negative = similar[image[:, None] != image].view(12, 10)
    positive = (out * out.roll(6, 0)).sum(-1).div(tau).exp()
    importance = (beta * negative.log()).exp()
    reweighted = (importance * negative).sum(-1) / importance.mean(-1)
    count = 10
    total = (-tau_plus * count * positive + reweighted) / (1 - tau_plus)
    total = total.clamp_min(count * math.exp(-1 / tau))
    expected = -(positive / (positive + total)).log().mean()
    assert relative_error(loss, expected) < 1e-12
    found = torch.autograd.grad(loss, (a, b))
    for ours, truth in zip(found, torch.autograd.grad(expected, (a, b)), strict=True):
        assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_keys_of_the_same_label_are_no_negatives(dtype: torch.dtype, backend: Backend) -> None:
    """Each query has a number of negatives of its own."""
    query, key, tau = leaf(8, 5), leaf(8, 5, seed=1), scalar(0.4)
    labels = torch.tensor([3, 3, 3, 0, 1, 1, 2, 200], dtype=dtype)
    weighting = {"beta": 0.5, "tau_plus": 0.05}
    terms = fused_hn_nce(
        query,
        key,
        temperature=tau,
        labels=labels,
        reduction="none",
        backend=backend,
        **weighting,
    )
    expected = plain(query, key, tau, **weighting, labels=labels)
    assert relative_error(terms, expected) < 1e-12
    upstream = leaf(8, seed=2).detach()
    found = torch.autograd.grad(terms, (query, key, tau), upstream)
    exact = torch.autograd.grad(expected, (query, key, tau), upstream)
    for ours, truth in zip(found, exact, strict=True):
        assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "weighting", [{}, {"alpha": 0.0}, {"beta": 0.0, "tau_plus": 0.02}, {"alpha": 0.5, "beta": 2.0}]
)
def test_metrics(
    weighting: dict[str, float], symmetric: bool, backend: Backend, dtype: torch.dtype
) -> None:
    """Terms before weights, ranks among keys of other labels, also where one is there twice; the value stays."""
    query, key = randn(150, 4, dtype=dtype), randn(150, 4, seed=1, dtype=dtype)
    key += query
    key[140] = key[3]
    options: dict[str, Any] = {"symmetric": symmetric, "backend": backend, **weighting}
    options |= {"temperature": 0.3, "sample_weights": torch.arange(1.0, 151.0)}
    for labels in (None, torch.arange(150) % 11):
        value, metrics = fused_hn_nce(query, key, labels=labels, return_metrics=True, **options)
        assert isinstance(metrics, InfoNCEMetrics)
        assert torch.equal(value, fused_hn_nce(query, key, labels=labels, **options))
        assert not metrics.loss.requires_grad
        pair = query.double(), key.double()
        exact = plain(*pair, 0.3, **weighting, labels=labels)
        if symmetric:
            exact = (exact + plain(*pair[::-1], 0.3, **weighting, labels=labels)) / 2
        rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)
        torch.testing.assert_close(metrics.loss.double(), exact, rtol=rtol, atol=atol)
        cosines = F.normalize(pair[0], dim=1) @ F.normalize(pair[1], dim=1).mT
        lse = exact + cosines.diagonal() / 0.3
        torch.testing.assert_close(metrics.logsumexp.double(), lse, rtol=rtol, atol=atol)
        label = torch.arange(150) if labels is None else labels
        rivals = cosines >= cosines.diagonal()[:, None] - 1e-9
        ranks = (rivals & (label[:, None] != label)).sum(1)
        assert 0 < (ranks == 0).sum() < 150
        assert metrics.rank.tolist() == ranks.tolist()
        assert metrics.accuracy.item() == pytest.approx((ranks == 0).double().mean().item())
        assert metrics.accuracy.dtype == torch.float32
        options["sample_weights"] = None
        terms, metrics = fused_hn_nce(
            query, key, labels=labels, reduction="none", return_metrics=True, **options
        )
        terms.zero_()
        torch.testing.assert_close(metrics.loss.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weighting", [{}, {"beta": 0.5}, {"tau_plus": 0.1}, {"alpha": 0.0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_negatives_has_nothing_to_learn(
    backend: Backend, weighting: dict[str, float]
) -> None:
    """B = 1, or everything of one label: 0, and a gradient of 0."""
    for size, labels in ((1, None), (3, torch.zeros(3, dtype=torch.long))):
        query, key, tau = leaf(size, 4), leaf(size, 4, seed=1), scalar(0.1)
        loss = fused_hn_nce(
            query, key, temperature=tau, labels=labels, backend=backend, **weighting
        )
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (query, key, tau)):
            assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("weighting", [{"beta": 0.7}, {"alpha": 0.3, "tau_plus": 0.05}])
def test_gradcheck(weighting: dict[str, float]) -> None:
    """First and second derivatives for query, key, temperature and weights."""

    def loss(query: Tensor, key: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        return fused_hn_nce(query, key, temperature=tau, sample_weights=weights, **weighting)

    inputs = (leaf(4, 3), leaf(4, 3, seed=1), scalar(0.5), randn(4, seed=2).exp().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_equals_eager() -> None:
    """One graph, without a break, forward and backward, with metrics, too."""
    torch.compiler.reset()
    inputs = (leaf(6, 5), leaf(6, 5, seed=1), scalar(0.3))
    labels = torch.tensor([0, 0, 1, 2, 3, 4])

    def loss(query: Tensor, key: Tensor, tau: Tensor) -> tuple[Tensor, InfoNCEMetrics]:
        return fused_hn_nce(
            query,
            key,
            temperature=tau,
            tau_plus=0.05,
            labels=labels,
            sample_weights=torch.arange(6.0),
            return_metrics=True,
        )

    found = [f(*inputs) for f in (torch.compile(loss, fullgraph=True), loss)]
    losses = [value for value, _ in found]
    assert relative_error(losses[0], losses[1]) < 1e-13
    for there, here in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-14)
    ours, exact = (torch.autograd.grad(value, inputs) for value in losses)
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
@pytest.mark.parametrize("tau", [0.2, 1.0])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(
    dtype: torch.dtype, tau: float, tau_plus: float
) -> None:
    """Error against float64 on the same numbers, loss and gradients, at most twice the plain loss's."""
    half = (leaf(33, 64, dtype=dtype), leaf(33, 64, seed=1, dtype=dtype))
    exact = tuple(x.detach().double().requires_grad_() for x in half)
    options = {"tau_plus": tau_plus}
    truth = plain(*exact, tau, **options).mean()
    ours = fused_hn_nce(*half, temperature=tau, **options)
    theirs = plain(*half, tau, **options).mean()
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = torch.autograd.grad(truth, exact)
    found = zip(torch.autograd.grad(ours, half), torch.autograd.grad(theirs, half), strict=True)
    for slope, (our, their) in zip(slopes, found, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_changes_nothing(dtype: torch.dtype, tau_plus: float) -> None:
    """Not a bit of loss and gradients, whatever the encoder runs in."""
    pair = leaf(9, 16, dtype=torch.float32), leaf(9, 16, seed=1, dtype=torch.float32)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = fused_hn_nce(*pair, tau_plus=tau_plus)
        found.append((loss, *torch.autograd.grad(loss, pair)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_with_weights_is_no_worse_than_plain(dtype: torch.dtype) -> None:
    """Of queries."""
    weights = randn(33, seed=2).exp().float()
    no_worse_than_plain(
        lambda query, key: fused_hn_nce(query, key, temperature=0.2, sample_weights=weights),
        lambda query, key: weighted(plain(query, key, 0.2), weights, "mean"),
        *(randn(33, 64, seed=k, dtype=dtype) for k in range(2)),
    )


@pytest.mark.parametrize("weighting", [{}, {"beta": 3.0}, {"tau_plus": 0.1}, {"alpha": 0.0}])
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_small_temperature(dtype: torch.dtype, weighting: dict[str, float]) -> None:
    """τ = 0.01: exponentials would overflow, logarithms do not, and a float16 τ is divided in float32."""
    query, key = leaf(16, 32, dtype=dtype), leaf(16, 32, seed=1, dtype=dtype)
    tau = torch.tensor(0.01, dtype=dtype, requires_grad=True)
    loss = fused_hn_nce(query, key, temperature=tau, **weighting)
    exact = plain(query.double(), key.double(), tau.double(), **weighting).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for gradient in torch.autograd.grad(loss, (query, key, tau)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend: Backend, tau_plus: float) -> None:
    """A NaN query spoils its own term, a NaN key every one."""
    clean, spoilt = leaf(3, 4).detach(), leaf(3, 4).detach()
    spoilt[1, 2] = math.nan
    options = {"tau_plus": tau_plus, "reduction": "none", "backend": backend}
    assert fused_hn_nce(spoilt, clean, **options).isnan().tolist() == [False, True, False]
    assert fused_hn_nce(clean, spoilt, **options).isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "alpha": 0.5},
        {"beta": 0.25, "tau_plus": 0.1},
        {"symmetric": True, "reduction": "none"},
        {"normalize": False, "backend": "torch"},
    ],
)
def test_module_equals_function(options: dict[str, Any]) -> None:
    """Every option reaches the function, and shows in the module's text."""
    query, key, labels = leaf(5, 4), leaf(5, 4, seed=1), torch.tensor([0, 0, 1, 2, 3])
    module = HNNCE(**options)
    expected = fused_hn_nce(query, key, labels=labels, **options)
    assert torch.equal(module(query, key, labels), expected)
    weights = randn(5, seed=2).exp()
    expected = fused_hn_nce(query, key, sample_weights=weights, **options)
    assert torch.equal(module(query, key, sample_weights=weights), expected)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    assert list(HNNCE(nn.Parameter(torch.tensor(0.2))).state_dict()) == ["temperature"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature is -1.0; it must be positive"),
        ({"alpha": -1.0}, ValueError, "alpha is -1.0; it must be finite and not negative"),
        ({"beta": math.inf}, ValueError, "beta is inf; it must be finite and not negative"),
        ({"beta": torch.ones(())}, TypeError, "beta is a Tensor; it must be a number"),
        ({"tau_plus": 1.0}, ValueError, "tau_plus is 1.0; it must be below 1"),
        ({"labels": torch.zeros(3)}, TypeError, "labels has dtype torch.float32; it must be an"),
        ({"labels": [0, 1, 2]}, TypeError, "labels is a list; it must be a tensor of integers"),
        (
            {"labels": torch.zeros(4, dtype=torch.long)},
            ValueError,
            r"labels has shape \[4\] but query has \[3, 4\]; it must have one label for each row",
        ),
        (
            {"sample_weights": torch.ones(4)},
            ValueError,
            r"sample_weights has shape \[4\] on cpu; it",
        ),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; it must be one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """One line that says what was given and what is allowed."""
    with pytest.raises(error, match=message):
        fused_hn_nce(leaf(3, 4), leaf(3, 4), **options)
