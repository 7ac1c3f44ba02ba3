"""Keys that are left out of a query's negatives: because their ids are equal, or pair by pair."""

from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.checks import check_labels
from hdc_kernels.entries import entries

Ids = Tensor | tuple[Tensor, Tensor]
Names = tuple[str, str]


def without_false_negatives(
    ids: Ids | None,
    false_negatives: Tensor | None,
    names: Names,
    query: Tensor,
    key: Tensor,
    *,
    grouped: bool,
) -> Mask:
    """What is left of query [B, D] and key [N, D], the arguments `names`; a positive stands in any case.

    With `grouped`, whose keys are several ranks', there can be ids only.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """
    if ids is None and false_negatives is None:
        return EVERYTHING
    for option, given in (("ids", ids), ("false_negatives", false_negatives)):
        if given is not None and query.dim() != 2:
            raise ValueError(
                f"{names[0]} has shape {list(query.shape)}; with {option} it must be [B, D]"
            )
    mask = EVERYTHING
    if ids is not None:
        pair = (ids, ids) if isinstance(ids, Tensor) else ids
        _check_ids(pair, names, query, key)
        mask = mask._replace(ids=(pair[0].long().unsqueeze(0), pair[1].long().unsqueeze(0)))
    if false_negatives is not None:
        if grouped:
            raise ValueError(
                "false_negatives is given with a process_group; it must be ids instead"
            )
        shape = (len(query), len(key))
        mask = mask._replace(left_out=entries("false_negatives", false_negatives, shape, query))
    return mask


def _check_ids(ids: tuple[Tensor, Tensor], names: Names, query: Tensor, key: Tensor) -> None:
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(
            f"ids is a {type(ids).__name__}; it must be a tensor [B] or a pair of tensors [B] and [N]"
        )
    for its, name, embeddings in zip(ids, names, (query, key), strict=True):
        check_labels(f"ids of {name}", its, name, embeddings)
