"""The log of a run: what a resumed run keeps, and what a killed one leaves."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdc.journal import Journal, read


@pytest.fixture
def written(tmp_path: Path) -> Path:
    journal = Journal(tmp_path, 0)
    for step in range(5):
        journal.write(step, loss=1.0 / (step + 1), note="größe")
    journal.close()
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read(folder / "metrics.jsonl")]


def test_lines(written: Path) -> None:
    lines = [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 1, "loss": 0.5, "note": "größe"}
    assert read(written / "metrics.jsonl") == lines


def test_lines_are_there_before_the_run_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.write(0, loss=1.0)
    assert steps(tmp_path) == [0]
    journal.close()


def test_numbers_reach_tensorboard(written: Path) -> None:
    board = EventAccumulator(str(written / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    values = [(event.step, event.value) for event in board.Scalars("loss")]
    assert values == [(step, pytest.approx(1 / (step + 1))) for step in range(5)]


def test_resume_drops_later_lines(written: Path) -> None:
    """Steps 3 and 4 were after the checkpoint: they run, and are logged, again."""
    journal = Journal(written, 3)
    assert steps(written) == [0, 1, 2]
    journal.write(3, loss=9.0)
    journal.close()
    assert steps(written) == [0, 1, 2, 3]
    assert read(written / "metrics.jsonl")[3]["loss"] == 9.0
    board = EventAccumulator(str(written / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [0, 1, 2, 3]


def cut_short(text: str) -> str:
    return text[:-12]


def cut_between(text: str) -> str:
    return text + '{"st'


@pytest.mark.parametrize(("cut", "left"), [(cut_short, 4), (cut_between, 5)])
def test_last_line_cut_short(cut: Callable[[str], str], left: int, written: Path) -> None:
    path = written / "metrics.jsonl"
    path.write_text(cut(path.read_text()))
    assert steps(written) == list(range(left))
    journal = Journal(written, 5)
    journal.write(5, loss=1.0)
    journal.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        *range(left),
        5,
    ]


def test_no_journal_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.jsonl") == []
    Journal(tmp_path / "new run", 10).close()
    assert read(tmp_path / "new run" / "metrics.jsonl") == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from hdc.errors import InputError
from hdc.journal import Journal

journal = Journal(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    for step in range(200):
        journal.write(step, **{sys.argv[2]: 1 if sys.argv[2] == "a" else "text"})
except InputError as error:
    print(error)
journal.close()
"""


@pytest.mark.parametrize(
    ("value", "file"),
    [("name" * 20, "metrics.jsonl"), ("a", "tensorboard/events.out.tfevents.*")],
)
def test_full_disk_is_one_line(value: str, file: str, tmp_path: Path) -> None:
    """Of the two files one is full first; nothing else is said, not even as the process ends."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (path,) = tmp_path.glob(file)
    assert (done.stdout, done.stderr) == (f"cannot write {path}: file too large\n", "")
    assert path.stat().st_size == 2000
    assert steps(tmp_path) == list(range(len(steps(tmp_path))))
    assert len(steps(tmp_path)) > 10
