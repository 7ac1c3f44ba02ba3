"""What `InChunks` refuses: chunk sizes, encoders, and inputs and outputs that cannot be split or joined."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from embeddings import randn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hdc_kernels.in_chunks import InChunks


@pytest.mark.parametrize(
    ("chunk_size", "error", "message"),
    [
        (0, ValueError, "chunk_size is 0; it must be at least 1"),
        (-3, ValueError, "chunk_size is -3; it must be at least 1"),
        (True, TypeError, "chunk_size is a bool; it must be an int"),
        (2.0, TypeError, "chunk_size is a float; it must be an int"),
        (None, TypeError, "chunk_size is a NoneType; it must be an int"),
    ],
)
def test_bad_chunk_size(chunk_size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        InChunks(nn.Identity(), chunk_size)


def test_encoder_must_be_a_module() -> None:
    """A function would work, but its parameters would be missing from the module's."""
    with pytest.raises(TypeError, match="encoder is a function; it must be a"):
        InChunks(lambda x: x, 4)


@pytest.mark.parametrize("wrap", [lambda x: x, nn.Sequential, torch.compile])
def test_ddp_inside_is_refused(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """However deep."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        encoder = wrap(DistributedDataParallel(nn.Linear(6, 5)))
        with pytest.raises(ValueError, match=r"DistributedDataParallel\(InChunks\(encoder"):
            InChunks(encoder, 4)
    finally:
        dist.destroy_process_group()


X = randn(4, 3)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ((), {}, "there is no tensor among the inputs"),
        (([1, "a"],), {"x": None}, "there is no tensor among the inputs"),
        ((X, X[:3]), {}, "inputs[1] has shape [3, 3] but inputs[0] has shape [4, 3]; dimension 0"),
        (
            (7, {"ids": X}),
            {"mask": [X, X[:1, :1]]},
            "kwargs['mask'][1] has shape [1, 1] but inputs[1]['ids'] has shape [4, 3]; dimension 0",
        ),
        ((X,), {"t": torch.tensor(0.1)}, "kwargs['t'] has shape []; it must have a dimension 0"),
        ((torch.tensor(0.1), X), {}, "inputs[0] has shape []; it must have a dimension 0"),
    ],
)
def test_bad_inputs(inputs: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InChunks(nn.Identity(), 2)(*inputs, **kwargs)


class Returning(nn.Module):
    """Any function as an encoder."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda x: x.mean(),
            ValueError,
            "output of the encoder has shape [] for a chunk of 2 rows",
        ),
        (lambda x: {"t": x.T}, ValueError, "output['t'] of the encoder has shape [3, 2] for"),
        (lambda x: (x, 1.5), TypeError, "output[1] of the encoder is a float; it must be a tensor"),
    ],
)
def test_bad_outputs(function: Callable[..., Any], error: type[Exception], message: str) -> None:
    """Joining them would be wrong, or impossible."""
    with pytest.raises(error, match=re.escape(message)):
        InChunks(Returning(function), 2)(X)


def test_unsplit_inputs_are_noticed() -> None:
    """A container that PyTorch does not know is handed whole to every chunk: the outputs tell."""

    class Batch:
        x = X

    with pytest.raises(ValueError, match=re.escape("(inputs that are no tensors are not split)")):
        InChunks(Returning(lambda x, batch: batch.x), 2)(X, Batch())
