"""Single entries of the matrix of pairs, given as a list or as the matrix itself."""

import torch
from torch import Tensor


def entries(name: str, given: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Those that are True in [B, N] bool, or listed in [2, E] integers: [2, E] int64 (row, column), sorted.

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
