"""The one exception for what a user can mend: a path, an option, a file. The command line prints it as a line."""

import json
from pathlib import Path


class InputError(ValueError):
    """Something given to hdc is wrong; the message says what, and what to do."""


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, as the end of a message: "permission denied"."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"  # its place counts from where the decoder began, not from the file's start
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON from line {error.lineno}, column {error.colno} on"
    return (getattr(error, "strerror", None) or str(error)).lower()


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise where `path` could not be written: no permission, a full disk, a folder that is a file."""
    return InputError(f"cannot write {path}: {reason(error)}")
