"""The counter by which the blocks of a launch find out which of them is the last, and adds up what all have left."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def ticket(device: torch.device) -> Tensor:
    """[1] int32, 0 when the next launch on the current stream begins; that launch has to leave it at 0.

    Launches on a stream follow each other, so they share one, and none is cleared for it. A CUDA graph may be
    replayed on any stream, beside others: it gets one of its own, cleared at every replay.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _of_stream(torch.cuda.current_stream(device))


@functools.cache
def _of_stream(stream: torch.cuda.Stream) -> Tensor:
    # Made by another thread: before torch.compile captures a graph, this one's memory may come from the graph's
    # pool, which would hand it out again.
    def zero() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(1, dtype=torch.int32, device=stream.device)

    with ThreadPoolExecutor(1) as other:
        return other.submit(zero).result()
