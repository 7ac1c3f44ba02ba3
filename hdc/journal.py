"""The log of a run: one JSON object per line, and the same numbers for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hdc import atomic

FILE = "metrics.jsonl"


class Journal:
    """Appends to `folder/metrics.jsonl`. A resumed run drops the lines from `first_step` on, and writes them anew."""

    def __init__(self, folder: Path, first_step: int) -> None:
        path = folder / FILE
        kept = [line for line in read(path) if line["step"] < first_step]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, **values: Any) -> None:
        """One line; numbers go to TensorBoard as well, under their names."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


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
