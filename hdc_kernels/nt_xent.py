"""NT-Xent (SimCLR, Chen et al. 2020): two views of B samples, each row against the 2B − 1 others."""

from typing import Any

import torch
from torch import Tensor

from hdc_kernels.backends import Mask
from hdc_kernels.checks import Backend, Reduction, check_choice, check_pair, check_temperature
from hdc_kernels.contrast import contrast
from hdc_kernels.distributed.contrast import contrast_across
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import meet
from hdc_kernels.module import Loss


def fused_nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
) -> Tensor:
    """−log( exp(sim(z_i, z_p)/τ) / Σ_{j≠i} exp(sim(z_i, z_j)/τ) ) for all 2B rows z of both views.

    z_p is the other view of the sample of z_i. The sum is over all rows but z_i itself, of both views.

    Args:
        first: [B, D], float64, float32, bfloat16 or float16: one view of each sample.
        second: [B, D], the other views: `second[i]` belongs to `first[i]`. Same dtype and device.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        reduction: "mean" over the 2B rows, their "sum", or "none" for one value per row, [2, B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group: as in `fused_info_nce`.

    Returns:
        A scalar, or [2, B] for "none"; float64 for float64 inputs, float32 for all others.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0. With B = 1 there is
        nothing to tell apart: the loss is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: lightly's `NTXentLoss(temperature=τ)`; pytorch-metric-learning's `NTXentLoss` and `SupConLoss`
    of both views, labelled by sample.
    """
    check_pair(("first", "second"), (first, second), "[B, D]", empty=process_group is not None)
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    batch = first.shape[0]
    # Beside row i of x stands its positive; where row i itself stands in y, the ids are equal.
    rows = torch.arange(2 * batch, device=first.device)
    pairs = [(torch.cat((first, second)), torch.cat((second, first)))]
    ids = rows, rows.roll(batch)
    options: dict[str, Any] = {
        "weights": None if reduction == "none" else [1.0],
        "temperature": temperature,
        "normalize": normalize,
        "backend": backend,
    }
    if process_group is None:
        divisor = 2 * batch if reduction == "mean" else 1
        mask = Mask(ids=(ids[0].unsqueeze(0), ids[1].unsqueeze(0)))
        value = contrast(pairs, divisor=divisor, mask=mask, **options).value
    else:
        views = meet(process_group, first.device, batch)[0].times(2)
        divisor = views.size if reduction == "mean" else 1
        rows = views.numbers(first.device)[: 2 * batch]
        ids = rows, rows.roll(batch)
        share = contrast_across(views, views, pairs, divisor=divisor, ids=ids, **options).value
        value = views.shown(share, reduction)
    return value.view(2, batch) if reduction == "none" else value


class NTXent(Loss):
    """`fused_nt_xent` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """See `fused_nt_xent`."""
        return fused_nt_xent(first, second, **self.options)
