"""The lock on a folder: one holder at a time, and none that outlives its processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdc import lock
from hdc.errors import InputError

HOLD = """
import os, sys
from pathlib import Path
from hdc import lock

folder = Path(sys.argv[1])
with open(folder / "shared", "ab") as file, lock.held(folder / "own", "hdc-train", 0):
    lock.take(file, "hdc-train", 0, inherit=True)
    if os.fork() == 0:  # as the workers of a data loader are
        print("locked", flush=True)
        sys.stdin.read()
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with both kinds of locks, which its child outlives until it is told to end."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def hold(folder: Path) -> None:
    with lock.held(folder, "hdc-train", 0):
        pass


def share(folder: Path, seconds: float) -> None:
    with (folder / "shared").open("ab") as file:
        lock.take(file, "hdc-train", seconds, inherit=True)


def test_one_at_a_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Other folders are free, and these are once the holder and its child are done."""
    with pytest.raises(InputError, match=f"^another hdc-train is at work in {tmp_path}/own$"):
        hold(tmp_path / "own")
    with pytest.raises(InputError, match=f"^another hdc-train is at work in {tmp_path}$"):
        share(tmp_path, 0.2)
    hold(tmp_path / "new/other")
    holder.communicate()
    hold(tmp_path / "own")
    share(tmp_path, 0)


def test_killed_holder(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own lock falls with it, the file stays. The other is its child's, too: who waits gets it then."""
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    assert (tmp_path / "own" / lock.FILE).exists()
    hold(tmp_path / "own")
    with pytest.raises(InputError, match="another hdc-train is at work"):
        share(tmp_path, 0.2)
    assert holder.stdin
    monkeypatch.setattr("time.sleep", lambda seconds: holder.stdin.close())  # ends the child
    share(tmp_path, 60)
    assert holder.stdin.closed


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    hold(tmp_path)
    assert "nothing keeps another hdc-train out" in capsys.readouterr().out


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"^cannot write .*/run/\.lock: file exists$"):
        hold(tmp_path / "run")
