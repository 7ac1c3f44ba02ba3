"""What run folders hold: the files that the commands write, read and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hdc import atomic, environment, journal, results
from hdc.data.clips import Unreadable
from hdc.errors import InputError
from hdc.paper import TABLES

CONFIG, DEMO = "config.yaml", "results.json"
# What must be in a command's result for a page to be made of it.
RESULTS = {
    results.TEST: ("video_accuracy", "clip_accuracy", "videos", "clips", "split", "predictions"),
    results.RECOGNITION: ("label", "splits", "mean"),
    results.PROBE: ("test_accuracy", "train_accuracy", "label", "split"),
    results.KNN: ("weighted", "majority", "neighbors", "label", "split"),
    results.RETRIEVAL: ("accuracy", "label", "split", "queries", "gallery", "nearest"),
}
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
        raise InputError(f"cannot read {run}: {(error.strerror or str(error)).lower()}") from error
    if not found:
        raise InputError(f"{run} is no run: neither it nor a folder in it has {', '.join(FILES)}")
    return [read_record(folder) for folder in found]


def read_record(folder: Path) -> Record:
    """What the folder itself holds.

    Raises:
        InputError: a file is not what hdc-train writes.
    """
    log = [line for line in _log(folder / journal.FILE) if isinstance(line, dict)]
    found = {name: atomic.read_json(folder / name, keys) for name, keys in RESULTS.items()}
    tables = [atomic.read_json(folder / name, ("table", "summary", "percent")) for name in PAPER]
    left_out = [
        *((line["skipped"], line.get("reason")) for line in log if "skipped" in line),
        *(
            (entry.get("path"), entry.get("reason"))
            for result in found.values()
            for entry in result.get("unreadable", [])
        ),
    ]
    return Record(
        name=folder.resolve().name,
        folder=folder,
        config=read_config(folder / CONFIG),
        lines=[line for line in log if "loss" in line],
        starts=environment.read(folder),
        paper=list(filter(None, tables)),
        demo=atomic.read_json(folder / DEMO, ("models",)),
        test=found[results.TEST],
        recognition=found[results.RECOGNITION],
        probe=found[results.PROBE],
        knn=found[results.KNN],
        retrieval=found[results.RETRIEVAL],
        unreadable=[Unreadable(str(p), str(reason)) for p, reason in dict(left_out).items()],
    )


def read_config(path: Path) -> dict[str, Any]:
    """A run's configuration; empty where there is none."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} was not written by hdc-train")
    return config


def _log(path: Path) -> list[dict[str, Any]]:
    try:
        return journal.read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
