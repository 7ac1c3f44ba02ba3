"""The log of a run: one JSON object per line, and the same numbers for TensorBoard."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from hdc import atomic
from hdc.errors import unwritable

FILE = "metrics.jsonl"


class Journal:
    """Appends to `folder/metrics.jsonl`. A resumed run drops the lines from `first_step` on, and writes them anew.

    Raises:
        InputError: a file cannot be written, when the journal is made or later.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        path = folder / FILE
        kept = [line for line in read(path) if line["step"] < first_step]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = _Growing(path)
        # TensorBoard reads the files of a folder in the order of their names. Its own writers append from a
        # thread, which prints a traceback where the disk is full.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._events = _Growing(folder / "tensorboard" / name)
        self._board = RecordWriter(self._events)
        self._add_event(first_step, file_version="brain.Event:2")
        self._add_event(
            first_step, session_log=SessionLog(status=SessionLog.START)
        )  # drops later ones

    def write(self, step: int, **values: Any) -> None:
        """One line; numbers go to TensorBoard as well, under their names."""
        self._lines.write((json.dumps({"step": step, **values}) + "\n").encode())
        numbers = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, (int, float))
        ]
        if numbers:
            self._add_event(step, summary=Summary(value=numbers))

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _add_event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._board.write(event.SerializeToString())


class _Growing:
    """A file that bytes are appended to; they are in it, or an InputError says why not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, content: bytes) -> None:
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing tries what is left once more; nothing else will
                self._file.close()
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise unwritable(self.path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
