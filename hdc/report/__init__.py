"""One HTML page about a run: curves, results, clips that play, configuration, what was left out.

The page is a single file that asks for nothing from outside. A folder of runs, such as the demo's, gets a
page about all of them. A section is there only where the runs have something for it.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hdc import atomic
from hdc.config import flat
from hdc.data.manifest import manifest_file, read_manifest
from hdc.data.prepare import BAD_FILES
from hdc.errors import InputError, reason
from hdc.report.confusion import draw_confusion
from hdc.report.curves import draw_curves
from hdc.report.html import Html, element, folded, joined, section, table
from hdc.report.page import page
from hdc.report.records import Record, read_records
from hdc.report.results import draw_results
from hdc.report.retrievals import draw_retrievals

FILE = "report.html"
LISTED = 200  # bad files; the rest is counted


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A page about a run.

    Attributes:
        data: the manifest (or its folder) that the retrieved clips come from; null takes the run's own.
        out: the file to write; null is report.html in RUN.
    """

    data: str | None = None
    out: str | None = None


def report(run: Path, config: ReportConfig) -> Path:
    """Write the page and return where it is.

    Raises:
        InputError: `run` is no run, a file in it is damaged, `data` cannot be read, `out` not be written.
    """
    records = read_records(run)
    data = manifest_file(config.data) if config.data else None
    if data:
        read_manifest(data)  # a mistake here should not become a note on the page
    parts = {
        "results": ("Results", draw_results(records)),
        "retrieval": ("Retrieval", draw_retrievals(records, data)),
        "confusion": ("Confusion", _confusions(records)),
        "training": ("Training", _training(records)),
        "configuration": ("Configuration", _configuration(records)),
        "left-out": ("Left out", _left_out(records, data)),
        "environment": ("Environment", [_environment(records)]),
    }
    there = {name: part for name, part in parts.items() if part[1]}
    links = [element("a", title, href=f"#{name}") for name, (title, _) in there.items()]
    name = run.resolve().name
    content = page(
        f"Report of {name}",
        _summary(records),
        element("nav", *links),
        *(section(name, title, *pieces) for name, (title, pieces) in there.items()),
    )
    target = Path(config.out) if config.out else run / FILE
    if target.is_dir():
        raise InputError(f"{target} is a folder; out must name a file")
    # A name on a disk may be no UTF-8, and what stands for its bytes cannot be written as such.
    atomic.write_bytes(target, content.encode(errors="backslashreplace"))
    return target


def _summary(records: Sequence[Record]) -> Html:
    """One sentence per run: what it is, how far it came, what it reached."""
    lines = []
    for record in records:
        words = [*_trained(record), *_reached(record)]
        if words:
            lines.append(element("p", element("b", record.name), ": ", ", ".join(words), "."))
    return joined(lines)


def _trained(record: Record) -> Iterator[str]:
    config = record.config
    if config:
        what = {"pretrain": "pretraining", "finetune": "finetuning"}[record.kind]
        yield f"{what} of {config.get('backbone')} on {config.get('data')}"
    if record.lines:
        last = record.lines[-1]
        yield f"{last['step'] + 1:,} steps, loss {last['loss']:.4g}"


def _reached(record: Record) -> Iterator[str]:
    if record.test:
        yield f"{100 * record.test['video_accuracy']:.1f} % of {record.test['videos']} test videos recognised"
    if record.recognition:
        share = record.recognition["mean"]["video_accuracy"]
        count = len(record.recognition["splits"])
        yield f"{100 * share:.1f} % of test videos recognised, the mean of {count} splits"
    if record.probe:
        yield f"linear probe right in {100 * record.probe['test_accuracy']:.1f} %"
    if record.retrieval:
        share = record.retrieval["accuracy"]["top1"]
        yield f"nearest neighbour right in {100 * share:.1f} % (by {record.retrieval['label']})"


def _confusions(records: Sequence[Record]) -> list[Html]:
    return [
        joined([element("h3", record.name), draw_confusion(record.test["predictions"])])
        for record in records
        if record.test and record.test["predictions"]
    ]


def _training(records: Sequence[Record]) -> list[Html]:
    return [
        joined([element("h3", record.name), draw_curves(record.lines)])
        for record in records
        if record.lines
    ]


def _configuration(records: Sequence[Record]) -> list[Html]:
    """A column per run, where runs differ; one column for what they share."""
    given = [record for record in records if record.config]
    if not given:
        return []
    values = [dict(flat(record.config)) for record in given]
    names = dict.fromkeys(name for found in values for name in found)
    rows = [(name, *(_plain(found.get(name, "")) for found in values)) for name in names]
    header = ["option", *(record.name for record in given)]
    if len(given) == 1:
        return [folded("Every option", table("", header, rows))]
    different = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    tables = (
        ("What differs between the runs", header, different),
        ("What they share", ["option", "value"], same),
    )
    return [folded(title, table("", head, part)) for title, head, part in tables if part]


def _plain(value: object) -> str:
    """As YAML would have it on one line."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _left_out(records: Sequence[Record], data: Path | None) -> list[Html]:
    """Videos that the runs skipped, and those that preparing the dataset found bad."""
    found = []
    skipped = [(e.path, e.reason, record.name) for record in records for e in record.unreadable]
    if skipped:
        found.append(_listing("Skipped by these runs", ["video", "reason", "run"], skipped))
    sources = [data] if data else []
    sources += [manifest_file(r.config["data"]) for r in records if "data" in r.config]
    for file in dict.fromkeys(source.resolve().parent / BAD_FILES for source in sources):
        if file.is_file():
            rows = _bad_files(file)
            if rows:
                found.append(
                    _listing(f"Bad files of the dataset ({file})", ["file", "reason"], rows)
                )
    return found


def _bad_files(file: Path) -> list[tuple[str, ...]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {reason(error)}") from error
    if rows and not {"path", "reason"} <= rows[0].keys():
        raise InputError(f"{file} was not written by hdc-train; it must have path, reason")
    return [(row["path"] or "", row["reason"] or "") for row in rows]


def _listing(title: str, header: list[str], rows: Sequence[tuple[str, ...]]) -> Html:
    more = f"; the first {LISTED} are listed" if len(rows) > LISTED else ""
    return folded(f"{title}: {len(rows):,}{more}", table("", header, rows[:LISTED]))


def _environment(records: Sequence[Record]) -> Html:
    """A column for every environment that something was computed in."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for record in records:
        for start in record.starts:
            since = f", from step {start['first_step']:,}" if start["first_step"] else ""
            _column(columns, start["environment"]).append(f"{record.name}: training{since}")
        for name, result in record.results().items():
            if "environment" in result:
                _column(columns, result["environment"]).append(f"{record.name}: {name}")
    made = element(
        "p", f"This page was made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", class_="soft"
    )
    if not columns:
        return joined([made, element("p", "These runs store no environment.", class_="soft")])
    found = [dict(column) for column in columns]
    names = dict.fromkeys(name for column in found for name in column)
    rows = [(name, *(column.get(name, "") for column in found)) for name in names]
    everything = len(found) == 1
    header = ["", *("all of it" if everything else ", ".join(of) for of in columns.values())]
    return joined([made, table("", header, rows)])


def _column(
    columns: dict[tuple[tuple[str, str], ...], list[str]], environment: dict[str, str]
) -> list[str]:
    return columns.setdefault(tuple(environment.items()), [])
