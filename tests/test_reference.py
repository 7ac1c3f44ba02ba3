"""The specification against the equations in plain Python, one function at a time, in float64."""

import equations
import pytest
import torch
from torch import Tensor

from hdc_kernels import reference

TAU = 0.07


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Random embeddings that do not depend on the order of the tests."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("one_way", [True, False])
def test_hand_derived_gradients_are_slopes(one_way: bool, normalize: bool) -> None:
    """The ruler itself: central differences, whose error at step h is about h² + 1e-16 / h."""
    query, key = randn(3, 2).tolist(), randn(3, 2, seed=1).tolist()
    upstream = [0.5, -2.0, 1.0]
    loss = equations.info_nce if one_way else equations.symmetric
    slope = equations.info_nce_gradient if one_way else equations.symmetric_gradient
    d_query, d_key, d_tau = slope(query, key, 0.7, upstream, normalize)

    def weighted(tau: float) -> float:
        return equations.dot(upstream, loss(query, key, tau, normalize))

    h = 1e-5
    for batch, gradient in ((query, d_query), (key, d_key)):
        for vector, expected in zip(batch, gradient, strict=True):
            for d, x in enumerate(vector):
                vector[d] = x + h
                above = weighted(0.7)
                vector[d] = x - h
                below = weighted(0.7)
                vector[d] = x
                assert expected[d] == pytest.approx((above - below) / (2 * h), rel=1e-7, abs=1e-8)
    numeric = (weighted(0.7 + h) - weighted(0.7 - h)) / (2 * h)
    assert d_tau == pytest.approx(numeric, rel=1e-7)


def test_a_worked_example() -> None:
    """Two orthogonal clips at τ = 1: every number here can be checked on paper."""
    query = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    logits = reference.cosine_logits(query, query, 1.0)
    assert torch.equal(logits, torch.eye(2))
    torch.testing.assert_close(reference.info_nce(logits), torch.full((2,), 0.31326169))


@pytest.mark.parametrize("normalize", [True, False])
def test_cosine_logits_are_the_exponent_of_eq_2(normalize: bool) -> None:
    """sim / τ for every pair, and the plain dot product without normalisation."""
    query, key = randn(5, 3), randn(5, 3, seed=1)
    expected = [
        [equations.similarity(q, k, normalize) / TAU for k in key.tolist()] for q in query.tolist()
    ]
    logits = reference.cosine_logits(query, key, TAU, normalize=normalize)
    assert equations.relative_error(logits, expected) < 1e-14


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_temperature_changes_neither_shape_nor_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """One element is one number, however it is wrapped."""
    query = randn(4, 3).float()
    logits = reference.cosine_logits(query, query, torch.full(shape, 0.5, dtype=dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference.cosine_logits(query, query, 0.5))


def test_info_nce_and_its_gradient_are_eq_1() -> None:
    """Loss and gradients of both forms; 1e-10 is 1e5 roundings, for sums of 30 products over τ."""
    query, key = randn(6, 5), randn(6, 5, seed=1)
    inputs = (query.tolist(), key.tolist(), TAU)
    query.requires_grad_()
    key.requires_grad_()
    for both, loss, slope in (
        (False, equations.info_nce, equations.info_nce_gradient),
        (True, equations.symmetric, equations.symmetric_gradient),
    ):
        terms = reference.info_nce(reference.cosine_logits(query, key, TAU), symmetric=both)
        assert equations.relative_error(terms, loss(*inputs)) < 1e-12
        d_query, d_key, _ = slope(*inputs, [1.0] * 6)
        found = torch.autograd.grad(terms.sum(), (query, key))
        assert equations.relative_error(found[0], d_query) < 1e-10
        assert equations.relative_error(found[1], d_key) < 1e-10


def test_spatial_contrast_and_its_gradient_are_eq_4() -> None:
    """N timesteps, each its own problem, and their mean."""
    original, spatial = randn(5, 3, 4), randn(5, 3, 4, seed=1)
    inputs = (original.tolist(), spatial.tolist(), TAU)
    original.requires_grad_()
    logits = reference.spatial_logits(original, spatial, TAU)
    assert logits.shape == (3, 5, 5)
    terms = reference.spatial_contrast(logits)
    assert equations.relative_error(terms, equations.spatial_contrast(*inputs)) < 1e-12
    expected, _, _ = equations.spatial_contrast_gradient(*inputs, [1.0] * 5)
    (found,) = torch.autograd.grad(terms.sum(), original)
    assert equations.relative_error(found, expected) < 1e-10


def test_temporal_contrast_is_eq_5() -> None:
    """The same terms as Eq. 1, between other views."""
    original, temporal = randn(5, 4), randn(5, 4, seed=1)
    terms = reference.temporal_contrast(reference.cosine_logits(original, temporal, TAU))
    expected = equations.info_nce(original.tolist(), temporal.tolist(), TAU)
    assert equations.relative_error(terms, expected) < 1e-12


def test_hd_nce_is_the_weighted_sum_of_eq_6() -> None:
    """α weighs the spatial terms, β the temporal ones, in the order given."""
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])
    terms = reference.hd_nce([a, b], [c], alpha=[2.0, 3.0], beta=[0.5])
    assert terms.tolist() == [82.0, 164.0]


def test_top1_counts_a_tie_as_a_miss() -> None:
    """Otherwise a collapsed encoder would seem perfect."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [5.0, 5.0, 1.0], [0.0, 3.0, 1.0]])
    assert reference.top1(logits).tolist() == [True, False, False]
    assert reference.top1(torch.zeros(1, 1)).tolist() == [True]


def test_top1_counts_nan_as_a_miss() -> None:
    """A NaN compares as neither larger nor smaller, and must not pass for a beaten rival."""
    nan = torch.nan
    logits = torch.tensor([[2.0, nan, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, nan]])
    assert reference.top1(logits).tolist() == [False, True, False]


def test_reduce() -> None:
    """Eq. 1 sums over the batch; "mean" divides by all elements."""
    loss = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert reference.reduce(loss, "none") is loss
    assert reference.reduce(loss, "sum").item() == 12.0
    assert reference.reduce(loss, "mean").item() == 3.0


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype(given: torch.dtype, computed: torch.dtype) -> None:
    """Half precision is widened, nothing is narrowed."""
    assert reference.compute_dtype(given) == computed
    query = torch.ones(2, 3, dtype=given)
    assert reference.cosine_logits(query, query, TAU).dtype == computed


@pytest.mark.parametrize("length", [0.0, 1e-13, reference.ZERO_NORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_normalize_keeps_short_vectors_zero(dtype: torch.dtype, length: float) -> None:
    """Up to the documented bound a vector is zero, and so is its gradient: neither 0/0 nor 1/1e-13."""
    x = torch.tensor([[length, 0.0], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    unit = reference.l2_normalize(x)
    torch.testing.assert_close(unit, torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=dtype))
    assert unit[0].tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(unit[:, 1].sum(), x)
    assert gradient[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient[1], torch.tensor([-0.096, 0.072], dtype=dtype))


def test_the_smallest_float16_is_no_zero_vector() -> None:
    """Its square is 0 in 16 bits, which is why norms are not taken there."""
    smallest = torch.tensor([[2.0**-24, 0.0], [0.0, 2.0**-24]], dtype=torch.float16)
    assert torch.equal(reference.cosine_logits(smallest, smallest, 1.0), torch.eye(2))


def test_the_largest_float16_does_not_overflow() -> None:
    """Its square is infinite in 16 bits."""
    largest = torch.tensor([[65504.0, 0.0], [0.0, 65504.0]], dtype=torch.float16)
    assert torch.equal(reference.cosine_logits(largest, largest, 1.0), torch.eye(2))
