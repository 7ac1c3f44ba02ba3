"""The one exception for what a user can mend: a path, an option, a file. The command line prints it as a line."""

from pathlib import Path


class InputError(ValueError):
    """Something given to hdc is wrong; the message says what, and what to do."""


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise where `path` could not be written: no permission, a full disk, a folder that is a file."""
    return InputError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")
