"""The tables of results: what the commands wrote, and the last line of each log."""

from collections.abc import Sequence
from typing import Any

from hdc.config import flat
from hdc.paper import DATASETS
from hdc.report.html import Html, element, number, percent, points, table
from hdc.report.records import Record
from hdc.report.shapes import NUMBER

RANDOM = "random weights"


def draw_results(records: Sequence[Record]) -> list[Html]:
    """One table for each kind of result that there is."""
    paper = [_reproduced(table) for record in records for table in record.paper]
    demos = [_demo(record.demo["models"]) for record in records if record.demo]
    kinds = (
        (_recognized, [record for record in records if record.recognition]),
        (_tested, [record for record in records if record.test]),
        (_retrieved, [record for record in records if record.retrieval]),
        (_probed, [record for record in records if record.probe]),
        (_voted, [record for record in records if record.knn]),
        (_logged, [record for record in records if record.lines]),
    )
    tables = paper + demos + [draw(members) for draw, members in kinds if members]
    return [element("div", *tables, class_="tables")] if tables else []


def _reproduced(found: dict[str, Any]) -> Html:
    """A table of the paper beside its figures here; a figure that one of them lacks is a dash."""
    rows = [
        (
            line["title"],
            DATASETS[line["dataset"]],
            number(line["k"]),
            *("–" if line[of] is None else percent(line[of] / 100) for of in ("paper", "here")),
            "–" if line["gap"] is None else points(line["gap"]),
        )
        for line in found["percent"]
    ]
    *word, place = found["table"]  # "table1", "section4"
    title = f"{''.join(word).capitalize()} {place} of the paper: {found['summary']}"
    return table(title, ["row", "dataset", "top-k", "paper %", "here %", "gap"], rows)


def _demo(models: dict[str, dict[str, Any]]) -> Html:
    """The demo's own table: percentages, a column for each model."""
    values = {name: dict(flat(model)) for name, model in models.items()}
    measures = dict.fromkeys(key for found in values.values() for key in found)
    rows = [
        (
            measure.replace(".", ", ").replace("_", " "),
            *(
                percent(found[measure] / 100) if measure in found else ""
                for found in values.values()
            ),
        )
        for measure in measures
    ]
    return table("Top-1 accuracy on the test videos, %", ["", *values], rows)


def _tested(records: Sequence[Record]) -> Html:
    rows = [
        [
            record.name,
            percent(record.test["video_accuracy"]),
            percent(record.test["clip_accuracy"]),
            number(record.test["videos"]),
            number(record.test["clips"]),
            number(record.test["split"]),
            record.test.get("checkpoint") or "",
        ]
        for record in records
    ]
    header = ["run", "videos %", "clips %", "videos", "clips", "split", "checkpoint"]
    return table("Action recognition on the test list, top-1", header, rows)


def _recognized(records: Sequence[Record]) -> Html:
    rows = []
    for record in records:
        found = record.recognition
        every = [(f"split {name}", result) for name, result in found["splits"].items()]
        rows += [
            [
                record.name,
                name,
                percent(result["video_accuracy"]),
                percent(result["clip_accuracy"]),
                found.get("checkpoint") or RANDOM,
            ]
            for name, result in [*every, ("mean", found["mean"])]
        ]
    header = ["run", "", "videos %", "clips %", "from"]
    return table("Action recognition over the splits, top-1", header, rows)


def _retrieved(records: Sequence[Record]) -> Html:
    ranks = dict.fromkeys(rank for record in records for rank in record.retrieval["accuracy"])
    rows = []
    for record in records:
        found = record.retrieval
        shares = [percent(found["accuracy"][k]) if k in found["accuracy"] else "" for k in ranks]
        source = found.get("checkpoint") or RANDOM
        sizes = (number(found["queries"]), number(found["gallery"]))
        rows.append([record.name, found["label"], *shares, *sizes, source])
    header = ["run", "label", *(f"{k} %" for k in ranks), "queries", "gallery", "checkpoint"]
    return table("Nearest-neighbour retrieval: a hit among the k nearest", header, rows)


def _probed(records: Sequence[Record]) -> Html:
    rows = [
        [
            record.name,
            record.probe["label"],
            percent(record.probe["test_accuracy"]),
            percent(record.probe["train_accuracy"]),
            record.probe.get("checkpoint") or RANDOM,
        ]
        for record in records
    ]
    header = ["run", "label", "test %", "training %", "checkpoint"]
    return table("Linear probe on frozen features, top-1", header, rows)


def _voted(records: Sequence[Record]) -> Html:
    rows = [
        [
            record.name,
            record.knn["label"],
            number(record.knn["neighbors"]),
            percent(record.knn["weighted"]),
            percent(record.knn["majority"]),
            record.knn.get("checkpoint") or RANDOM,
        ]
        for record in records
    ]
    header = ["run", "label", "k", "weighted %", "majority %", "checkpoint"]
    return table("Vote of the k nearest neighbours on frozen features, top-1", header, rows)


def _logged(records: Sequence[Record]) -> Html:
    """A column per run."""
    last = [record.lines[-1] for record in records]
    names = dict.fromkeys(name for line in last for name in line)
    rows = [
        (
            name.replace("_", " "),
            *(number(line[name]) if NUMBER.holds(line.get(name)) else "" for line in last),
        )
        for name in names
    ]
    return table("The last line of each log", ["", *(record.name for record in records)], rows)
