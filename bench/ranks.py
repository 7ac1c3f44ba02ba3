"""What sharing negatives between processes costs here: time, memory and traffic of each of W local processes.

    python bench/ranks.py                           gloo, W = 1, 2, 4, both strategies
    python bench/ranks.py --batch 8192 --ranks 2

The global batch stays the same, so does the arithmetic of all ranks together; they share this machine's cores.
Traffic is what the loopback device carried, so nothing else may use it meanwhile. `docs/scaling.md` is the same on
paper, for GPUs.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import _settle, _status

from hdc_kernels import fused_info_nce
from hdc_kernels.distributed import Ranks

WIDTH, TAU = 128, 0.07
STRATEGIES = ("gather", "ring")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8192, help="global; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--steps", type=int, default=5, help="timed; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file to write, too")
    given = parser.parse_args()
    print("ranks  strategy  time a step  peak memory a rank  sent a rank  on paper")
    rows = []
    for ranks in given.ranks:
        for strategy in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (ranks, strategy, given.batch, given.steps, folder)
                mp.spawn(run, arguments, nprocs=ranks)
                found = json.loads(Path(folder, "result.json").read_text())
            row = {"ranks": ranks, "strategy": strategy, "batch": given.batch, **found}
            row["bytes_on_paper"] = on_paper(ranks, strategy, given.batch)
            rows.append(row)
            print(
                f"{ranks:5d}  {strategy:8s}  {row['seconds'] * 1e3:8.1f} ms  {row['peak'] / 2**20:14.1f} MiB  "
                f"{row['bytes'] / 2**20:7.2f} MiB  {row['bytes_on_paper'] / 2**20:5.2f} MiB",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


def on_paper(ranks: int, strategy: str, batch: int) -> float:
    """Bytes that a rank sends in a step, in float32: keys out, and their gradients back.

    A ring's backward pass needs the keys once more, and its gradients make the last hop home.
    """
    block = batch / ranks * WIDTH * 4
    if ranks == 1:
        return 0
    hops = 2 * (ranks - 1) if strategy == "gather" else 2 * (ranks - 1) + ranks
    return hops * block


def run(rank: int, ranks: int, strategy: str, batch: int, steps: int, folder: str) -> None:
    """One process: the first one reports for all, who have as much to do."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    shape = (batch // ranks, WIDTH)
    query, key = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    group = Ranks(dist.group.WORLD, strategy=strategy, even_batches=True)  # type: ignore[arg-type]

    def step() -> None:
        fused_info_nce(query, key, temperature=TAU, process_group=group).backward()
        query.grad = key.grad = None

    step()
    dist.barrier()
    before, start_bytes = _settle(), _sent()
    seconds = []
    for _ in range(steps):
        dist.barrier()
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak = _status("VmHWM") - before
    dist.barrier()
    if rank == 0:
        found = {
            "seconds": statistics.median(seconds),
            "peak": max(0, peak),
            "bytes": (_sent() - start_bytes) / steps / ranks,
        }
        Path(folder, "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _sent() -> int:
    """Bytes that the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    sys.exit("/proc/net/dev has no loopback device")


if __name__ == "__main__":
    main()
