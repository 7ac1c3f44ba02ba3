"""What a backend is: the one quadratic operation of this package, under one signature.

A backend is a module with three functions, none of which is seen by autograd:

    forward(problems) -> Terms                            the term of every row
    backward(problems, lse, upstream) -> Gradients        of Σ upstream · terms
    step(problems) -> (Terms, Gradients)                  both at once, of Σ_k weights[k] · Σ terms_k

`step` exists because whoever knows the upstream gradients beforehand can save a product of matrices (on
a CPU) or a launch (on a GPU). A backend knows nothing of losses, and a loss nothing of backends.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

# What row i becomes, with its logits s_ij. Only "info_nce" sets its positive, j = i, apart from the others.
#     info_nce     log(1 + exp(lse_i − s_ii)), lse_i = log Σ_{j≠i} exp s_ij
#     logsumexp    lse_i = log Σ_j exp s_ij, −∞ where there is no j
#     softplus     Σ_j log(1 + exp(s_ij + bias_i))
#     tilted       log Σ_j exp((1 + β)·s_ij) − log Σ_j exp(β·s_ij): the logarithm of the mean of exp s_ij under
#                  weights exp(β·s_ij), −∞ where there is no j
Function = Literal["info_nce", "logsumexp", "softplus", "tilted"]

# What is asked for beside the total: nothing, `Terms.means`, or all that is kept per row. The first two need weights.
Detail = Literal["total", "means", "rows"]


class Mask(NamedTuple):
    """Which columns j a row's sum goes over; the positive of "info_nce" stands whatever its ids are."""

    diagonal: bool = True  # False leaves out j = i ("info_nce" always does)
    ids: tuple[Tensor, Tensor] | None = (
        None  # of rows [G, M] and columns [G, N], int64; with K = 1 only
    )
    same: bool = False  # over columns of the row's id, rather than of any other
    left_out: Tensor | None = (
        None  # single entries, [2, E] int64 (row, column), sorted; with K = G = 1 only
    )


EVERYTHING = Mask()


class Problems(NamedTuple):
    """K pairs of embeddings, each of G_k independent problems; all of one dtype and device.

    Pair k is x[k] of [G_k, M_k, D_k] and y[k] of [G_k, N_k, D_k], of any strides; where G_k is 1 it may be missing,
    and the first `rows_first` pairs are [M_k, G_k, D_k] and [N_k, G_k, D_k]. Logits are cosines (dot products without
    `normalize`) over the temperature. For "info_nce", row i of x has its positive in row i of y, every other row of y
    that `mask` lets through is a negative, and N_k ≥ M_k.

    Wherever something is kept per row it is flat: [T] with T = Σ_k G_k·M_k, pair after pair, problem
    after problem.
    """

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    weights: tuple[float, ...]  # of each pair's terms in their total
    temperature: float | Tensor  # a tensor has one element
    normalize: bool
    symmetric: bool  # each term is the mean with that of column i; for the first two functions; needs M_k = N_k
    function: Function = "info_nce"
    mask: Mask = EVERYTHING
    bias: Tensor | None = None  # [T] in the dtype of `reference.compute_dtype`, for "softplus"
    needs_y: bool = True  # whether gradients of y are asked for; a queue of keys needs none
    # Whether `Terms.ranks` are asked for, by "info_nce" or where the mask leaves the diagonal out; needs N_k ≥ M_k.
    ranked: bool = False
    beta: float = 1.0  # β > 0, for "tilted"
    detail: Detail = "rows"
    rows_first: int = 0

    @property
    def sums(self) -> int:
        """How many logsumexps there are of every row."""
        return 2 if self.symmetric or self.function == "tilted" else 1

    @property
    def rows(self) -> list[int]:
        """G_k · M_k of every pair."""
        return [x.numel() // x.shape[-1] for x in self.x]

    def resolved(self) -> "Problems":
        """The same without views that PyTorch takes for the negative of what is in memory."""
        if not any(map(Tensor.is_neg, (*self.x, *self.y))):
            return self
        x, y = (tuple([t.resolve_neg() for t in side]) for side in (self.x, self.y))
        return self._replace(x=x, y=y)

    def grouped(self) -> "Problems":
        """The same as views, of which all are [G, rows, D]."""
        x, y = (
            tuple(
                t.transpose(0, 1) if k < self.rows_first else t.unsqueeze(0) if t.dim() == 2 else t
                for k, t in enumerate(side)
            )
            for side in (self.x, self.y)
        )
        return self._replace(x=x, y=y, rows_first=0)


class Terms(NamedTuple):
    """In the dtype of `reference.compute_dtype`, but for `hits` and `lse`.

    total: Σ_k weights[k] · Σ terms of pair k, without a dimension.
    loss: [T], the terms: see `Function`.
    hits: [T] bool, whether the positive's logit is above every negative's (a tie is a miss). Without a
        meaning but for "info_nce".
    lse: [1, T] of dtype LSE_DTYPE, the rows' lse_i; `symmetric` gives [2, T], with that of the columns
        below; so does "tilted", (1 + β) above and β below. Without a meaning for "softplus".
    ranks: [T] int64, how many of the row's other columns, of those that the mask lets through, the diagonal's logit
        is not above; None unless `ranked`.
    means: [2, K], the mean term of each pair and the share of its rows that are hits; None unless `detail` is "means".

    Unless `detail` is "rows", loss, hits and lse may be empty.
    """

    total: Tensor
    loss: Tensor
    hits: Tensor
    lse: Tensor
    ranks: Tensor | None = None
    means: Tensor | None = None


class Gradients(NamedTuple):
    """For every x[k] and y[k], in their shapes, for the temperature (no dimension) and the bias, if there is one.

    `backward` gives them in the dtypes of x and y. `step` gives them in `reference.compute_dtype`: they will
    be multiplied by an upstream gradient, a loss scale perhaps, without which they might vanish in float16.
    Without `needs_y`, y may be empty.
    """

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    temperature: Tensor
    bias: Tensor | None = None

    def ungrouped(self, problems: Problems) -> "Gradients":
        """Those of `problems.grouped()` as those of the problems, laid out in memory as these are."""

        def as_given(gradient: Tensor, given: Tensor, rows_first: bool) -> Tensor:
            if rows_first:
                gradient = gradient.transpose(0, 1)
            elif given.dim() == 2:
                gradient = gradient.squeeze(0)
            if given.stride(-1) == 1:
                return gradient
            # Kernels write along the last dimension, whatever its stride was.
            return torch.empty_like(given, dtype=gradient.dtype).copy_(gradient)

        x, y = (
            tuple(
                as_given(gradient, given, k < problems.rows_first)
                for k, (gradient, given) in enumerate(zip(gradients, side, strict=False))
            )
            for gradients, side in ((self.x, problems.x), (self.y, problems.y))
        )
        return self._replace(x=x, y=y)


class Implementation(Protocol):
    """The signature that backends `cpu`, `triton` and `cuda` have; `plain` autograd does see."""

    LSE_DTYPE: torch.dtype

    def forward(self, problems: Problems) -> Terms: ...

    def backward(self, problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients: ...

    def step(self, problems: Problems) -> tuple[Terms, Gradients]: ...
