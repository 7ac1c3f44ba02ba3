"""The paper's equations 1 to 6 once more, in loops over Python floats, with gradients derived by hand.

Nothing here shares code or a formulation with `hdc_kernels`: no matrices, no torch, no autograd. An
embedding is a list of D floats, a batch a list of B embeddings, a batch of timesteps a list of B lists of
N embeddings. Losses are lists with one term per query (the summands over i). Gradients are those of
Σ_i upstream_i · term_i, so an upstream of ones gives the gradient of the paper's sum over the batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
Batch = list[Vector]
Timesteps = list[Batch]


def dot(a: Vector, b: Vector) -> float:
    """a · b, correctly rounded."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    """|a|."""
    return math.sqrt(dot(a, a))


def similarity(a: Vector, b: Vector, normalize: bool = True) -> float:
    """The cosine of Eq. 1, 0 for a zero vector; the plain dot product without `normalize`."""
    if not normalize:
        return dot(a, b)
    lengths = norm(a) * norm(b)
    return dot(a, b) / lengths if lengths else 0.0


def similarity_gradient(a: Vector, b: Vector, normalize: bool = True) -> Vector:
    """∂ similarity(a, b) / ∂a: b / (|a||b|) − cos(a, b) a / |a|²."""
    if not normalize:
        return b
    lengths = norm(a) * norm(b)
    if not lengths:
        return [0.0 for _ in a]
    cosine = similarity(a, b)
    return [y / lengths - cosine * x / norm(a) ** 2 for x, y in zip(a, b, strict=True)]


def log_sum_exp(logits: Vector) -> float:
    """log Σ exp, shifted by the maximum because exp(1 / τ) overflows at τ = 0.001."""
    shift = max(logits)
    return shift + math.log(math.fsum(math.exp(logit - shift) for logit in logits))


def info_nce(query: Batch, key: Batch, tau: float, normalize: bool = True) -> Vector:
    """The terms of Eq. 1 (and of Eq. 3 and 5)."""
    terms = []
    for i, q in enumerate(query):
        logits = [similarity(q, k, normalize) / tau for k in key]
        terms.append(log_sum_exp(logits) - logits[i])
    return terms


def info_nce_gradient(
    query: Batch, key: Batch, tau: float, upstream: Vector, normalize: bool = True
) -> tuple[Batch, Batch, float]:
    """Gradients for query, key and τ: ∂ term_i / ∂ (s_ij / τ) is S_ij of Eq. 2, less 1 if i = j."""
    d_query = [[0.0 for _ in q] for q in query]
    d_key = [[0.0 for _ in k] for k in key]
    d_tau = 0.0
    for i, q in enumerate(query):
        logits = [similarity(q, k, normalize) / tau for k in key]
        total = log_sum_exp(logits)
        for j, k in enumerate(key):
            d_logit = upstream[i] * (math.exp(logits[j] - total) - (i == j))
            d_tau -= d_logit * logits[j] / tau
            for d, slope in enumerate(similarity_gradient(q, k, normalize)):
                d_query[i][d] += d_logit / tau * slope
            for d, slope in enumerate(similarity_gradient(k, q, normalize)):
                d_key[j][d] += d_logit / tau * slope
    return d_query, d_key, d_tau


def symmetric(query: Batch, key: Batch, tau: float, normalize: bool = True) -> Vector:
    """The mean of both directions: query to key and key to query."""
    there = info_nce(query, key, tau, normalize)
    back = info_nce(key, query, tau, normalize)
    return [(a + b) / 2 for a, b in zip(there, back, strict=True)]


def symmetric_gradient(
    query: Batch, key: Batch, tau: float, upstream: Vector, normalize: bool = True
) -> tuple[Batch, Batch, float]:
    """The mean of both directions' gradients."""
    q1, k1, tau1 = info_nce_gradient(query, key, tau, upstream, normalize)
    k2, q2, tau2 = info_nce_gradient(key, query, tau, upstream, normalize)
    return _mean(q1, q2), _mean(k1, k2), (tau1 + tau2) / 2


def top1(query: Batch, key: Batch) -> list[bool]:
    """Whether the positive is closer than every negative; a tie is not closer."""
    hits = []
    for i, q in enumerate(query):
        rivals = [similarity(q, k) for j, k in enumerate(key) if j != i]
        hits.append(all(rival < similarity(q, key[i]) for rival in rivals))
    return hits


def timestep(clips: Timesteps, n: int) -> Batch:
    """The embeddings of timestep n of every clip."""
    return [clip[n] for clip in clips]


def spatial_contrast(original: Timesteps, spatial: Timesteps, tau: float) -> Vector:
    """The terms of Eq. 4: for each clip the mean over its N timesteps."""
    steps = len(original[0])
    terms = [info_nce(timestep(original, n), timestep(spatial, n), tau) for n in range(steps)]
    return [math.fsum(step[i] for step in terms) / steps for i in range(len(original))]


def spatial_contrast_gradient(
    original: Timesteps, spatial: Timesteps, tau: float, upstream: Vector
) -> tuple[Timesteps, Timesteps, float]:
    """Gradients of Eq. 4: each timestep gets 1/N of the upstream gradient."""
    steps = len(original[0])
    share = [u / steps for u in upstream]
    d_original: Timesteps = [[] for _ in original]
    d_spatial: Timesteps = [[] for _ in spatial]
    d_tau = 0.0
    for n in range(steps):
        ours, theirs, tau_n = info_nce_gradient(
            timestep(original, n), timestep(spatial, n), tau, share
        )
        d_tau += tau_n
        for i in range(len(original)):
            d_original[i].append(ours[i])
            d_spatial[i].append(theirs[i])
    return d_original, d_spatial, d_tau


def hd_nce(
    spatial: Sequence[tuple[Timesteps, Timesteps]],
    temporal: Sequence[tuple[Batch, Batch]],
    alpha: Sequence[float],
    beta: Sequence[float],
    tau: float,
) -> Vector:
    """The terms of Eq. 6: for each clip Σ_k α_k L_s^k + β_k L_t^k."""
    scales = [(a, spatial_contrast(*pair, tau)) for a, pair in zip(alpha, spatial, strict=True)]
    scales += [(b, info_nce(*pair, tau)) for b, pair in zip(beta, temporal, strict=True)]
    clips = len(scales[0][1])
    return [math.fsum(weight * terms[i] for weight, terms in scales) for i in range(clips)]


def hd_nce_gradient(
    spatial: Sequence[tuple[Timesteps, Timesteps]],
    temporal: Sequence[tuple[Batch, Batch]],
    alpha: Sequence[float],
    beta: Sequence[float],
    tau: float,
    upstream: Vector,
) -> tuple[list[Any], float]:
    """Gradients of Eq. 6: one per embedding batch in the order given, spatial first, and that of τ."""
    gradients: list[Any] = []
    d_tau = 0.0
    for a, (v_o, v_s) in zip(alpha, spatial, strict=True):
        *clips, tau_k = spatial_contrast_gradient(v_o, v_s, tau, [a * u for u in upstream])
        gradients += clips
        d_tau += tau_k
    for b, (v_o, v_t) in zip(beta, temporal, strict=True):
        *clips, tau_k = info_nce_gradient(v_o, v_t, tau, [b * u for u in upstream])
        gradients += clips
        d_tau += tau_k
    return gradients, d_tau


def relative_error(actual: Tensor, expected: object) -> float:
    """|actual − expected| / |expected| in the L2 norm: NaN, which no bound admits, if either has one."""
    exact = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert actual.shape == exact.shape
    return float((actual.detach().double() - exact).norm() / exact.norm())


def _mean(a: Batch, b: Batch) -> Batch:
    return [[(x + y) / 2 for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]
