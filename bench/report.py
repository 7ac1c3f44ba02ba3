"""Tables of the results that `compare.py` stores: on the terminal, and as Markdown between two markers.

A file that has the lines `<!-- bench:begin -->` and `<!-- bench:end -->` gets what is between them anew: the
repository's README the summary, `bench/results/README.md` everything.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contenders import COMPILED, EAGER, OURS
from family import FAMILY

from hdc import atomic

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RESULTS = Path(__file__).parent / "results"
ERRORS = ("loss_error", "gradient_error")
Result = dict[str, Any]
Rows = list[list[str]]


def show(result: Result) -> None:
    """Every table on the terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # on a machine that only measures
        print(markdown(result, whole=True))
        return
    console = Console(width=None if Console().is_terminal else 160)
    for name, head, rows in _tables(result):
        table = Table(*head)
        for row in rows:
            table.add_row(*row, style="bold green" if row[0] == OURS else "")
        console.print(f"\n[bold]{name}[/bold]", table, sep="\n")


def refresh(results: Sequence[Result], files: Sequence[Path] | None = None) -> list[Path]:
    """Rewrite what is between the markers; returns the files that have them."""
    written = []
    for path in files or (RESULTS.parent.parent / "README.md", RESULTS / "README.md"):
        text = path.read_text()
        if BEGIN not in text:
            continue
        before, _, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{path} has {BEGIN} but no {END} after it")
        whole = path.parent == RESULTS
        body = "\n".join(markdown(result, whole=whole) for result in results)
        atomic.write_text(path, f"{before}{BEGIN}\n{body}{END}{after}")
        written.append(path)
    return written


def markdown(result: Result, *, whole: bool) -> str:
    """The summary, or with `whole` every table."""
    lines = [describe(result), ""]
    tables = list(_tables(result)) if whole else [("", *_summary(result)), *_family(result)]
    for title, head, rows in tables:
        lines += [f"**{title}**", ""] if title else []
        lines += ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
        lines += [""]
    return "\n".join(lines) + "\n"


def describe(result: Result) -> str:
    """One sentence on where and when."""
    machine, settings = result["machine"], result["settings"]
    threads = sorted({run["threads"] for run in result["runs"]})
    chip = machine["gpu"]
    if settings["device"] == "cpu":
        chip = f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}"
        chip += f", threads: {' and '.join(map(str, threads))}"
    return (
        f"{chip}; torch {machine['torch']}, {settings['dtype']}, D = {settings['width']}, "
        f"τ = {settings['temperature']}; {machine['date']}, commit {machine['commit']}."
    )


def _summary(result: Result) -> tuple[list[str], Rows]:
    """Ours beside plain PyTorch, on all threads."""
    most = max(run["threads"] for run in result["runs"])
    runs = {run["allocator"]: run for run in result["runs"] if run["threads"] == most}
    peaks = {(c["problem"], c["batch"]): c["contenders"] for c in result["memory"]}
    head = [
        "forward + backward",
        "eager",
        "compiled",
        "ours",
        "× eager",
        "× compiled",
        "of the ceiling",
    ]
    head += ["peak memory: eager", "compiled", "ours"]
    rows = []
    for case in runs["default"]["cases"]:
        if case["problem"] == "overhead" or case["problem"] in FAMILY:
            continue
        names = (EAGER, COMPILED, OURS)
        row = [title(case), *(_cell(case, name, "step") for name in names)]
        for name in (EAGER, COMPILED):
            twins = [same(run, case) for run in runs.values()]
            ratios = [ratio(twin, name) for twin in twins if twin]
            row.append(" / ".join(f"{r:.1f}" for r in ratios if r) or "–")
        row.append(f"{share:.0%}" if (share := ceiling_share(case)) else "–")
        peak = peaks.get((case["problem"], case["batch"]), {})
        row += [
            amount(peak[n]["peak_bytes"]) if "peak_bytes" in peak.get(n, {}) else "–" for n in names
        ]
        rows.append(row)
    return head, rows


def _tables(result: Result) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, head and rows of each."""
    most = max(run["threads"] for run in result["runs"])
    head, rows = _summary(result)
    heading = f"Ours beside plain PyTorch, threads: {most}"
    if len(result["runs"]) > 1:
        heading += "; ratios with the default allocator / with a raised mmap threshold"
    yield heading, head, rows
    yield from _family(result)
    for run in result["runs"]:
        where = f"threads: {run['threads']}, allocator: {run['allocator']}"
        for problem in dict.fromkeys(case["problem"] for case in run["cases"]):
            if problem in FAMILY:
                continue
            cases = [case for case in run["cases"] if case["problem"] == problem]
            yield _every_contender(problem, cases, where)
            yield _parts(problem, cases, where)
    yield _memory(result)
    yield _accuracy(result)


def _family(result: Result) -> Iterator[tuple[str, list[str], Rows]]:
    """Each of the other losses beside its peer: time at some sizes, and memory."""
    timed = [case for run in result["runs"] for case in run["cases"] if case["problem"] in FAMILY]
    if not timed:
        return
    weighed = [case for case in result["memory"] if case["problem"] in FAMILY]
    times, peaks = ({(c["problem"], c["batch"]): c for c in side} for side in (timed, weighed))
    head = ["loss", "peer"]
    for batch in dict.fromkeys(case["batch"] for case in timed):
        head += [f"B = {batch:,}: peer", "ours", "× peer"]
    for batch in dict.fromkeys(case["batch"] for case in weighed):
        head += [f"peak memory, B = {batch:,}: peer", "ours"]
    rows = []
    for problem in dict.fromkeys(case["problem"] for case in timed):
        peer = next(contender for contender in FAMILY[problem] if contender.name != OURS)
        row = [problem, f"{peer.name}, {peer.note}"]
        for (named, _), case in times.items():
            if named == problem:
                row += [_brief(_cell(case, name, "step")) for name in (peer.name, OURS)]
                row.append(f"{other:.1f}" if (other := ratio(case, peer.name)) else "–")
        for (named, _), case in peaks.items():
            if named == problem:
                row += [_brief(_peak(case["contenders"].get(name))) for name in (peer.name, OURS)]
        rows.append(row)
    most, when = max(run["threads"] for run in result["runs"]), result["family"]
    where = f"threads: {most}; {when['date']}, commit {when['commit']}"
    yield f"The other losses, forward + backward, {where}", head, rows


def _brief(cell: str) -> str:
    """Without the reason why there is no figure, which is in the JSON file, but for what it would have taken."""
    status, _, why = cell.partition(": ")
    return why.partition(",")[0] if status == "skipped" else status


def _every_contender(
    problem: str, cases: list[dict[str, Any]], where: str
) -> tuple[str, list[str], Rows]:
    head = [problem, *(f"B = {case['batch']:,}" for case in cases)]
    rows = []
    for name in cases[0]["contenders"]:
        row = [name]
        for case in cases:
            cell = _cell(case, name, "step")
            other = ratio(case, name)
            row.append(f"{cell} ({other:.2f}×)" if other and name != OURS else cell)
        rows.append(row)
    for what in cases[0]["ceilings"]:
        row = [f"ceiling: {what}"]
        row += [_rate(case["ceilings"][what]["median"]) for case in cases]
        rows.append(row)
    return f"Forward + backward ({where}); in brackets: times ours", head, rows


def _parts(problem: str, cases: list[dict[str, Any]], where: str) -> tuple[str, list[str], Rows]:
    graphs = any("graph" in found for case in cases for found in case["contenders"].values())
    parts = ["evaluate", "forward", "backward", *(["graph"] if graphs else [])]
    head = [problem, *(f"B = {case['batch']:,}" for case in cases)]
    rows = [
        [name, *(" · ".join(_cell(case, name, part) for part in parts) for case in cases)]
        for name in cases[0]["contenders"]
        if any(case["contenders"][name]["status"] == "measured" for case in cases)
    ]
    legend = "without gradients · forward · backward" + (
        " · step in a CUDA graph" if graphs else ""
    )
    return f"Its parts ({where}): {legend}", head, rows


def _memory(result: Result) -> tuple[str, list[str], Rows]:
    apart = ("overhead", *FAMILY)
    cases = [case for case in result["memory"] if case["problem"] not in apart]
    head = ["", *dict.fromkeys(title(case) for case in cases)]
    names = dict.fromkeys(name for case in cases for name in case["contenders"])
    rows = []
    for name in names:
        row = [name]
        for case in cases:
            row.append(_peak(case["contenders"].get(name)))
        rows.append(row)
    heading = "Peak memory that forward + backward adds"
    if result["settings"]["device"] == "cpu":
        heading += "; for what compiles a lower bound: it may use again what its warm-up left"
    return heading, head, rows


def _accuracy(result: Result) -> tuple[str, list[str], Rows]:
    errors: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in result["accuracy"]:
        key = (row["dtype"], row["data"], str(row["temperature"]))
        errors.setdefault(key, {})[row["implementation"]] = row
    rows = [
        [*key, *(_error(found[name][what]) for what in ERRORS for name in (EAGER, OURS))]
        for key, found in errors.items()
    ]
    head = ["dtype", "data", "τ", "loss: eager", "ours", "gradients: eager", "ours"]
    return f"Relative error against float64, B = {result['settings']['accuracy_batch']}", head, rows


def _peak(found: dict[str, Any] | None) -> str:
    if found and "peak_bytes" in found:
        return amount(found["peak_bytes"])
    return _why_not(found) if found else ""


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def ratio(case: dict[str, Any], name: str) -> float | None:
    """How many times ours a contender takes: the median over rounds; None if it was not measured."""
    found = case["contenders"].get(name, {})
    return found["times_ours"]["median"] if "times_ours" in found else None


def ceiling_share(case: dict[str, Any]) -> float | None:
    """Useful floating-point operations of ours a second, over the most that the machine can do."""
    ceiling = next((value for what, value in case["ceilings"].items() if "flop/s" in what), None)
    found = case["contenders"][OURS]
    if ceiling is None or "step" not in found:
        return None
    return case["flops"] / found["step"]["median"] / ceiling["median"]


def same(run: dict[str, Any], case: dict[str, Any]) -> dict[str, Any] | None:
    """The same case in another run, which may have ended before it."""
    key = (case["problem"], case["batch"])
    return next(
        (other for other in run["cases"] if (other["problem"], other["batch"]) == key), None
    )


def title(case: dict[str, Any]) -> str:
    if case["problem"] == "HD-NCE":
        return f"HD-NCE, 17 × {case['batch']}"
    return f"{case['problem']}, B = {case['batch']:,}"


def _cell(case: dict[str, Any], name: str, what: str) -> str:
    found = case["contenders"].get(name)
    if found is None:
        return "–"
    if what not in found:
        return _why_not(found)
    differs = "" if found.get("agrees", True) else " (differs!)"
    return time(found[what]["median"]) + differs


def _why_not(found: dict[str, Any]) -> str:
    if found["status"] == "measured":
        return "–"
    if found["status"] in ("missing", "left out"):
        return found["status"]
    return f"{found['status']}: {found['reason']}"


def time(seconds: float) -> str:
    """Three digits and a unit."""
    seconds = float(f"{seconds:.3g}")  # 999.6 ms are 1 s
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def amount(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def _rate(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
