"""Peak memory of one contender on a CPU, in a process of its own: what a forward and backward pass adds.

    python bench/memory.py PROBLEM BATCH DTYPE THREADS CONTENDER      prints one JSON object

What counts is the growth of the peak resident memory (VmHWM) over the state after imports, inputs and a
warm-up. The warm-up is of a tiny batch, so that nothing of the full size can be left over from it; what must
compile for its shape is warmed up at full size, and what it freed is given back to the system.
"""

import ctypes
import json
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import Case, Contender
from measure import _step

TINY = 16


def measure(contender: Contender, case: Case) -> dict[str, Any]:
    """Bytes at the peak and seconds of one step."""
    warm_up = case if contender.compiles else case._replace(batch=TINY)
    for ready in (warm_up, case):
        loss = contenders.prepare(contender, ready)
        if isinstance(loss, dict):
            return loss
        if ready is warm_up:
            _step(loss, ready.inputs())
    inputs = case.inputs()
    before = _settle()
    start = time.perf_counter()
    found = _step(loss, inputs)
    seconds = time.perf_counter() - start
    del found
    return {"status": "measured", "peak_bytes": max(0, _status("VmHWM") - before), "seconds": seconds}


def _settle() -> int:
    """Bytes in use once freed memory has gone back, where the peak starts to count anew."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    problem, batch, dtype, threads, name = sys.argv[1:]
    torch.set_num_threads(int(threads))
    chosen = next(c for c in contenders.of(problem) if c.name == name)
    print(json.dumps(measure(chosen, Case(problem, int(batch), "cpu", dtype))))
