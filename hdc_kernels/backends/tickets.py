"""The counter by which the blocks of a launch find out which of them is the last, and adds up what all have left."""

import functools

import torch
from torch import Tensor


def ticket(device: torch.device) -> Tensor:
    """[1] int32, 0 when the next launch on the current stream begins; that launch has to leave it at 0.

    Launches on a stream follow each other, so they share one, and none is cleared for it. A CUDA graph may be
    replayed on any stream, beside others: it gets one of its own, cleared at every replay.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
