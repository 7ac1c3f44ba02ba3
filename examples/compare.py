"""What the examples share: their options, what a training costs, a fresh process for each loss, and the table."""

import argparse
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """What one training comes to: a row of the table."""

    function: str  # whose loss
    loss: float  # of the last step
    accuracy: dict[str, float]  # shares between 0 and 1, by the column's heading
    cost: "Cost"


@dataclass
class Cost:
    """What `measured` fills in."""

    seconds: float = math.nan
    peak: float = math.nan  # MiB


def parser(
    description: str | None, *, batch: int, most: int, steps: int
) -> argparse.ArgumentParser:
    """The options of all examples, with a script's defaults; `most`: samples there are, so the largest batch."""

    def size(given: str) -> int:
        if not 2 <= int(given) <= most:
            raise argparse.ArgumentTypeError(f"it is {given}; it must be from 2 to {most}")
        return int(given)

    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--batch", type=size, default=batch, help="default: %(default)s")
    made.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    made.add_argument("--loss", choices=("ours", "peer", "both"), default="both")
    return made


def compare(
    train: Callable[[str, argparse.Namespace], Row], options: argparse.Namespace, *notes: str
) -> None:
    """Train with each loss that `options.loss` asks for, and print the table.

    `train("ours", options)` and `train("peer", options)` run in new processes, one after the other: nothing
    that the first left in memory can be the second's. A forked process has its imports already.
    """
    # On systems that cannot fork, `train` must be importable, as the functions of a script are.
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    rows = []
    for which in ("ours", "peer") if options.loss == "both" else (options.loss,):
        with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as fresh:
            rows.append(fresh.submit(train, which, options).result())
    print(f"{options.steps} steps, batch of {options.batch:,}, {torch.get_num_threads()} threads")
    print(table(rows))
    print("Loss: of the last step. Memory: what the training added to the peak of its process.")
    for note in notes:
        print(note)


@contextmanager
def measured() -> Iterator[Cost]:
    """Times what is inside, and takes the growth of the peak resident memory (VmHWM) over the state before."""
    cost = Cost()
    linux = Path("/proc/self/clear_refs").exists()
    if linux:  # elsewhere, the memory stays unknown
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _peak()
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    if linux:
        cost.peak = _peak() - before


def _peak() -> float:
    """MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status"
    return int(found[1]) / 1024


def table(rows: list[Row]) -> str:
    """The rows below their headings, aligned."""
    lines = [["loss function", "loss", *rows[0].accuracy, "seconds", "memory, MiB"]]
    for row in rows:
        shares = [f"{share:.1%}" for share in row.accuracy.values()]
        cost = [f"{row.cost.seconds:.2f}", f"{row.cost.peak:.0f}"]
        lines.append([row.function, f"{row.loss:.5f}", *shares, *cost])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines
    )


def top_1(query: Tensor, key: Tensor) -> float:
    """For how many queries, [N, D], the key of the same row is the nearest of all, by cosine."""
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    hits = (query @ key.T).argmax(1) == torch.arange(len(query))
    return hits.float().mean().item()
