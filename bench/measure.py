"""Times all contenders in one process, in turn: `compare.py` starts one for each number of threads and allocator.

    python bench/measure.py SPECIFICATION RESULT      both are JSON files

A sample of a contender is one call without gradients ("evaluate") and one training step, whose two halves
are timed as well ("forward", "backward", "step"). Rounds go through all contenders, each round beginning with
another, so that a change of clocks or of neighbours meets everybody, and ratios are taken within a round.
On a GPU, times are between events on the device, and whole steps are also replayed as a CUDA graph ("graph").
"""

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ceilings
import contenders
import roster
import torch
from budget import Budget, Need
from contenders import OURS, Case, Contender, Loss
from torch import Tensor

from hdc import atomic

MOST_ROUNDS = 100
FEWEST_ROUNDS = 3
SHORT = 0.05  # seconds: what takes less is called once before it is timed, and several times to foresee others
L2_BYTES = 2**26  # more than any GPU of today has by a little: an H100 has 50 MiB
GRAPH_STEPS = 8
# Relative differences from ours beyond which a contender computes something else, or worse.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}

NOT_ASKED = {"status": "left out", "reason": "not asked for"}


class Entry:
    """A contender in a case: ready to be timed, or the reason why not."""

    def __init__(self, contender: Contender, loss: Loss) -> None:
        self.contender, self.loss = contender, loss
        self.samples: dict[str, list[float]] = {}
        self.spent = 0.0
        self.result: dict[str, Any] = {"status": "measured"}

    def add(self, sample: dict[str, float]) -> None:
        for what, seconds in sample.items():
            self.samples.setdefault(what, []).append(seconds)


def measure_case(
    case: Case, names: Sequence[str], spec: dict[str, Any], budget: Budget
) -> dict[str, Any]:
    """Everything about one case, contender by contender."""
    results: dict[str, Any] = {}
    sets = _input_sets(case)
    everyone = {contender.name: contender for contender in roster.of(case.problem)}
    expected = step(everyone[OURS].build(case), sets[0])
    entries = []
    for contender in everyone.values():
        if contender.name not in names:
            results[contender.name] = NOT_ASKED
            continue
        entry = _begin(contender, case, sets[0], expected, spec, budget)
        if isinstance(entry, Entry):
            entries.append(entry)
            results[contender.name] = entry.result
        else:
            results[contender.name] = entry
    limits = ceilings.of(case.device, spec["threads"], case.flops)
    heights = _rounds(entries, sets, limits, spec["seconds"])
    ours = next((entry for entry in entries if entry.contender.name == OURS), None)
    for entry in entries:
        entry.result |= {what: summary(values) for what, values in entry.samples.items()}
        if ours:
            pairs = zip(entry.samples["step"], ours.samples["step"], strict=False)
            entry.result["times_ours"] = summary([theirs / own for theirs, own in pairs])
        if case.device == "cuda":
            entry.result |= _graph(entry.loss, sets)
    return {
        **case._asdict(),
        "width": case.width,
        "flops": case.flops,
        "contenders": results,
        "ceilings": {what: summary(values) for what, values in heights.items() if values},
    }


def _input_sets(case: Case) -> list[list[Tensor]]:
    """On a GPU, enough copies that the one used next has left the cache, unless they are tiny."""
    first = case.inputs()
    if case.device != "cuda":
        return [first]
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(case.inputs(seed) for seed in range(1, min(64, max(2, 2 * L2_BYTES // size))))]


def _begin(
    contender: Contender,
    case: Case,
    inputs: list[Tensor],
    expected: tuple[Tensor, ...],
    spec: dict[str, Any],
    budget: Budget,
) -> Entry | dict[str, Any]:
    """Build, warm up, and compare with ours."""
    name = contender.name
    barred = spec["barred"].get(f"{case.problem}/{case.batch}/{name}")
    barred = barred or budget.objection(case.problem, name, case.batch)
    if barred:
        return {"status": "skipped", "reason": barred}
    loss = contenders.prepare(contender, case)
    if isinstance(loss, dict):
        return loss
    print(f"  {case.problem}, B = {case.batch:,}: {name}", file=sys.stderr, flush=True)
    entry = Entry(contender, loss)
    try:
        step(loss, inputs)  # compilation, libraries' first calls
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found, seconds = _timed(loss, inputs, case.device)
        if case.device == "cuda":
            entry.result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        with torch.no_grad():
            loss(*inputs)
    except Exception as error:  # a peer's failure is a result, not ours to raise
        torch.cuda.empty_cache()
        return {"status": "failed", "reason": reason(error)}
    budget.record(case.problem, name, Need(case.batch, seconds, entry.result.get("peak_bytes", 0)))
    if case.problem != "overhead":  # where loss and gradients are 0
        entry.result |= _compare(found, expected, contender.rounds_to or case.dtype)
    return entry


def _timed(loss: Loss, inputs: list[Tensor], device: str) -> tuple[tuple[Tensor, ...], float]:
    """A step's results and its seconds. A short one's are the least of several: larger sizes are foreseen from it."""
    taken: list[float] = []
    while not taken or (sum(taken) < SHORT and len(taken) < 5):
        start = time.perf_counter()
        found = step(loss, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return found, min(taken)


def _compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: str) -> dict[str, Any]:
    """Relative differences of loss and gradients from ours, and whether they are rounding alone."""
    loss, *gradients = (t.double() for t in found)
    expected_loss, *expected_gradients = (t.double() for t in expected)
    loss_error = float((loss - expected_loss).abs() / expected_loss.abs())
    gradient_error = relative_error(gradients, expected_gradients)
    limit = TOLERANCE[dtype]
    return {
        "agrees": loss_error < limit and gradient_error < limit,
        "loss_difference": loss_error,
        "gradient_difference": gradient_error,
    }


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found − expected| / |expected|, norms over everything."""
    pairs = zip(found, expected, strict=True)
    distance = sum(float((a - b).norm()) ** 2 for a, b in pairs) ** 0.5
    return distance / sum(float(b.norm()) ** 2 for b in expected) ** 0.5


def step(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, _variables(inputs))


def _variables(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Those that have a gradient."""
    return [t for t in inputs if t.requires_grad]


def _rounds(
    entries: list[Entry],
    sets: list[list[Tensor]],
    limits: ceilings.Ceilings,
    seconds: float,
) -> dict[str, list[float]]:
    """Sample everybody in turn until each has had its `seconds`; returns the ceilings' samples."""
    heights: dict[str, list[float]] = {what: [] for what in limits}
    sample = _sample_gpu if sets[0][0].is_cuda else _sample_cpu
    for number in range(MOST_ROUNDS):
        due = [e for e in entries if number < FEWEST_ROUNDS or e.spent < seconds]
        if not due:
            break
        for what, measure in limits.items():
            heights[what].append(measure())
        first = number % len(due)
        for entry in due[first:] + due[:first]:
            start = time.perf_counter()
            # Or it would pay for what its predecessor left behind.
            if entry.spent < SHORT * (number + 1):
                step(entry.loss, sets[(number - 1) % len(sets)])
            entry.add(sample(entry.loss, sets[number % len(sets)]))
            entry.spent += time.perf_counter() - start
    return heights


def _sample_cpu(loss: Loss, inputs: list[Tensor]) -> dict[str, float]:
    clock, variables = time.perf_counter, _variables(inputs)
    begin = clock()
    with torch.no_grad():
        loss(*inputs)
    start = clock()
    value = loss(*inputs)
    middle = clock()
    torch.autograd.grad(value, variables)
    end = clock()
    return _parts(start - begin, middle - start, end - middle)


def _sample_gpu(loss: Loss, inputs: list[Tensor]) -> dict[str, float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    variables = _variables(inputs)
    torch.cuda.synchronize()
    events[0].record()
    with torch.no_grad():
        loss(*inputs)
    events[1].record()
    value = loss(*inputs)
    events[2].record()
    torch.autograd.grad(value, variables)
    events[3].record()
    events[3].synchronize()
    return _parts(*(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)))


def _parts(evaluate: float, forward: float, backward: float) -> dict[str, float]:
    return {
        "evaluate": evaluate,
        "forward": forward,
        "backward": backward,
        "step": forward + backward,
    }


def _graph(loss: Loss, sets: list[list[Tensor]]) -> dict[str, Any]:
    """Time of a step in a CUDA graph: what is left when the host has nothing to do."""
    graph = torch.cuda.CUDAGraph()
    used = sets[:GRAPH_STEPS]
    try:
        with torch.cuda.graph(graph):
            for inputs in used:
                step(loss, inputs)
    except Exception as error:  # synchronises, or allocates where it may not
        torch.cuda.synchronize()
        return {"graph_failed": reason(error)}
    samples = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / len(used))
    return {"graph": summary(samples)}


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {"median": float(median), "low": float(low), "high": float(high), "count": len(samples)}


def run(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All cases of a specification, in its order: small before large."""
    torch.set_num_threads(spec["threads"])
    budget = Budget(spec["limit"], spec["memory"])
    for given in spec["cases"]:
        case = Case(given["problem"], given["batch"], given["device"], given["dtype"])
        yield measure_case(case, given["names"], spec, budget)


def store(results: Iterable[dict[str, Any]], target: Path) -> None:
    """Write them after each: what is measured stays, whatever the next one does to the process."""
    kept = []
    for result in results:
        kept.append(result)
        atomic.write_json(target, kept)


if __name__ == "__main__":
    specification, target = map(Path, sys.argv[1:])
    store(run(json.loads(specification.read_text())), target)
