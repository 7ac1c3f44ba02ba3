"""Several processes for tests of what they do together: all checks of one world size in one start."""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

SECONDS = 400
Check = Callable[[int, int], None]  # (rank, world size)


def run(checks: dict[str, Check], world_size: int, folder: Path) -> dict[str, str]:
    """Every check on every rank, in turn -> what went wrong, by check; empty if nothing did.

    The first that fails ends them all: what the ranks would send each other from then on is anybody's guess.
    """
    arguments = (checks, world_size, str(folder))
    start(_worker, world_size, *arguments)
    files = [folder / f"{rank}.json" for rank in range(world_size)]
    found = [json.loads(file.read_text()) for file in files]
    return {
        name: "\n".join(filter(None, (one.get(name, "was not run") for one in found)))
        for name in checks
    }


def start(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """`function(rank, *arguments)` in a process for each rank; raises where one does, or none ends in time."""
    # Forked from a server that has imported the library once: each would need seconds of its own for that.
    multiprocessing.set_forkserver_preload(["hdc_kernels"])
    with patch.dict(os.environ, PYTHONSAFEPATH="1"):  # the installed one, not the sources beside
        forkserver.ensure_running()
    context = torch.multiprocessing.start_processes(
        function,
        arguments,
        nprocs=world_size,
        join=False,
        daemon=True,
        start_method="forkserver",
    )
    assert context is not None
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{world_size} processes did not end within {SECONDS} s")


def _worker(rank: int, checks: dict[str, Check], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, check in checks.items():
        try:
            check(rank, world_size)
        except Exception:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
            break
        results[name] = ""
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    if not any(results.values()):
        dist.barrier()
        dist.destroy_process_group()
