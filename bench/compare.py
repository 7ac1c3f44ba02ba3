"""Compares the fused losses with whatever else computes them: speed, memory and accuracy, in one JSON file.

    python bench/compare.py                       everything that this machine can measure
    python bench/compare.py --quick --sizes 64    a glance, in half a minute
    python bench/compare.py --family-into A.json  the other losses alone, into a stored result
    python bench/compare.py --refresh A.json ...  plots and tables out of stored results, measuring nothing

What is not installed is reported as missing. `bench/results/README.md` says what was measured where.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import accuracy
import contenders
import machine
import report
import roster
import torch
from contenders import Contender
from family import FAMILY

from hdc import atomic

HERE = Path(__file__).parent
CPU_SIZES = (128, 512, 2048, 8192, 32768)
GPU_SIZES = (*CPU_SIZES, 65536, 131072, 262144)
FAMILY_SIZES = (2048, 4096)  # of time; of memory the first, and
FAMILY_MEMORY_SIZE = 16384
PEERS = list(dict.fromkeys(c.name for p in ("InfoNCE", *FAMILY) for c in roster.of(p) if c.peer))
# Large blocks come from the heap and stay there: without, every matrix is new pages, cleared by the system.
THRESHOLDS = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")
RAISED = {"GLIBC_TUNABLES": ":".join(f"{threshold}={2**36}" for threshold in THRESHOLDS)}
# Blocks from 128 KiB on always go back to the system when they are freed: otherwise glibc begins to keep larger
# ones, and what it kept from a warm-up would not count.
PINNED = {"GLIBC_TUNABLES": f"{THRESHOLDS[0]}={2**17}"}
MEMORY_SHARE = 0.8  # of what is free now; more might push this machine into swapping
PROBE = 512  # a size to foresee larger ones from


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if given.refresh:
        import plots  # matplotlib, which a machine that measures may lack

        results = [json.loads(path.read_text()) for path in given.refresh]
        for written in [*plots.write(results), *report.refresh(results)]:
            print(written)
        return
    if given.family_into:
        out, result = given.family_into, json.loads(given.family_into.read_text())
        given.device, given.dtype = (result["settings"][what] for what in ("device", "dtype"))
    else:
        description = machine.describe()
        name = f"{given.device}-{description['date'][:10]}.json"
        out = given.out or HERE / "results" / name
        for result in measure(given, description):
            atomic.write_json(out, result)
    if given.family or given.family_into:
        measure_family(given, result)
        atomic.write_json(out, result)
    report.show(result)
    print(f"\nstored in {out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the fused losses with plain PyTorch and with peers."
    )
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="default: %(default)s")
    add("--dtype", choices=accuracy.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    threads = sorted({1, machine.cores()})
    add(
        "--threads",
        type=int,
        nargs="+",
        default=threads,
        help="on a CPU, a run for each of these; default: %(default)s",
    )
    sizes = f"batches; default: {' '.join(map(str, CPU_SIZES))}, on a GPU to {GPU_SIZES[-1]}"
    add("--sizes", type=int, nargs="+", help=sizes)
    add("--symmetric", action="store_true", help="the symmetric loss, too")
    sizes = (
        f"the other losses, too, each beside its peer; B = {' and '.join(map(str, FAMILY_SIZES))}"
    )
    add("--family", action="store_true", help=sizes)
    add("--family-into", type=Path, metavar="JSON", help="only these, anew in a stored result")
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=PEERS,
        help="other packages to take in; default: all",
    )
    add(
        "--seconds",
        type=float,
        default=10,
        help="spent on each contender in each case; default: %(default)s",
    )
    add(
        "--limit",
        type=float,
        default=60,
        help="seconds that a step of others may take; default: %(default)s",
    )
    add("--quick", action="store_true", help="leave out what compiles")
    add("--out", type=Path, help="default: bench/results/DEVICE-DATE.json")
    add("--refresh", type=Path, nargs="+", metavar="JSON", help="only plots and tables, of these")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not gpu:
        parser.error("--device cuda: PyTorch finds no GPU")
    given.dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    given.sizes = sorted(given.sizes or (CPU_SIZES if given.device == "cpu" else GPU_SIZES))
    if given.quick:
        given.seconds = min(given.seconds, 0.5)
    return given


def measure(given: argparse.Namespace, description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Memory first, which tells what will not fit; then accuracy; then time: the result again after each run of it."""
    cpu, spec = given.device == "cpu", _spec(given)
    memory: list[dict[str, Any]] = []
    if cpu:
        probed = [PROBE] if given.sizes[0] > PROBE else []
        cases = _cases(given, probed + given.sizes)
        memory = _child("memory", {**spec, "cases": cases}, PINNED)
        spec["barred"] = _barred(memory)
    result: dict[str, Any] = {
        "machine": description,
        "settings": {
            "device": given.device,
            "dtype": given.dtype,
            "width": contenders.WIDTH,
            "temperature": contenders.TAU,
            "accuracy_batch": accuracy.BATCH,
            "seconds": given.seconds,
            "limit": given.limit,
            "quick": given.quick,
        },
        "notes": {
            problem: {contender.name: contender.note for contender in roster.of(problem)}
            for problem in ("InfoNCE", "HD-NCE", "overhead")
        },
        "runs": [],
        "memory": memory,
        "accuracy": accuracy.run(given.device),
    }
    for threads in given.threads if cpu else [torch.get_num_threads()]:
        for allocator, environment in _allocators(given).items():
            cases = [_case(given, "overhead", 1), *_cases(given, given.sizes)]
            timed = {**spec, "threads": threads, "cases": cases}
            cases = _child("measure", timed, environment, f"{allocator}, threads: {threads}")
            result["runs"].append({"allocator": allocator, "threads": threads, "cases": cases})
            if not cpu:
                result["memory"] = cases  # measured on the way
            yield result


def measure_family(given: argparse.Namespace, result: dict[str, Any]) -> None:
    """Put the other losses into a result, instead of those that it has."""
    spec = _spec(given)
    memory: list[dict[str, Any]] = []
    if given.device == "cpu":
        cases = _family_cases(given, (FAMILY_SIZES[0], FAMILY_MEMORY_SIZE))
        memory = _child("memory", {**spec, "cases": cases}, PINNED)
        spec["barred"] = _barred(memory)
    cases = _child("measure", {**spec, "cases": _family_cases(given, FAMILY_SIZES)}, what="time")
    most = max(run["threads"] for run in result["runs"])
    run = next(r for r in result["runs"] if (r["allocator"], r["threads"]) == ("default", most))
    run["cases"] = _without_family(run["cases"]) + cases
    result["memory"] = _without_family(result["memory"]) + (memory or cases)
    for problem in FAMILY:
        result["notes"][problem] = {c.name: c.note for c in FAMILY[problem]}
    result["family"] = {what: machine.describe()[what] for what in ("date", "commit")}
    result["family"] |= {"seconds": given.seconds, "limit": given.limit}


def _without_family(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in cases if case["problem"] not in FAMILY]


def _spec(given: argparse.Namespace) -> dict[str, Any]:
    """What the scripts beside this one go by, but for their cases."""
    return {
        "limit": given.limit,
        "seconds": given.seconds,
        "memory": MEMORY_SHARE * machine.available_memory(given.device),
        "threads": max(given.threads),
        "barred": {},
    }


def _barred(memory: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Whom not to time, and why: who did not fit."""
    return {
        f"{case['problem']}/{case['batch']}/{name}": found["reason"]
        for case in memory
        for name, found in case["contenders"].items()
        if found["status"] in ("skipped", "failed")
    }


def _taking_part(given: argparse.Namespace, contender: Contender) -> bool:
    if given.quick and contender.compiles:
        return False
    return not contender.peer or contender.name in given.peers


def _cases(given: argparse.Namespace, sizes: Sequence[int]) -> list[dict[str, Any]]:
    wanted = [("HD-NCE", 128)]
    wanted += [("InfoNCE", size) for size in sizes]
    wanted += [("symmetric InfoNCE", size) for size in sizes if given.symmetric]
    return [_case(given, problem, batch) for problem, batch in wanted]


def _family_cases(given: argparse.Namespace, sizes: Sequence[int]) -> list[dict[str, Any]]:
    return [_case(given, problem, batch) for problem in FAMILY for batch in sizes]


def _case(given: argparse.Namespace, problem: str, batch: int) -> dict[str, Any]:
    return {
        "problem": problem,
        "batch": batch,
        "device": given.device,
        "dtype": given.dtype,
        "names": [c.name for c in roster.of(problem) if _taking_part(given, c)],
    }


def _allocators(given: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Name and environment of each setting to measure under."""
    default: dict[str, dict[str, str]] = {"default": {}}
    if given.device == "cuda" or given.quick or platform.libc_ver()[0] != "glibc":
        return default
    return {**default, "raised mmap threshold": RAISED}


def _child(
    script: str,
    spec: dict[str, Any],
    environment: dict[str, str] | None = None,
    what: str = "peak memory",
) -> list[dict[str, Any]]:
    """Run one of the scripts beside this one in a fresh process."""
    print(what, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        specification, target = Path(folder, "specification.json"), Path(folder, "result.json")
        atomic.write_json(specification, spec)
        done = subprocess.run(
            [sys.executable, str(HERE / f"{script}.py"), str(specification), str(target)],
            env={**os.environ, **(environment or {})},
        )
        if done.returncode and not target.exists():
            sys.exit(f"bench/{script}.py ended with code {done.returncode} before its first result")
        results = json.loads(target.read_text())
        if done.returncode:
            left = len(spec["cases"]) - len(results)
            print(f"ended with code {done.returncode}: {left} cases are missing", file=sys.stderr)
        return results


if __name__ == "__main__":
    main()
