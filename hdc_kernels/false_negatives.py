"""Keys that are left out of a query's negatives: because their ids are equal, or pair by pair."""

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.checks import check_labels

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
        mask = mask._replace(left_out=pairs("false_negatives", false_negatives, shape, query))
    return mask


def pairs(name: str, given: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    """The pairs of rows that are True in [B, N] bool, or listed in [2, E] integers: [2, E] int64, sorted.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """
    allowed = f"[2, E] integers or {list(shape)} bool"
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}; it must be a tensor of {allowed}")
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"{name} has dtype {given.dtype}; it must be {allowed}")
    dense = given.dtype == torch.bool
    if given.dim() != 2 or (given.shape != shape if dense else given.shape[0] != 2):
        raise ValueError(
            f"{name} has shape {list(given.shape)} and dtype {given.dtype}; it must be {allowed}"
        )
    if given.device != like.device:
        raise ValueError(
            f"{name} is on {given.device} but the embeddings on {like.device}; they must be equal"
        )
    if dense:
        return given.nonzero().mT.contiguous()
    listed = given.long()
    return listed[:, (listed[0] * shape[1] + listed[1]).argsort()]


def _check_ids(ids: tuple[Tensor, Tensor], names: Names, query: Tensor, key: Tensor) -> None:
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(
            f"ids is a {type(ids).__name__}; it must be a tensor [B] or a pair of tensors [B] and [N]"
        )
    for its, name, embeddings in zip(ids, names, (query, key), strict=True):
        check_labels(f"ids of {name}", its, name, embeddings)
