"""Several positives per anchor (Khosla et al. 2020), in the three definitions that are in use."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hdc_kernels.backends import Mask
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_labels,
    check_pair,
    check_temperature,
)
from hdc_kernels.distributed import ring
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.distributed.trip import sums_by_label
from hdc_kernels.entries import entries
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import Columns, logsumexp, softplus_sum
from hdc_kernels.positives import divide, info_nce_terms
from hdc_kernels.positives import embeddings as unit_vectors
from hdc_kernels.reduction import check_sample_weights, reduce

Definition = Literal["out", "in", "each"]
WithoutPositive = Literal["exclude", "zero"]

NOTHING = -1e30  # the logarithm of no negatives at all, finite so that it has derivatives


def fused_sup_con(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    definition: Definition = "out",
    positives: Tensor | None = None,
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    other_holds_self: bool = False,
    without_positive: WithoutPositive = "exclude",
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
) -> Tensor:
    """Contrast of each anchor's positives with all others, s_ij = sim(x_i, x_j)/τ with cosine similarity.

        "out"    −1/|P_i| Σ_{p∈P_i} log( e^{s_ip} / Σ_{j≠i} e^{s_ij} )
        "in"     −log( Σ_{p∈P_i} e^{s_ip} / Σ_{j≠i} e^{s_ij} )
        "each"   Σ_{p∈P_i} −log( e^{s_ip} / (e^{s_ip} + Σ_{n∈N_i} e^{s_in}) )

    P_i are the positives of anchor i and N_i its negatives: all that are neither i nor in P_i.

    Args:
        embeddings: [B, D], float64, float32, bfloat16 or float16.
        labels: [B], any integers. Embeddings with the anchor's label, but for itself, are its positives.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        definition: see above.
        positives: instead of labels, [2, E] integers, the pairs (anchor, its positive). No anchor is its
            own positive and no pair is listed twice; neither is checked. Costs one pass over all pairs and
            O((B + E)·D) time and memory more, and a sort. Or [B, B] bool (with `other` [B, N]), True for a pair; an
            anchor's entry with itself does not count. That costs B·N bytes, whoever calls holds them, a search
            through all of them, and a graph of `torch.compile` of its own.
        other: [N, D], what the anchors are compared with instead of each other; same D, dtype and device
            as `embeddings`. The pairs in `positives` are then of a row of `embeddings` and one of `other`.
        other_labels: [N] integers; needed with `labels` and `other`.
        other_holds_self: the first B rows of `other` are the anchors themselves (a memory that the batch
            has just entered, say), with their labels; each is left out of its own sums.
        without_positive: the term of an anchor without a positive is 0; "exclude" leaves it out of
            the mean and "zero" counts it. "each" is a mean over pairs, where neither has a meaning.
        sample_weights: [B], w_i ≥ 0, of the anchors: "sum" becomes Σ w_i·l_i, "none" w_i·l_i and "mean"
            Σ w_i·l_i / Σ w_i·c_i, where an anchor counts c_i times: once or, by `without_positive`, not at all, for
            "each" as often as it has positives. Their values are not checked.
        reduction: "mean" over the anchors, or for "each" over all pairs of an anchor and a positive;
            "sum", or "none" for one value per anchor, [B]. The mean of nothing is 0.
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend: as in `fused_info_nce`.
        process_group: as in `fused_info_nce`. `other` is that of all ranks, too: let it differ by rank. The pairs
            in `positives` are of this rank's rows; those of other ranks are negatives.

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others. NaN where an
        embedding that takes part is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: "out", pytorch-metric-learning's `SupConLoss` while no term is 0, and with "zero" SupContrast's
    on normalised features; "each", pytorch-metric-learning's `NTXentLoss`; "in", solo-learn's
    `simclr_loss_func`.
    """
    empty = process_group is not None
    _check(embeddings, labels, positives, other, other_labels, other_holds_self, empty)
    check_temperature(temperature)
    check_choice("definition", definition, Definition)
    check_choice("without_positive", without_positive, WithoutPositive)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    check_sample_weights(sample_weights, embeddings.shape[:1], embeddings.device)
    holds_self = other is None or other_holds_self
    own = embeddings if other is None else other
    pairs = None if positives is None else _pairs(positives, embeddings, own, holds_self)
    y: Columns = own
    columns = labels if other_labels is None else other_labels
    across: Rows | None = None
    if process_group is not None:
        across, others = meet(
            process_group,
            embeddings.device,
            len(embeddings),
            len(own),
            names=("embeddings", "other"),
        )
        y = others.share(own)
        columns = None if columns is None else others.gather_integers(columns.long())
    problem = _Problem(embeddings, own, y, holds_self, temperature, normalize, backend)
    if labels is not None and columns is not None:
        terms, counts = _by_labels(problem, labels.long(), columns.long(), definition)
    else:
        assert pairs is not None
        terms, counts = _by_list(problem, pairs, definition)
    shares: Tensor | None = counts if definition == "each" else counts > 0
    if definition != "each" and without_positive == "zero":
        shares = None
    return reduce(terms, reduction, sample_weights, across, shares=shares)


class SupCon(Loss):
    """`fused_sup_con` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        definition: Definition = "out",
        without_positive: WithoutPositive = "exclude",
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_choice("definition", definition, Definition)
        check_choice("without_positive", without_positive, WithoutPositive)
        super().__init__(
            temperature,
            definition=definition,
            without_positive=without_positive,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        other: Tensor | None = None,
        other_labels: Tensor | None = None,
        other_holds_self: bool = False,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_sup_con`."""
        return fused_sup_con(
            embeddings,
            labels,
            positives=positives,
            other=other,
            other_labels=other_labels,
            other_holds_self=other_holds_self,
            sample_weights=sample_weights,
            **self.options,
        )


class _Problem(NamedTuple):
    """Anchors x [M, D], this rank's columns, those of all, and whether column i is anchor i, for i < M."""

    x: Tensor
    own: Tensor
    y: Columns
    holds_self: bool
    temperature: float | Tensor
    normalize: bool
    backend: str

    def options(
        self,
        ids: tuple[Tensor, Tensor] | None = None,
        *,
        same: bool = False,
        left_out: Tensor | None = None,
    ) -> dict[str, Any]:
        """For `logsumexp` and `softplus_sum`, over what the mask lets through but the anchor itself."""
        return {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "mask": Mask(not self.holds_self, ids, same, left_out),
            "backend": self.backend,
        }

    def logsumexp(self, **mask: Any) -> Tensor:
        return logsumexp(self.x, self.y, **self.options(**mask))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """x and this rank's columns as every product takes them."""
        x = unit_vectors(self.x, normalize=self.normalize)
        return x, x if self.own is self.x else unit_vectors(self.own, normalize=self.normalize)


def _by_labels(
    problem: _Problem, x_labels: Tensor, y_labels: Tensor, definition: Definition
) -> tuple[Tensor, Tensor]:
    """Each anchor's term, and how many positives it has."""
    ordered = y_labels.sort().values
    group = torch.searchsorted(ordered, x_labels)  # the place of the label's first column
    counts = torch.searchsorted(ordered, x_labels, right=True) - group
    if problem.holds_self:
        counts = counts - 1
    if definition == "out":
        lse = (
            problem.logsumexp()
        )  # first: what autograd keeps of the rest is then gone when its gradient is made
        x, y = problem.vectors()
        # The mean of products is one with the mean positive.
        if isinstance(problem.y, Tensor):
            everybody = y
            if problem.y is not problem.own:
                everybody = unit_vectors(problem.y, normalize=problem.normalize)
            own = sums_by_label(everybody, y_labels, x_labels)
        else:
            own = ring.sums_by_label(problem.y._replace(own=y), y_labels, x_labels)
        if problem.holds_self:
            own = own - y[: len(x)]
        mean = divide((x * own).sum(-1) / counts.clamp_min(1), problem.temperature)
        return torch.where(counts > 0, lse - mean, 0.0), counts
    ids = x_labels.unsqueeze(0), y_labels.unsqueeze(0)
    negative = problem.logsumexp(ids=ids)
    if definition == "in":
        return _log_share(problem.logsumexp(ids=ids, same=True), negative, counts), counts
    options = problem.options(ids, same=True)
    return softplus_sum(-problem.x, problem.y, negative.clamp_min(NOTHING), **options), counts


def _by_list(problem: _Problem, positives: Tensor, definition: Definition) -> tuple[Tensor, Tensor]:
    """As `_by_labels`; the positives of anchor i are positives[1, e] for every e with positives[0, e] = i, sorted."""
    # First, as above. Positives are not subtracted from a sum over all: that would leave rounding errors where they
    # are most of it.
    lse = problem.logsumexp(left_out=None if definition == "out" else positives)
    x, y = problem.vectors()
    anchor, positive = positives
    logits = divide((x[anchor] * y[positive]).sum(-1), problem.temperature)
    zeros = logits.new_zeros(len(x))
    counts = torch.zeros_like(zeros, dtype=torch.long).index_add(0, anchor, torch.ones_like(anchor))
    if definition == "out":
        mean = zeros.index_add(0, anchor, logits) / counts.clamp_min(1)
        return torch.where(counts > 0, lse - mean, 0.0), counts
    if definition == "each":
        return zeros.index_add(0, anchor, info_nce_terms(lse[anchor], logits)), counts
    largest = zeros.scatter_reduce(0, anchor, logits.detach(), "amax", include_self=False)
    sums = zeros.index_add(0, anchor, (logits - largest[anchor]).exp())
    return _log_share(torch.where(counts > 0, sums, 1.0).log() + largest, lse, counts), counts


def _log_share(positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
    """−log( P / (P + N) ) of their logarithms; 0 without a positive."""
    return info_nce_terms(negative, torch.where(counts > 0, positive, torch.inf))


def _check(
    embeddings: Tensor,
    labels: Tensor | None,
    positives: Tensor | None,
    other: Tensor | None,
    other_labels: Tensor | None,
    other_holds_self: bool,
    empty: bool,
) -> None:
    check_pair(("embeddings", "embeddings"), (embeddings, embeddings), "[B, D]", empty=empty)
    if other is not None:
        pair = [("embeddings", embeddings), ("other", other)]
        fewer = isinstance(other, Tensor) and other.shape[:1] < embeddings.shape[:1]
        if fewer and not other_holds_self:
            pair.reverse()  # either may have more rows
        (first, x), (second, y) = pair
        check_pair((first, second), (x, y), "[B, D]", extra_rows=True, empty=empty)
    elif other_labels is not None or other_holds_self:
        given = "other_holds_self" if other_labels is None else "other_labels"
        raise ValueError(f"{given} is given but other is not; give both or neither")
    if (labels is None) == (positives is None):
        given = "neither" if labels is None else "both"
        raise ValueError(f"labels and positives: {given} given; give exactly one")
    if labels is not None:
        check_labels("labels", labels, "embeddings", embeddings)
        if (other is None) != (other_labels is None):
            raise ValueError("other is given but other_labels is not; labels need both or neither")
        if other is not None and other_labels is not None:
            check_labels("other_labels", other_labels, "other", other)
        return
    if other_labels is not None:
        raise ValueError("other_labels is given with positives; they go with labels only")


def _pairs(positives: Tensor, x: Tensor, y: Tensor, holds_self: bool) -> Tensor:
    """The positives of x among y as a mask's entries."""
    pairs = entries("positives", positives, (len(x), len(y)), x)
    if holds_self and positives.dtype == torch.bool:
        pairs = pairs[:, pairs[0] != pairs[1]]
    return pairs
