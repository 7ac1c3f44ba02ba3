"""InfoNCE: pick the key that belongs to the query out of the batch (the paper's equations 1 to 3)."""

import math

from torch import Tensor, nn

from hdc_kernels.checks import Backend, Reduction, check_choice, check_pair, check_temperature
from hdc_kernels.contrast import contrast


def fused_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """−log( exp(sim(q_i, k_i)/τ) / Σ_j exp(sim(q_i, k_j)/τ) ) with cosine similarity.

    Args:
        query: [..., B, D], float64, float32, bfloat16 or float16. Leading dimensions are independent
            problems: a query is compared with the B keys of its own problem only.
        key: [..., N, D] with N ≥ B; `key[..., i, :]` is the positive of `query[..., i, :]`, all others are
            its negatives, also those from B on, which are nobody's positive (hard negatives, a queue). Same
            leading dimensions, D, dtype and device as `query`.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        symmetric: the mean of both directions, query to key and key to query. Needs N = B.
        reduction: "mean" over B and the leading dimensions, their "sum" (the paper's Eq. 1), or
            "none" for one value per query, [..., B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend: "auto" picks the fastest there is (`hdc_kernels/selection.py` has the rule); "cpu" is C++,
            "triton" is for GPUs, "torch" the plain specification, which holds the B×B logits and the only
            one that autograd sees through, "chunked" the same in O(B) memory.

    Returns:
        A scalar, or [..., B] for "none"; float64 for float64 inputs, float32 for all others.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: `info_nce.info_nce(query, key, temperature=τ)` of info-nce-pytorch; with `symmetric=True`
    on normalised inputs, open_clip's `ClipLoss` at `logit_scale=1/τ`.
    """
    check_pair(("query", "key"), (query, key), "[..., B, D]", extra_rows=not symmetric)
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    rows = query.shape[:-1]
    if query.dim() > 3:
        query, key = query.flatten(0, -3), key.flatten(0, -3)
    value = contrast(
        [(query, key)],
        weights=None if reduction == "none" else [1.0],
        divisor=math.prod(rows) if reduction == "mean" else 1,
        temperature=temperature,
        symmetric=symmetric,
        normalize=normalize,
        backend=backend,
    ).value
    return value.view(rows) if reduction == "none" else value


class InfoNCE(nn.Module):
    """`fused_info_nce` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, Reduction)
        check_choice("backend", backend, Backend)
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """See `fused_info_nce`."""
        return fused_info_nce(
            query,
            key,
            temperature=self.temperature,
            symmetric=self.symmetric,
            reduction=self.reduction,
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, symmetric={self.symmetric}, "
            f"reduction={self.reduction!r}, normalize={self.normalize}, backend={self.backend!r}"
        )
