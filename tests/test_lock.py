"""The lock on a folder: one holder at a time, and none that outlives its processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hdc import lock
from hdc.errors import InputError

HOLD = """
import sys
from pathlib import Path
from hdc import lock

with lock.held(Path(sys.argv[1]), "hdc-train"):
    print("held", flush=True)
    sys.stdin.read()
"""
INHERIT = """
import os, sys, time
from pathlib import Path
from hdc import lock

with lock.held(Path(sys.argv[1]), "hdc-train"):
    if os.fork() == 0:  # as the workers of a data loader are
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
    time.sleep(1000)
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline()
    return process


def refuse(folder: Path) -> None:
    with (
        pytest.raises(InputError, match=f"^another hdc-train is at work in {folder}$"),
        lock.held(folder, "hdc-train"),
    ):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 0.2)


def test_one_at_a_time(tmp_path: Path) -> None:
    """In this process as in another; other folders are free, and this one is once the holder is done."""
    with lock.held(tmp_path / "new", "hdc-train"):
        refuse(tmp_path / "new")
        with lock.held(tmp_path / "other", "hdc-train"):
            pass
    with lock.held(tmp_path / "new", "hdc-train"):
        pass
    other = start(HOLD, tmp_path)
    refuse(tmp_path)
    other.communicate()
    with lock.held(tmp_path, "hdc-train"):
        pass


def test_falls_with_the_holder(tmp_path: Path) -> None:
    """kill -9: the file stays, the lock does not."""
    holder = start(HOLD, tmp_path)
    refuse(tmp_path)
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    assert (tmp_path / lock.FILE).exists()
    with lock.held(tmp_path, "hdc-train"):
        pass
    holder.communicate()


def test_falls_with_the_last_process_that_inherited_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of a killed run end a little later: who comes then waits for them."""
    holder = start(INHERIT, tmp_path)
    holder.kill()
    holder.wait()
    refuse(tmp_path)
    monkeypatch.setattr(lock, "SECONDS_TO_WAIT", 60)
    monkeypatch.setattr("time.sleep", lambda seconds: holder.stdin.close())  # type: ignore[union-attr]
    with lock.held(tmp_path, "hdc-train"):
        pass
    assert holder.stdin
    assert holder.stdin.closed


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path, "hdc-train"):
        assert "nothing keeps another hdc-train out of" in capsys.readouterr().out


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(InputError, match=r"^cannot write .*/run/\.lock: file exists$"),
        lock.held(tmp_path / "run", "hdc-train"),
    ):
        pass
