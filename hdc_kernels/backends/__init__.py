"""What a backend is: the one quadratic operation of this package, under one signature.

A backend is a module with three functions, none of which is seen by autograd:

    forward(problems) -> Terms                            the loss term of every row
    backward(problems, lse, upstream) -> Gradients        of Σ upstream · terms
    step(problems) -> (Terms, Gradients)                  both at once, of Σ_k weights[k] · Σ terms_k

`step` exists because whoever knows the upstream gradients beforehand can save a product of matrices (on
a CPU) or a launch (on a GPU). A backend knows nothing of losses, and a loss nothing of backends.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Problems(NamedTuple):
    """K pairs of embeddings, each of G_k independent problems; all of one dtype and device.

    Pair k is x[k] of [G_k, M_k, D_k] and y[k] of [G_k, N_k, D_k], N_k ≥ M_k, of any strides. Row i of x
    has its positive in row i of y; every other row of y is a negative. Logits are cosines (dot products
    without `normalize`) over the temperature. `symmetric` needs M_k = N_k.

    Wherever something is kept per row it is flat: [T] with T = Σ_k G_k·M_k, pair after pair, problem
    after problem.
    """

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    weights: tuple[float, ...]  # of each pair's terms in their total
    temperature: float | Tensor  # a tensor has one element
    normalize: bool
    symmetric: bool


class Terms(NamedTuple):
    """In the dtype of `reference.compute_dtype`, but for `hits`.

    total: Σ_k weights[k] · Σ terms of pair k, without a dimension.
    loss: [T], log(1 + exp(lse_i − s_ii)); `symmetric` gives its mean with the same of column i.
    hits: [T] bool, whether the positive's logit is above every negative's (a tie is a miss).
    lse: [1, T] of dtype LSE_DTYPE, the logsumexp of row i's negatives, without the positive (−inf where
        there are none); `symmetric` gives [2, T], with that of the columns below.
    """

    total: Tensor
    loss: Tensor
    hits: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """For every x[k] and y[k], in their shapes, and for the temperature (no dimension).

    `backward` gives them in the dtypes of x and y. `step` gives them in `reference.compute_dtype`: they will
    be multiplied by an upstream gradient, a loss scale perhaps, without which they might vanish in float16.
    """

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    temperature: Tensor


class Implementation(Protocol):
    """The signature that every module in this folder has, but for `plain`, which autograd does see."""

    LSE_DTYPE: torch.dtype

    def forward(self, problems: Problems) -> Terms: ...

    def backward(self, problems: Problems, lse: Tensor, upstream: Tensor) -> Gradients: ...

    def step(self, problems: Problems) -> tuple[Terms, Gradients]: ...
