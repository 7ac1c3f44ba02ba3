"""Argument checks shared by every loss: one line that names the argument, what came and what may come."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "torch", "chunked", "cpu", "triton", "cuda"]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_choice(name: str, value: object, allowed: object) -> None:
    """`allowed` is a `Literal`; raises ValueError for anything outside it."""
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: float) -> None:
    """A real number, NumPy's too, of any value; raises TypeError otherwise, also for a bool."""
    if not _is_number(value):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")


def check_count(name: str, value: int) -> None:
    """An int of at least 1; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> None:
    """A positive finite number, or a floating tensor with one element.

    The value of a tensor is not read: on a GPU that would make every step wait for the device.
    """
    if _check_scalar(name, temperature) and not 0 < temperature < math.inf:
        raise ValueError(f"{name} is {temperature}; it must be positive and finite")


def check_bias(name: str, bias: float | Tensor) -> None:
    """A finite number, or a floating tensor with one element, whose value is not read."""
    if _check_scalar(name, bias) and not -math.inf < bias < math.inf:
        raise ValueError(f"{name} is {bias}; it must be finite")


def check_pair(
    names: tuple[str, str],
    pair: tuple[Tensor, Tensor],
    shape: str,
    *,
    extra_rows: bool = False,
    empty: bool = False,
) -> None:
    """Both tensors floating, of one shape, dtype and device. `shape` reads like "[..., B, D]".

    With `extra_rows`, the second may have more rows (its second-last dimension) than the first. With `empty`, B
    may be 0, on a rank of a group that has none.
    """
    query, key = pair
    _check_embeddings(names[0], query, shape, empty)
    equal = isinstance(key, Tensor) and key.shape == query.shape and key.dtype == query.dtype
    if not equal:
        _check_embeddings(names[1], key, shape, empty)
    check_alike(names, pair)
    if equal:
        return
    more = extra_rows and key.dim() == query.dim() and key.shape[-2] > query.shape[-2]
    if key.shape != (
        query.shape[:-2] + key.shape[-2:-1] + query.shape[-1:] if more else query.shape
    ):
        allowed = f"{names[1]} may have more rows, otherwise " if extra_rows else ""
        raise ValueError(
            f"{names[1]} has shape {_shape(key)} but {names[0]} has {_shape(query)}; "
            f"{allowed}they must be equal"
        )


def _check_embeddings(name: str, tensor: Tensor, shape: str, empty: bool) -> None:
    """Of `check_pair`, what one tensor has to be by itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor {shape}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it must be one of "
            + ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        )
    if tensor.dim() != shape.count(",") + 1 and not ("..." in shape and tensor.dim() >= 2):
        raise ValueError(f"{name} has shape {_shape(tensor)}; it must be {shape}")
    if tensor.numel() == 0 and not (empty and _lacks_only_rows(tensor, shape)):
        raise ValueError(f"{name} has shape {_shape(tensor)}; no dimension may be 0")


def check_alike(names: tuple[str, str], pair: tuple[Tensor, Tensor]) -> None:
    """Tensors of one dtype and device."""
    query, key = pair
    for what, ours, theirs in (
        ("dtype", query.dtype, key.dtype),
        ("device", query.device, key.device),
    ):
        if ours != theirs:
            raise ValueError(
                f"{names[1]} has {what} {theirs} but {names[0]} has {ours}; they must be equal"
            )


def check_weights(
    name: str, weights: Sequence[float], what: str = "", scales: int | None = None
) -> None:
    """One finite, non-negative number for each of the `scales` entries of `what`, if that is known."""
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence):
        raise TypeError(f"{name} is a {type(weights).__name__}; it must be a sequence of numbers")
    if scales is not None and len(weights) != scales:
        raise ValueError(
            f"{name} has {len(weights)} weights but {what} has {scales} scales; one weight per scale"
        )
    for weight in weights:
        if not _is_number(weight):
            raise TypeError(f"{name} holds a {type(weight).__name__}; its entries must be numbers")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} holds {weight}; a weight must be finite and not negative")


def check_labels(name: str, labels: Tensor, of: str, embeddings: Tensor) -> None:
    """One integer for each row of `embeddings`, which is the argument `of`, on its device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is a {type(labels).__name__}; it must be a tensor of integers")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} has dtype {labels.dtype}; it must be an integer one")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name} has shape {_shape(labels)} but {of} has {_shape(embeddings)}; "
            "it must have one label for each row"
        )
    if labels.device != embeddings.device:
        raise ValueError(
            f"{name} is on {labels.device} but {of} on {embeddings.device}; they must be equal"
        )


def _is_number(value: object) -> bool:
    """A bool is none. The built-in types come first: to ask for an abstract one takes longer."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def _check_scalar(name: str, value: float | Tensor) -> bool:
    """Whether it is a number and no tensor; raises for what is neither, and for a tensor of another kind."""
    if isinstance(value, float):  # most are
        return True
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} is a {_describe(value)}; "
                "as a tensor it must be floating and hold exactly one element"
            )
        return False
    if not _is_number(value):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number or a tensor")
    return True


def _lacks_only_rows(tensor: Tensor, shape: str) -> bool:
    names = shape.strip("[]").split(", ")
    batch = tensor.dim() - len(names) + names.index("B")
    return all(size > 0 for k, size in enumerate(tensor.shape) if k != batch)


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} tensor {_shape(tensor)}"
