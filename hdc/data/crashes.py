"""Which video a decoding process died of: PyTorch's loader says no more than that the process is gone."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info

from hdc.data.manifest import Manifest
from hdc.errors import InputError

# What PyTorch says of one that was killed, that ended itself, and that was found dead.
DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?"
    r"(killed by signal: [\w ]+|exited unexpectedly(?: with exit code \d+)?)"
)
NO_ROOM = "unable to allocate shared memory"
SECONDS_TO_DIE = 2.0

Item = TypeVar("Item")


def items(loader: Iterable[Item]) -> Iterator[Item]:
    """A loader's items; when its pipe breaks, PyTorch has a moment to say of which process's end.

    It says so from a signal handler, which raises wherever the program then is. That is to be in here: in the
    middle of handling the broken pipe, nobody would catch it.
    """
    try:
        yield from loader
    except (EOFError, OSError):
        time.sleep(SECONDS_TO_DIE)
        raise


class Readers:
    """Which row of a manifest each of a loader's processes reads, in memory that they all share."""

    def __init__(self, manifest: Manifest, workers: int) -> None:
        self.manifest = manifest
        self.at = torch.zeros((workers, 2), dtype=torch.int32).share_memory_()  # process, row

    @contextmanager
    def reading(self, row: int) -> Iterator[None]:
        """Within it this process, if it is one of the loader's, is at that row."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        at = self.at[worker.id]
        at[1], at[0] = row, os.getpid()
        try:
            yield
        finally:
            at[0] = 0

    @contextmanager
    def name_crashes(self) -> Iterator[None]:
        """Around the loop over `items` of the loader, as PyTorch raises wherever that happens to be.

        Raises:
            InputError: a decoding process died (it names the video that the process was at), or found no
                room in shared memory.
        """
        try:
            yield
        except RuntimeError as error:
            if NO_ROOM in str(error):
                raise InputError(
                    "/dev/shm is full, where decoding processes put their batches; lower --workers or "
                    "--batch_size, or make it larger (of a container: --shm-size)"
                ) from error
            # The cause, if there is one, knows the signal.
            found = DEAD.search(f"{error.__cause__} {error}")
            if not found:
                raise
            dead = [int(number) for number in found[1].split(",")]
            rows = {row for process, row in self.at.tolist() if process in dead}
            files = ", ".join(str(self.manifest.file(row)) for row in sorted(rows))
            where = f"while it read {files}" if files else "between two videos"
            cause = found[2].replace("killed by signal: ", "was killed by the signal ").strip()
            raise InputError(
                f"a decoding process {cause} {where}; if memory ran out, lower --workers"
                + (f", if not, take the video out of {self.manifest.source}" if files else "")
            ) from error
