"""The examples at a small size: both losses train alike, whichever the peer is, and something is learnt."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES, BENCH = (Path(__file__).parent.parent / name for name in ("examples", "bench"))
# Each script with the column to look at, and what that must exceed: chance is 1/8 for shapes, else 1/1000.
CASES = {
    "simclr_images": (["--batch=128", "--steps=3"], "accuracy", 25.0),
    "clip_two_towers": (["--batch=512", "--steps=12", "--chunk=200"], "text to image", 0.5),
    "sentence_pairs": (["--batch=512", "--steps=12"], "recall@1", 20.0),
}
# The package with the peer, how it is imported where torchvision is missing, and what the table then shows.
PEERS = {
    "simclr_images": ("lightly", "peer_imports.lightly()", "lightly.loss.NTXentLoss"),
    "clip_two_towers": (
        "open_clip",
        "sys.modules['open_clip'] = peer_imports.open_clip()",
        "open_clip.ClipLoss",
    ),
    "sentence_pairs": ("sentence_transformers", "", "sentence_transformers"),
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120
    )


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    """The lines of the table, by its headings."""
    assert done.returncode == 0, done.stderr
    _, *lines = done.stdout.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("Loss: "))
    headings, *table = (re.split(r"\s{2,}", line) for line in lines[:end])
    return [dict(zip(headings, row, strict=True)) for row in table]


@pytest.mark.parametrize("name", CASES)
def test_example(name: str) -> None:
    options, column, bound = CASES[name]
    script = str(EXAMPLES / f"{name}.py")
    ours, peer = rows(run(script, *options))
    assert ours["loss function"].startswith("hdc_kernels.")
    assert float(ours["loss"]) == pytest.approx(float(peer["loss"]), rel=1e-3)
    for row in (ours, peer):
        assert float(row[column].rstrip("%")) > bound
        assert float(row["seconds"]) > 0
        if sys.platform == "linux":
            assert 0 <= float(row["memory, MiB"]) < 1000

    # The same with the peer that could not be imported, or without the one that could.
    package, prepare, shown = PEERS[name]
    plain = f"plain PyTorch ({package}: "
    if not peer["loss function"].startswith(plain):
        prepare, shown, plain = f"sys.modules[{package!r}] = None", plain, shown
    assert peer["loss function"].startswith(plain)
    code = f"import sys; sys.path[:0] = {[str(EXAMPLES), str(BENCH)]}; import peer_imports, runpy; {prepare}"
    code += "; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    (other,) = rows(run("-c", code, script, *options, "--loss=peer"))
    assert other["loss function"].startswith(shown)
    assert float(other["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-3)


def test_a_batch_larger_than_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    made = runpy.run_path(str(EXAMPLES / "compare.py"))["parser"](None, batch=4, most=8, steps=1)
    assert made.parse_args(["--batch=8"]).batch == 8
    with pytest.raises(SystemExit):
        made.parse_args(["--batch=9"])
    assert "--batch: it is 9; it must be from 2 to 8" in capsys.readouterr().err
