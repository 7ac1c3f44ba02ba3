"""One at a time: a lock on an open file, which falls with the last process that has it open, however that ends."""

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
SECONDS_TO_WAIT = 10.0  # for the workers of a run that was killed: they notice within some seconds
NO_LOCKS = {
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}  # such as Lustre, unless it is mounted with them


def take(file: IO[Any], holder: str) -> None:
    """Lock `file`, which a process that is started or forked may inherit, and with it the lock.

    Raises:
        InputError: it is locked, and stays so; `holder` is who may have done that.
    """
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                folder = Path(file.name).parent
                raise InputError(f"another {holder} is at work in {folder}") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise unwritable(Path(file.name), error) from error
            warn(f"nothing keeps another {holder} out of {Path(file.name).parent}: it has no locks")
            return


@contextmanager
def held(folder: Path, holder: str) -> Iterator[None]:
    """Lock `folder` by a file in it, which stays.

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
        take(file, holder)
        yield
