"""What run folders hold: the files that the commands write, read and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hdc import atomic, environment, journal, results
from hdc.data.clips import Unreadable
from hdc.errors import InputError, reason
from hdc.paper import DATASETS, TABLES
from hdc.report.shapes import COUNT, NUMBER, TEXT, Fields, check, one_of, or_null, required

CONFIG, DEMO = "config.yaml", "results.json"

# What must be in a command's files for a page to be made of them.
_ORIGIN = {
    "data": TEXT,
    "checkpoint?": or_null(TEXT),
    "environment?": {...: TEXT},
    "unreadable?": [{"path": TEXT, "reason": TEXT}],
}
_SPLIT = {"label": TEXT, "split": COUNT, **_ORIGIN}
_SHARES = {"video_accuracy": NUMBER, "clip_accuracy": NUMBER}
_NEIGHBORS = {"query": TEXT, "start": COUNT, "neighbor": TEXT, "neighbor_start": COUNT}
RESULTS: dict[str, Fields] = {
    results.TEST: {
        **_SPLIT,
        **_SHARES,
        "videos": COUNT,
        "clips": COUNT,
        "predictions": [{"class": TEXT, "predicted": TEXT}],
    },
    results.RECOGNITION: {**_ORIGIN, "label": TEXT, "splits": {...: _SHARES}, "mean": _SHARES},
    results.PROBE: {**_SPLIT, "test_accuracy": NUMBER, "train_accuracy": NUMBER},
    results.KNN: {**_SPLIT, "weighted": NUMBER, "majority": NUMBER, "neighbors": COUNT},
    results.RETRIEVAL: {
        **_SPLIT,
        "accuracy": {"top1": NUMBER, ...: NUMBER},
        "queries": COUNT,
        "gallery": COUNT,
        "nearest": [_NEIGHBORS],
    },
}
_FIGURES = {name: or_null(NUMBER) for name in ("paper", "here", "gap")}
_LINE = {"title": TEXT, "dataset": one_of(DATASETS), "k": COUNT, **_FIGURES}
_TABLE = {"table": one_of(TABLES), "summary": TEXT, "percent": [_LINE]}
_DEMO = {"models": {...: {"nearest": {...: NUMBER}, "probe": {...: NUMBER}, ...: NUMBER}}}
_STARTS = {"starts": [{"first_step": COUNT, "environment": {...: TEXT}}]}
_LOGGED = {"step": COUNT, "loss?": NUMBER, "skipped?": TEXT, "reason?": TEXT}

PAPER = tuple(f"{name}.json" for name in TABLES)  # of `hdc-train reproduce`
FILES = (journal.FILE, CONFIG, DEMO, *PAPER, *RESULTS)


@dataclass(frozen=True)
class Record:
    """What one folder holds; empty for what it does not.

    name: the folder's.
    lines: the log's lines of numbers, one per logged step.
    starts: what it was computed with, one entry per start in another environment.
    paper: tables of the paper, computed anew.
    demo, test, recognition, probe, knn, retrieval: the commands' summaries.
    unreadable: videos that training or evaluation left out, each once.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    paper: list[dict[str, Any]]
    demo: dict[str, Any]
    test: dict[str, Any]
    recognition: dict[str, Any]
    probe: dict[str, Any]
    knn: dict[str, Any]
    retrieval: dict[str, Any]
    unreadable: list[Unreadable]

    def results(self) -> dict[str, dict[str, Any]]:
        """The summaries of evaluations, by command."""
        found = {
            "test": self.test,
            "recognize": self.recognition,
            "probe": self.probe or self.knn,
            "retrieve": self.retrieval,
        }
        return {name: summary for name, summary in found.items() if summary}

    @property
    def kind(self) -> str:
        """Which training command wrote the configuration."""
        return "pretrain" if "objective" in self.config else "finetune"


def read_records(run: Path) -> list[Record]:
    """The folder itself, if it is a run, and the runs that lie in it.

    Raises:
        InputError: there is none, or a file is not what hdc-train writes.
    """
    if not run.is_dir():
        raise InputError(f"there is no folder {run}")
    try:
        folders = [run, *sorted(path for path in run.iterdir() if path.is_dir())]
        found = [folder for folder in folders if any((folder / name).exists() for name in FILES)]
    except OSError as error:
        raise InputError(f"cannot read {run}: {reason(error)}") from error
    if not found:
        raise InputError(f"{run} is no run: neither it nor a folder in it has {', '.join(FILES)}")
    return [read_record(folder) for folder in found]


def read_record(folder: Path) -> Record:
    """What the folder itself holds.

    Raises:
        InputError: a file is not what hdc-train writes.
    """
    log = _log(folder / journal.FILE)
    found = {name: read_result(folder / name, shape) for name, shape in RESULTS.items()}
    tables = [read_result(folder / name, _TABLE) for name in PAPER]
    left_out = [
        *((line["skipped"], line.get("reason", "")) for line in log if "skipped" in line),
        *(
            (entry["path"], entry["reason"])
            for result in found.values()
            for entry in result.get("unreadable", [])
        ),
    ]
    return Record(
        name=folder.resolve().name,
        folder=folder,
        config=read_config(folder / CONFIG),
        lines=[line for line in log if "loss" in line],
        starts=read_result(folder / environment.FILE, _STARTS).get("starts", []),
        paper=list(filter(None, tables)),
        demo=read_result(folder / DEMO, _DEMO),
        test=found[results.TEST],
        recognition=found[results.RECOGNITION],
        probe=found[results.PROBE],
        knn=found[results.KNN],
        retrieval=found[results.RETRIEVAL],
        unreadable=[Unreadable(path, why) for path, why in dict(left_out).items()],
    )


def read_config(path: Path) -> dict[str, Any]:
    """A run's configuration; empty where there is none."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no such date
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} was not written by hdc-train")
    check(config, {"data?": TEXT}, str(path))
    return config


def read_result(path: Path, shape: Fields) -> dict[str, Any]:
    """What a command wrote; empty where there is no file.

    Raises:
        InputError: it cannot be read, or is not of `shape`.
    """
    found = atomic.read_json(path, required(shape))
    if found:
        check(found, shape, str(path))
    return found


def _log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = journal.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        check(line, _LOGGED, f"{path}, line {number}")
    return lines
