"""What is printed is what was given, whatever it looks like: paths hold brackets, and are longer than a line."""

import os
import subprocess
import sys

import pytest

from hdc.progress import ProgressBar, say, warn

AWKWARD = "/data/Title [dQw4w9WgXcQ] [/y] [bold]:bug: " + "x" * 200 + ".mp4"


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"wrote {AWKWARD}")
    warn(f"skipped {AWKWARD}: bad")
    assert capsys.readouterr().out == f"wrote {AWKWARD}\nwarning: skipped {AWKWARD}: bad\n"


def test_a_log_file_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("packing", 3, done=1) as bar:
        bar.advance(1, "1 [/bad]")
        bar.set(3, 3)
    assert capsys.readouterr().out == "packing 3/3 1 [/bad]\n"


def test_a_terminal_gets_a_bar() -> None:
    """In a process of its own, which takes its output for a terminal."""
    code = (
        "from hdc.progress import ProgressBar, warn\n"
        "with ProgressBar('packing', 2) as bar:\n"
        "    bar.advance(1, '1 [/bad]')\n"
        "    warn('skipped [/y].mp4')\n"
        "    bar.advance(1)\n"
    )
    environment = {**os.environ, "TTY_COMPATIBLE": "1", "FORCE_COLOR": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2/2" in done.stdout
    assert "1 [/bad]" in done.stdout
    assert "warning: skipped [/y].mp4" in done.stdout
