"""Peak memory of every contender on a CPU, each in a process of its own: what a training step adds.

    python bench/memory.py SPECIFICATION RESULT      both are JSON files

What counts is the growth of the peak resident memory (VmHWM) over the state after imports, inputs and a
warm-up. The warm-up is of a tiny batch, so that nothing of the full size can be left over from it; what must
compile for its shape is warmed up at full size, and what it freed is given back to the system as far as the
allocator does so: its figure is a lower bound.

Large blocks go back to the system as soon as they are freed. By default glibc learns to keep those of up to 32 MiB, and
its peak then depends on where they came to lie: up to 80 MiB more, different from run to run.
"""

import ctypes
import json
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import contenders
import roster
import torch
from budget import Budget, Need
from contenders import Case, Contender
from measure import NOT_ASKED, reason, step, store

TINY = 16
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# Forked from a process that has imported PyTorch and done nothing else: as fresh as a new one, and at once.
PROCESSES = multiprocessing.get_context("fork")


def measure_apart(contender: Contender, case: Case, threads: int) -> dict[str, Any]:
    """`measure` in a new process, which may die of it."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_report, args=(sender, contender, case, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = {"status": "failed", "reason": "its process was killed"}
    process.join()
    return result


def _report(sender: Connection, contender: Contender, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
    try:
        sender.send(measure(contender, case))
    except Exception as error:  # a peer's failure is a result
        sender.send({"status": "failed", "reason": reason(error)})


def measure(contender: Contender, case: Case) -> dict[str, Any]:
    """Bytes at the peak and seconds of one step."""
    warm_up = case if contender.compiles else case._replace(batch=TINY)
    loss = contenders.prepare(contender, warm_up)
    if isinstance(loss, dict):
        return loss
    step(loss, warm_up.inputs())
    if warm_up != case:
        loss = contenders.prepare(contender, case)
        if isinstance(loss, dict):
            return loss
    inputs = case.inputs()
    before = _settle()
    start = time.perf_counter()
    step(loss, inputs)
    seconds = time.perf_counter() - start
    peak = max(0, _status("VmHWM") - before)
    return {"status": "measured", "peak_bytes": peak, "seconds": seconds}


def _settle() -> int:
    """Bytes in use once freed memory has gone back; the peak counts anew from here."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {what} in /proc/self/status"
    return int(found[1]) * 1024


def run(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All cases of a specification, in its order: small before large, so that the large can be foreseen."""
    budget = Budget(spec["limit"], spec["memory"])
    for given in spec["cases"]:
        case = Case(given["problem"], given["batch"], given["device"], given["dtype"])
        found: dict[str, Any] = {}
        for contender in roster.of(case.problem):
            name = contender.name
            if name not in given["names"]:
                found[name] = NOT_ASKED
                continue
            print(f"  {case.problem}, B = {case.batch:,}: {name}", file=sys.stderr, flush=True)
            objection = budget.objection(case.problem, name, case.batch)
            if objection:
                found[name] = {"status": "skipped", "reason": objection}
                continue
            found[name] = measure_apart(contender, case, spec["threads"])
            if found[name]["status"] == "measured":
                need = Need(case.batch, found[name]["seconds"], found[name]["peak_bytes"])
                budget.record(case.problem, name, need)
        yield {**case._asdict(), "contenders": found}


if __name__ == "__main__":
    specification, target = map(Path, sys.argv[1:])
    store(run(json.loads(specification.read_text())), target)
