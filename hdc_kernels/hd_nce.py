"""HD-NCE: the paper's compound loss, Spatial and Temporal Contrast at several scales (Eq. 4 to 6)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from hdc_kernels.backends.outputs import means_of
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_pair,
    check_temperature,
    check_weights,
)
from hdc_kernels.contrast import contrast
from hdc_kernels.distributed.contrast import contrast_across
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss
from hdc_kernels.reduction import check_sample_weights, reduce

Pair = tuple[Tensor, Tensor]


class HDNCEMetrics(NamedTuple):
    """What to log of one HD-NCE step: one detached float32 entry per scale, in the order given.

    A loss is the unweighted mean over clips (and timesteps); an accuracy is the share of queries whose
    positive is closer than every negative.
    """

    spatial_loss: Tensor
    spatial_accuracy: Tensor
    temporal_loss: Tensor
    temporal_accuracy: Tensor


@overload
def fused_hd_nce(
    spatial: Sequence[Pair],
    temporal: Sequence[Pair],
    *,
    alpha: Sequence[float],
    beta: Sequence[float],
    temperature: float | Tensor = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_hd_nce(
    spatial: Sequence[Pair],
    temporal: Sequence[Pair],
    *,
    alpha: Sequence[float],
    beta: Sequence[float],
    temperature: float | Tensor = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, HDNCEMetrics]: ...


def fused_hd_nce(
    spatial: Sequence[Pair],
    temporal: Sequence[Pair],
    *,
    alpha: Sequence[float],
    beta: Sequence[float],
    temperature: float | Tensor = 0.07,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, HDNCEMetrics]:
    """L = Σ_k α_k·L_s^k + β_k·L_t^k: the paper's Eq. 6, with L_s^k of Eq. 4 and L_t^k of Eq. 5.

    Args:
        spatial: for each scale a pair (v_o, v_s) of [B, N_k, D_k], the embeddings of the N_k timesteps
            of two views of the same clip. May be empty.
        temporal: for each scale a pair (v_o, v_t) of [B, D_k], the embeddings of two clips of the same
            video. May be empty, but not both. Every pair has the same B, dtype and device.
        alpha: the weights α_k, one per entry of `spatial`, not negative.
        beta: the weights β_k, one per entry of `temporal`, not negative.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        sample_weights: [B], of the clips, as in `fused_info_nce`.
        reduction: "sum" is Eq. 6 to the letter, a sum over the batch; "mean" divides it by B; "none"
            returns each clip's share, [B].
        normalize: divide by the L2 norm first, as the paper does.
        backend, process_group: as in `fused_info_nce`.
        return_metrics: also return the losses and accuracies of every scale, out of the same pass.

    Returns:
        The loss (float64 for float64 inputs, float32 for all others), with `return_metrics` a pair of
        it and `HDNCEMetrics`.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """
    _check(spatial, temporal, alpha, beta, process_group is not None)
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    pairs = [*spatial, *temporal]
    steps = [v_o.shape[1] for v_o, _ in spatial]
    batch = pairs[0][0].shape[0]
    check_sample_weights(sample_weights, (batch,), pairs[0][0].device)
    weights = [float(a) / n for a, n in zip(alpha, steps, strict=True)] + [float(b) for b in beta]
    summed = reduction != "none" and sample_weights is None
    options: dict[str, Any] = {
        "weights": weights if summed else None,
        "temperature": temperature,
        "normalize": normalize,
        "rows_first": len(spatial),  # every timestep is a problem of its own
        "detail": "means" if return_metrics else "total",
        "backend": backend,
    }
    across: Rows | None = None
    if process_group is None:
        divisor = batch if reduction == "mean" else 1
        found = contrast(pairs, divisor=divisor, **options)
    else:
        (across,) = meet(process_group, pairs[0][0].device, batch)
        found = contrast_across(
            across,
            across,
            pairs,
            divisor=across.size if reduction == "mean" else 1,
            **options,
        )
    value, sizes = found.value, [n * batch for n in steps] + [batch] * len(temporal)
    if not summed:
        by_pair = zip(weights, [*steps, *([1] * len(temporal))], value.split(sizes), strict=True)
        value = torch.stack([w * loss.view(n, batch).sum(0) for w, n, loss in by_pair]).sum(0)
        value = reduce(value, reduction, sample_weights, across)
    elif across is not None:
        value = across.total(value)
    if not return_metrics:
        return value
    means = means_of(found.terms, found.hits, sizes) if found.means is None else found.means
    (losses, accuracies), scales = means.float(), len(spatial)
    return value, HDNCEMetrics(
        losses[:scales], accuracies[:scales], losses[scales:], accuracies[scales:]
    )


def _check(
    spatial: Sequence[Pair],
    temporal: Sequence[Pair],
    alpha: Sequence[float],
    beta: Sequence[float],
    empty: bool,
) -> None:
    expected = None
    for task, pairs, shape, views in (
        ("spatial", spatial, "[B, N, D]", ("v_o", "v_s")),
        ("temporal", temporal, "[B, D]", ("v_o", "v_t")),
    ):
        if not isinstance(pairs, Sequence):
            raise TypeError(
                f"{task} is a {type(pairs).__name__}; it must be a sequence of pairs of tensors {shape}"
            )
        for scale, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                given = type(pair).__name__
                if isinstance(pair, (tuple, list)):
                    given += f" of {len(pair)}"
                raise TypeError(
                    f"{task}[{scale}] is a {given}; it must be a pair ({', '.join(views)}) of {shape}"
                )
            names = (f"{task}[{scale}] {views[0]}", f"{task}[{scale}] {views[1]}")
            check_pair(names, (pair[0], pair[1]), shape, empty=empty)
            found = (pair[0].shape[0], pair[0].dtype, pair[0].device)
            expected = expected or found
            if found != expected:
                raise ValueError(
                    f"{task}[{scale}] has batch size, dtype and device {_list(found)} but the first "
                    f"pair has {_list(expected)}; every scale must come from the same batch"
                )
    if expected is None:
        raise ValueError("spatial and temporal are both empty; give at least one pair")
    check_weights("alpha", alpha, "spatial", len(spatial))
    check_weights("beta", beta, "temporal", len(temporal))


def _list(found: tuple[int, torch.dtype, torch.device]) -> str:
    batch, dtype, device = found
    return f"{batch}, {str(dtype).removeprefix('torch.')}, {device}"


class HDNCE(Loss):
    """`fused_hd_nce` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        alpha: Sequence[float] = (0.25, 0.5, 1.0),
        beta: Sequence[float] = (0.25, 0.5, 1.0),
        temperature: float | Tensor = 0.07,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_weights("alpha", alpha)
        check_weights("beta", beta)
        super().__init__(
            temperature,
            alpha=tuple(alpha),
            beta=tuple(beta),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        spatial: Sequence[Pair],
        temporal: Sequence[Pair],
        *,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_hd_nce`."""
        loss: Tensor = fused_hd_nce(
            spatial, temporal, sample_weights=sample_weights, **self.options
        )
        return loss
