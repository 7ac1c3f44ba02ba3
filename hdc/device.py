"""Where the arithmetic runs, and how many processes decode for it."""

import os

import torch

from hdc import distributed
from hdc.config import RunConfig
from hdc.errors import InputError


def pick_device(config: RunConfig) -> torch.device:
    """The GPU if there is one for "auto"; anything else must be a device torch can use.

    Of several processes on a node each takes the GPU of its own number there.

    Raises:
        InputError: for a device that is not there, and for bf16 on a CPU: its 3D convolutions read
            uninitialised memory for some weight gradients (64 to 64 channels on 2 × 4 × 4; torch 2.13).
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and distributed.world() > 1:
        raise InputError(f"device is {name!r}, for all processes; 'cuda' gives each its own GPU")
    try:
        if name == "cuda" and distributed.world() > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)  # NCCL takes the current one
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu" and config.precision == "bf16":
        raise InputError(
            "precision is 'bf16' but the device is the CPU, where PyTorch's bf16 convolutions return "
            "wrong gradients; use float32"
        )
    return device


def decoding_workers(config: RunConfig) -> int:
    """`config.workers`, or its default: one process per core beside a GPU, at most 16; none on a CPU.

    The processes of a run on one node share its cores.

    Measured on two cores: a decoding process beside a training step slows the step by 70 %, more than
    it would take to decode in the step.
    """
    if config.workers is not None:
        return config.workers
    if pick_device(config).type == "cpu":
        return 0
    own = cores()
    if distributed.world() > 1:
        own = max(1, own // int(os.environ["LOCAL_WORLD_SIZE"]))
    return min(16, own)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
