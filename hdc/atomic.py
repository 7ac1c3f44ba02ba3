"""Files that are there whole or not at all, whatever kills the process while they are written."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from hdc.errors import InputError, reason, unwritable


def write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Fill a file beside `path`, flush it to the disk, then rename it over `path`.

    Raises:
        InputError: when the folder cannot be written to, or the disk is full; `path` is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # gone, unless something went wrong
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """`write` for content that is there already."""

    def fill(file: BinaryIO) -> None:
        file.write(content)

    write(path, fill)


def write_text(path: Path, text: str) -> None:
    """`write` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write` for plain values, one to a line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What `write_json` wrote, with at least the given keys; empty where there is no file.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise InputError(f"{path} was not written by hdc-train; it must have {', '.join(keys)}")
    return value


def check_folder(folder: Path) -> None:
    """Make `folder` and try to write in it: better now than when there is something to lose.

    Raises:
        InputError: when that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error
