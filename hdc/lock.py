"""One at a time: locks on an open file, which fall with the processes that hold them, however those end."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hdc.errors import InputError, unwritable
from hdc.progress import warn

FILE = ".lock"
# What a disk without them says: Lustre, unless it is mounted with them.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def take(file: IO[Any], holder: str, seconds: float, *, inherit: bool) -> None:
    """Lock `file`, which must be open to write.

    Args:
        file: closing it gives the lock back.
        holder: who may have locked it, in words.
        seconds: to wait for another one to end.
        inherit: the lock is also that of the processes that get the open file from this one.

    Raises:
        InputError: another one has it.
    """
    lock = fcntl.flock if inherit else fcntl.lockf
    path = Path(file.name)
    deadline = time.monotonic() + seconds
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(f"another {holder} is at work in {path.parent}") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise unwritable(path, error) from error
            warn(f"{path.parent} is on a disk without locks: nothing keeps another {holder} out")
            return


@contextmanager
def held(folder: Path, holder: str, seconds: float) -> Iterator[None]:
    """Lock `folder` for this process alone, by a file in it, which stays.

    Raises:
        InputError: as `take`; the folder cannot be written to.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        take(file, holder, seconds, inherit=False)
        yield
