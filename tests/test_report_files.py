"""Files of a run that are not what hdc-train writes: a page all the same, or one line that names the file."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hdc.cli import main
from hdc.errors import InputError
from hdc.report import ReportConfig, report

ENVIRONMENT = {"torch": "2.13", "device": "cpu"}
ORIGIN = {
    "data": "nowhere.csv",
    "checkpoint": None,
    "label": "label",
    "split": 1,
    "unreadable": [{"path": "a.avi", "reason": "holds no frames"}],
    "environment": ENVIRONMENT,
}
SHARES = {"video_accuracy": 0.5, "clip_accuracy": 0.25}
LINE = {"title": "HDC", "dataset": "ucf101", "k": 1, "paper": 30.0, "here": 29.0, "gap": -1.0}
# What the commands write, each list with an entry or two.
FILES: dict[str, Any] = {
    "metrics.jsonl": [
        {"step": 0, "loss": 2.5, "lr": 0.1, "spatial3_loss": 1.0, "spatial3_accuracy": 0.5},
        {"step": 1, "skipped": "a.avi", "reason": "holds no frames"},
        {"step": 2, "loss": 2.0, "lr": 0.1, "spatial3_loss": 0.5, "spatial3_accuracy": 1.0},
    ],
    "config.yaml": {"data": "nowhere.csv", "seed": 0, "clips": {"size": 32}},
    "environment.json": {"starts": [{"first_step": 0, "environment": ENVIRONMENT}]},
    "results.json": {
        "models": {
            "HDC": {"nearest": {"motion": 99.0}, "probe": {"motion": 98.0}, "finetuned_clip": 97.0}
        }
    },
    "table4.json": {
        "table": "table4",
        "summary": "retrieval on UCF101",
        "percent": [LINE],
    },
    "test.json": {
        **ORIGIN,
        **SHARES,
        "videos": 2,
        "clips": 4,
        "predictions": [{"path": "a.avi", "class": "Up", "predicted": "Down"}],
    },
    "recognition.json": {**ORIGIN, "splits": {"1": SHARES, "2": SHARES}, "mean": SHARES},
    "probe.json": {**ORIGIN, "test_accuracy": 0.5, "train_accuracy": 1.0},
    "knn.json": {**ORIGIN, "weighted": 0.5, "majority": 0.25, "neighbors": 20},
    "retrieval.json": {
        **ORIGIN,
        "accuracy": {"top1": 0.5, "top5": 1.0},
        "queries": 1,
        "gallery": 2,
        "nearest": [{"query": "a.avi", "start": 0, "neighbor": "b.avi", "neighbor_start": 16}],
    },
}
ODD = (None, True, "", "odd", -1, 0.5, 1e308, 10**400, float("nan"), [], [3], {}, {"odd": 3})


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        if name == "config.yaml":
            text = yaml.safe_dump(content)
        elif name == "metrics.jsonl" and isinstance(content, list):
            text = "".join(json.dumps(line) + "\n" for line in content)
        else:
            text = json.dumps(content)
        (folder / name).write_text(text)


def altered(content: Any) -> Iterator[Any]:
    """`content` with one value in it, at any depth, taken out or replaced."""
    yield from ODD
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(inner) if isinstance(content, dict | list) else []:
        shorter = copy.copy(content)
        del shorter[key]
        yield shorter
        for other in altered(value) if isinstance(value, dict | list) else ODD:
            changed = copy.copy(content)
            changed[key] = other
            yield changed


@pytest.mark.parametrize("name", FILES)
def test_every_value_may_be_odd(name: str, tmp_path: Path) -> None:
    write(tmp_path, FILES)
    page = report(tmp_path, ReportConfig()).read_text()
    for section in ("results", "retrieval", "confusion", "training", "left-out", "environment"):
        assert f'<section id="{section}">' in page
    drawn = refused = 0
    for content in altered(FILES[name]):
        write(tmp_path, {name: content})
        try:
            report(tmp_path, ReportConfig())
        except InputError as fault:
            refused += str(tmp_path / name) in str(fault)
        else:
            drawn += 1
    assert drawn > 0
    assert refused > 0
    assert drawn + refused == len(list(altered(FILES[name])))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", [{"step": 0}, {"loss": 1.0}], ", line 2: step is missing"),
        ("metrics.jsonl", [{"step": 0, "loss": "x"}], ", line 1: loss is 'x'; it must be a number"),
        ("metrics.jsonl", [3], ", line 1: this is 3; it must be an object"),
        ("results.json", {"models": []}, ": models is []; it must be an object"),
        ("results.json", {"models": {"HDC": {"nearest": {}}}}, ": models.HDC.probe is missing"),
        (
            "test.json",
            {**FILES["test.json"], "predictions": [{"class": "Up"}]},
            ": predictions[0].predicted is missing",
        ),
        (
            "table4.json",
            {**FILES["table4.json"], "table": "table9"},
            ": table is 'table9'; it must be one of table1, ",
        ),
        (
            "table4.json",
            {**FILES["table4.json"], "percent": [{**LINE, "gap": "x"}]},
            ": percent[0].gap is 'x'; it must be a number or null",
        ),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    name: str, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {name: content})
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hdc-train: {tmp_path / name}{message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_empty_tables_are_drawn(tmp_path: Path) -> None:
    """A demo without models and a table without lines: their captions, and nothing below."""
    write(
        tmp_path,
        {"results.json": {"models": {}}, "table4.json": {**FILES["table4.json"], "percent": []}},
    )
    page = report(tmp_path, ReportConfig()).read_text()
    assert page.count("<tbody></tbody>") == 2
