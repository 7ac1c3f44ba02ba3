"""The options of `fused_info_nce` against the whole matrix of logits in float64."""

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

from hdc_kernels.cross_entropy import InfoNCEMetrics
from hdc_kernels.info_nce import InfoNCE, fused_info_nce

HALF = (torch.bfloat16, torch.float16)


def logits(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    tau: float | Tensor = 0.2,
    normalize: bool = True,
) -> Tensor:
    """[B, C], the positive of row i in column i: the keys (of others −inf without `in_batch`), then negatives."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    s = query @ key.mT / tau
    if not in_batch:
        s = s.masked_fill(~torch.eye(len(query), dtype=torch.bool), -math.inf)
    if negatives is None:
        return s
    product = "bd,md->bm" if negatives.dim() == 2 else "bd,bmd->bm"
    return torch.cat((s, torch.einsum(product, query, negatives) / tau), 1)


def cross_entropy(s: Tensor, **options: Any) -> Tensor:
    """What everyone writes."""
    return F.cross_entropy(s, torch.arange(len(s)), **options)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 7),
    extra=st.integers(0, 3),
    count=st.integers(1, 6),
    private=st.booleans(),
    in_batch=st.booleans(),
    tau=st.sampled_from([0.05, 0.3, 2.0]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backend=st.sampled_from(["auto", "torch", "chunked"]),
    seed=st.integers(0, 2**31),
)
def test_negatives(
    batch: int,
    extra: int,
    count: int,
    private: bool,
    in_batch: bool,
    tau: float,
    normalize: bool,
    reduction: Any,
    backend: Any,
    seed: int,
) -> None:
    """Shared or private, with those in the batch or without, also with keys of nobody: loss and all gradients."""
    inputs = (
        randn(batch, 5, seed=seed),
        randn(batch + extra * in_batch, 5, seed=seed + 1),
        randn(*[batch] * private, count, 5, seed=seed + 2),
        torch.tensor(tau, dtype=torch.float64),
    )

    def ours(query: Tensor, key: Tensor, negatives: Tensor, tau: Tensor) -> Tensor:
        return fused_info_nce(
            query,
            key,
            temperature=tau,
            negatives=negatives,
            in_batch=in_batch,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def exact(query: Tensor, key: Tensor, negatives: Tensor, tau: Tensor) -> Tensor:
        s = logits(query, key, negatives, in_batch, tau, normalize)
        return cross_entropy(s, reduction=reduction)

    agree(ours, exact, *inputs, bound=1e-11, floor=1.0)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (5, 4, 6)])
def test_near_convergence_the_loss_keeps_its_digits(shape: tuple[int, ...], in_batch: bool) -> None:
    """1 − p loses all digits of a loss of 1e-17; a sum over negatives alone keeps them."""
    key = torch.eye(6, dtype=torch.float64)[:5]
    negatives = -key[0].expand(shape).contiguous()
    loss = fused_info_nce(
        key,
        key,
        temperature=0.025,
        negatives=negatives,
        in_batch=in_batch,
        reduction="none",
        backend="auto" if in_batch else "torch",
    )
    # Against its own −1 is row 0, against 0 are the others; positives are at 1.
    inside = 4 * math.exp(-40) if in_batch else 0.0
    expected = [inside + 4 * math.exp(-80 if i == 0 else -40) for i in range(5)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ids(reduction: Any, backend: Any, symmetric: bool) -> None:
    """A key with the query's id is neither positive nor negative, its own positive stands."""
    query_ids = torch.tensor([3, 1, 3, 2, 1, 9], dtype=torch.int32)
    key_ids = query_ids if symmetric else torch.tensor([3, 1, 3, 2, 1, 9, 3, 7])
    inputs = (randn(6, 4), randn(len(key_ids), 4, seed=1))
    out = (query_ids[:, None] == key_ids) & ~torch.eye(6, len(key_ids), dtype=torch.bool)

    def exact(query: Tensor, key: Tensor) -> Tensor:
        s = logits(query, key).masked_fill(out, -math.inf)
        there = cross_entropy(s, reduction=reduction)
        return (there + cross_entropy(s.mT, reduction=reduction)) / 2 if symmetric else there

    def ours(query: Tensor, key: Tensor) -> Tensor:
        ids = query_ids if symmetric else (query_ids, key_ids)
        return fused_info_nce(
            query,
            key,
            ids=ids,
            temperature=0.2,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
        )

    agree(ours, exact, *inputs, bound=1e-11)


def test_everything_of_one_id_is_a_batch_of_one() -> None:
    """No negative is left: loss 0, gradient 0."""
    query, key = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    loss = fused_info_nce(query, key, ids=torch.ones(4, dtype=torch.int64))
    assert loss.item() == pytest.approx(0, abs=1e-14)
    for gradient in torch.autograd.grad(loss, (query, key)):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weights(reduction: Any, symmetric: bool, lead: tuple[int, ...]) -> None:
    """Σ w·l / Σ w, Σ w·l and w·l; the weights get their gradient."""
    inputs = (randn(*lead, 5, 4), randn(*lead, 5, 4, seed=1), randn(*lead, 5, seed=2).abs())

    def ours(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
        return fused_info_nce(
            query, key, sample_weights=weights, symmetric=symmetric, reduction=reduction
        )

    def exact(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
        loss = weights * fused_info_nce(query, key, symmetric=symmetric, reduction="none")
        if reduction == "mean":
            return loss.sum() / weights.sum()
        return loss.sum() if reduction == "sum" else loss

    agree(ours, exact, *inputs)


@pytest.mark.parametrize("epsilon", [0.1, 0.9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing(reduction: Any, normalize: bool, symmetric: bool, epsilon: float) -> None:
    """F.cross_entropy has it; of both directions the mean."""
    inputs = (randn(5, 4), randn(5 if symmetric else 7, 4, seed=1), torch.tensor(0.3).double())

    def ours(query: Tensor, key: Tensor, tau: Tensor) -> Tensor:
        return fused_info_nce(
            query,
            key,
            temperature=tau,
            label_smoothing=epsilon,
            symmetric=symmetric,
            normalize=normalize,
            reduction=reduction,
        )

    def exact(query: Tensor, key: Tensor, tau: Tensor) -> Tensor:
        s = logits(query, key, tau=tau, normalize=normalize)
        options = {"reduction": reduction, "label_smoothing": epsilon}
        there = cross_entropy(s, **options)
        return (there + cross_entropy(s.mT, **options)) / 2 if symmetric else there

    agree(ours, exact, *inputs)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (5, 3, 4)])
def test_label_smoothing_counts_the_negatives(shape: tuple[int, ...], in_batch: bool) -> None:
    """C is the number of columns that there are: positive, in-batch and explicit negatives."""

    def ours(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        return fused_info_nce(
            query, key, temperature=0.2, negatives=negatives, in_batch=in_batch, label_smoothing=0.2
        )

    def exact(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        s = logits(query, key, negatives, in_batch)
        if not in_batch:
            s = torch.cat((s.diagonal().unsqueeze(1), s[:, len(key) :]), 1)
            return F.cross_entropy(s, torch.zeros(len(s), dtype=torch.int64), label_smoothing=0.2)
        return cross_entropy(s, label_smoothing=0.2)

    agree(ours, exact, randn(5, 4), randn(5, 4, seed=1), randn(*shape, seed=2))


def test_label_smoothing_of_independent_problems_with_weights() -> None:
    """Leading dimensions, weights and smoothing together equal one problem after the other."""
    query, key, weights = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1), randn(2, 3, 4).abs()
    terms = fused_info_nce(
        query, key, sample_weights=weights, label_smoothing=0.3, reduction="none"
    )
    for index in [(0, 0), (1, 2)]:
        s = logits(query[index], key[index], tau=0.07)
        expected = weights[index] * cross_entropy(s, reduction="none", label_smoothing=0.3)
        torch.testing.assert_close(terms[index], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "in_batch"),
    [(None, True), ((3, 4), True), ((3, 4), False), ((8, 3, 4), True), ((8, 3, 4), False)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics(reduction: Any, shape: tuple[int, ...] | None, in_batch: bool) -> None:
    """The loss is the same, the metrics are detached; hits and ranks are of every negative that counts."""
    query = randn(8, 4).requires_grad_()
    key, negatives = query.detach() + randn(8, 4, seed=1), None if shape is None else randn(*shape)
    options: dict[str, Any] = {"negatives": negatives, "in_batch": in_batch, "temperature": 0.2}
    loss, metrics = fused_info_nce(
        query,
        key,
        reduction=reduction,
        sample_weights=torch.arange(1.0, 9.0),
        return_metrics=True,
        **options,
    )
    assert isinstance(metrics, InfoNCEMetrics)
    assert loss.requires_grad
    assert not metrics.loss.requires_grad
    terms = fused_info_nce(query, key, reduction="none", **options)
    torch.testing.assert_close(metrics.loss, terms.detach(), rtol=1e-13, atol=0)
    s = logits(query, key, negatives, in_batch).detach()
    hits = s.argmax(1) == torch.arange(8)
    assert 0 < hits.sum() < 8
    assert metrics.accuracy.item() == pytest.approx(hits.double().mean().item())
    assert metrics.accuracy.dtype == torch.float32
    ranks = (s >= s[:, :8].diagonal().unsqueeze(1)).sum(1) - 1  # but for the positive itself
    assert metrics.rank.tolist() == ranks.tolist()
    torch.testing.assert_close(metrics.logsumexp, s.logsumexp(1), rtol=1e-13, atol=0)
    weighted = fused_info_nce(
        query, key, reduction=reduction, sample_weights=torch.arange(1.0, 9.0), **options
    )
    torch.testing.assert_close(loss, weighted, rtol=1e-13, atol=0)


def test_metrics_of_leading_dimensions() -> None:
    """[..., B] as the loss; smoothing is in it."""
    query, key = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    loss, metrics = fused_info_nce(query, key, label_smoothing=0.1, return_metrics=True)
    assert metrics.loss.shape == (2, 3, 4)
    assert metrics.loss.mean().item() == pytest.approx(loss.item(), rel=1e-12)


OPTIONS: list[dict[str, Any]] = [
    {"negatives": randn(3, 3, seed=5)},
    {"negatives": randn(3, 3, seed=5), "in_batch": False},
    {"negatives": randn(4, 2, 3, seed=5)},
    {"negatives": randn(4, 2, 3, seed=5), "in_batch": False},
    {"ids": torch.tensor([0, 1, 0, 2])},
    {"sample_weights": torch.tensor([1.0, 2.0, 0.0, 0.5])},
    {"label_smoothing": 0.2, "symmetric": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    """First and second derivatives for query, key, temperature and negatives."""
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = [randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_(), tau]
    rest = dict(options)
    if "negatives" in options:
        inputs.append(rest.pop("negatives").clone().requires_grad_())

    def loss(query: Tensor, key: Tensor, tau: Tensor, negatives: Tensor | None = None) -> Tensor:
        return fused_info_nce(query, key, temperature=tau, negatives=negatives, **rest)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    """One graph, with metrics, too."""
    torch.compiler.reset()
    compiled = torch.compile(fused_info_nce, fullgraph=True, backend="aot_eager")
    query, key = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    found = []
    for function in (compiled, fused_info_nce):
        loss, metrics = function(query, key, return_metrics=True, **options)
        found.append(
            [loss, metrics.accuracy, metrics.rank, *torch.autograd.grad(loss, (query, key))]
        )
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("shape", [(24, 32), (16, 3, 32)])
def test_half_precision_is_no_worse_than_plain(
    shape: tuple[int, ...], in_batch: bool, dtype: torch.dtype, tau: float
) -> None:
    """Error against float64 at most twice that of the plain loss in that dtype; a NaN fails every comparison."""
    half = [randn(16, 32, seed=k, dtype=dtype).requires_grad_() for k in range(2)]
    half.append(randn(*shape, seed=2, dtype=dtype).requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in half]
    ours = fused_info_nce(*half[:2], negatives=half[2], in_batch=in_batch, temperature=tau)
    assert ours.dtype == torch.float32
    theirs, truth = (cross_entropy(logits(*x, in_batch, tau)) for x in (half, exact))
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = (
        torch.autograd.grad(loss, x) for loss, x in ((ours, half), (theirs, half), (truth, exact))
    )
    for our, their, slope in zip(*slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    options = {
        k: v.float() if k in ("negatives", "sample_weights") else v for k, v in options.items()
    }
    query, key = randn(4, 3, dtype=torch.float32), randn(4, 3, seed=1, dtype=torch.float32)
    outside = fused_info_nce(query, key, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_info_nce(query, key, **options)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (5, 3, 4)])
def test_nan_is_not_hidden(shape: tuple[int, ...], in_batch: bool) -> None:
    """In a query it spoils one term, in a shared negative all, in a private one its query's."""
    query, key, negatives = randn(5, 4), randn(5, 4, seed=1), randn(*shape, seed=2)
    options: dict[str, Any] = {"in_batch": in_batch, "reduction": "none"}
    spoilt = query.clone()
    spoilt[1, 2] = math.nan
    terms = fused_info_nce(spoilt, key, negatives=negatives, **options)
    assert terms.isnan().tolist() == [False, True, False, False, False]
    spoilt = negatives.clone()
    spoilt[2] = math.nan
    terms = fused_info_nce(query, key, negatives=spoilt, **options)
    expected = [True] * 5 if len(shape) == 2 else [False, False, True, False, False]
    assert terms.isnan().tolist() == expected


def test_a_batch_of_one_with_negatives() -> None:
    """One query has its explicit negatives to learn from."""
    query, key, negatives = randn(1, 4), randn(1, 4, seed=1), randn(3, 4, seed=2)
    expected = cross_entropy(logits(query, key, negatives)).item()
    for rivals in (negatives, negatives.unsqueeze(0)):
        for in_batch in (True, False):
            loss = fused_info_nce(
                query, key, temperature=0.2, negatives=rivals, in_batch=in_batch
            ).item()
            assert loss == pytest.approx(expected, rel=1e-12)


def test_module_equals_function() -> None:
    """What belongs to a batch goes to the call, what does not to the constructor."""
    query, key, negatives = randn(5, 4), randn(5, 4, seed=1), randn(3, 4, seed=2)
    weights = randn(5, seed=3).abs()
    module = InfoNCE(0.2, in_batch=False, label_smoothing=0.1)
    assert torch.equal(
        module(query, key, negatives, sample_weights=weights),
        fused_info_nce(
            query,
            key,
            temperature=0.2,
            negatives=negatives,
            in_batch=False,
            label_smoothing=0.1,
            sample_weights=weights,
        ),
    )
    assert "in_batch=False, label_smoothing=0.1" in repr(module)
    ids = torch.tensor([0, 1, 0, 1, 2])
    assert torch.equal(InfoNCE()(query, key, ids=ids), fused_info_nce(query, key, ids=ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_batch": False}, "in_batch is False but there are no negatives"),
        ({"negatives": [1.0]}, r"negatives is a list; it must be a tensor \[M, D\] or"),
        ({"negatives": randn(3, 5)}, r"negatives has shape \[3, 5\]; it must be .* here \[M, 4\]"),
        ({"negatives": randn(6, 3, 4)}, r"negatives has shape \[6, 3, 4\]; .* or \[5, M, 4\]"),
        ({"negatives": randn(0, 4)}, r"negatives has shape \[0, 4\]"),
        ({"negatives": randn(5, 0, 4)}, r"negatives has shape \[5, 0, 4\]"),
        ({"negatives": randn(3, 4).float()}, "negatives has dtype torch.float32 but query has"),
        ({"negatives": randn(3, 4), "symmetric": True}, "symmetric is True but there are negat"),
        ({"ids": 3}, r"ids is a int; it must be a tensor \[B\] or a pair"),
        ({"ids": torch.ones(4).long()}, r"ids of query has shape \[4\] but query has"),
        ({"ids": (torch.ones(5).long(), torch.ones(5))}, "ids of key has dtype torch.float"),
        ({"ids": torch.ones(5).long(), "negatives": randn(3, 4)}, "append them to key instead"),
        ({"ids": torch.ones(5).long(), "label_smoothing": 0.1}, "label_smoothing is 0.1 but ids"),
        ({"sample_weights": [1.0]}, "sample_weights is a list; it must be a tensor"),
        ({"sample_weights": torch.ones(4)}, r"sample_weights has shape \[4\] on cpu; it must be"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and less"),
        ({"label_smoothing": math.nan}, "label_smoothing is nan"),
        ({"label_smoothing": "a"}, "label_smoothing is a str; it must be a number"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        fused_info_nce(randn(5, 4), randn(5, 4, seed=1), **options)


@pytest.mark.parametrize("option", ["negatives", "ids"])
def test_leading_dimensions_are_refused_where_they_would_be_ambiguous(option: str) -> None:
    """Whose negatives, whose ids?"""
    given = randn(3, 4) if option == "negatives" else torch.ones(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"query has shape \[2, 5, 4\]; with {option} it must be"):
        fused_info_nce(randn(2, 5, 4), randn(2, 5, 4), **{option: given})
