"""The comparison in `bench/`: a small one runs, accounts for everybody, and turns into figures and tables."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
NAMES = {"eager", "eager, compiled", "ours", "ours, compiled", "ours, CUDA C++"}
PEERS = {"info-nce-pytorch", "pytorch-metric-learning", "KeOps", "Inf-CL", "memeff"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compare.py` writes about the smallest comparison there is."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, str(BENCH / "compare.py"), "--quick", "--device", "cpu"]
    command += ["--sizes", "64", "--threads", "1", "--seconds", "0.05", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Ours beside plain PyTorch" in done.stdout
    return out


def test_everybody_is_accounted_for(stored: Path) -> None:
    result = json.loads(stored.read_text())
    (run,) = result["runs"]
    cases = {case["problem"]: case["contenders"] for case in run["cases"]}
    assert set(cases) == {"overhead", "HD-NCE", "InfoNCE"}
    assert cases["InfoNCE"].keys() >= NAMES | PEERS
    for case in [*run["cases"], *result["memory"]]:
        for name, found in case["contenders"].items():
            assert found["status"] in ("measured", "missing", "unfit", "left out"), (name, found)
            assert found["status"] == "measured" or found["reason"]
    for contenders in cases.values():
        assert contenders["ours"]["status"] == contenders["eager"]["status"] == "measured"


def test_what_was_measured_is_plausible(stored: Path) -> None:
    result = json.loads(stored.read_text())
    for case in result["runs"][0]["cases"]:
        for found in case["contenders"].values():
            if found["status"] != "measured":
                continue
            for part in ("evaluate", "forward", "backward", "step", "times_ours"):
                assert 0 < found[part]["low"] <= found[part]["median"] <= found[part]["high"]
                assert found[part]["count"] >= 3
            assert found.get("agrees", True), "gradients differ from ours"
    errors = [row for row in result["accuracy"] if row["dtype"] == "float32"]
    assert len(errors) == 2 * 2 * 3  # implementations, data, temperatures
    assert all(math.isfinite(row["gradient_error"]) for row in errors)
    assert {"date", "commit", "cpu", "cores", "python", "torch"} <= result["machine"].keys()


def test_the_other_losses(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beside its peer, in a stored result. Ours is measured however long it takes, a peer within the limit."""
    monkeypatch.syspath_prepend(BENCH)
    import compare
    import report

    problems = ("MoCo", "HN-NCE")
    monkeypatch.setattr(compare, "FAMILY", {name: compare.FAMILY[name] for name in problems})
    monkeypatch.setattr(compare, "FAMILY_SIZES", (32, 64))
    monkeypatch.setattr(compare, "FAMILY_MEMORY_SIZE", 64)
    result: dict[str, Any] = json.loads(stored.read_text())
    (run,) = result["runs"]
    others = len(run["cases"]), len(result["memory"])
    given = ["--device", "cpu", "--threads", "1", "--seconds", "0.05", "--limit", "1e-9"]
    for _ in range(2):  # the second time instead of the first
        compare.measure_family(compare.parse(given), result)
        assert (len(run["cases"]), len(result["memory"])) == (others[0] + 4, others[1] + 4)
    for case in (*run["cases"][-4:], *result["memory"][-4:]):
        assert case["problem"] in problems
        found = dict(case["contenders"])
        assert found.pop("ours")["status"] == "measured"
        (peer,) = found.values()
        assert peer["status"] == ("measured" if case["batch"] == 32 else "skipped"), peer
        assert peer.get("agrees", True)
    table = report.markdown(result, whole=False).splitlines()
    (row,) = (line for line in table if line.startswith("| MoCo |"))
    assert "| would take 0 s a call |" in row
    assert result["family"]["limit"] == 1e-9


def test_figures_and_tables(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import plots
    import report

    result: dict[str, Any] = json.loads(stored.read_text())
    figures = plots.write([result], tmp_path)
    assert [path.name for path in figures] == [
        f"{name}-cpu.png" for name in ("time", "speedup", "memory", "error")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)

    readme, other = tmp_path / "README.md", tmp_path / "OTHER.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    other.write_text("no markers")
    assert report.refresh([result], [readme, other]) == [readme]
    text = readme.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert "| InfoNCE, B = 64 |" in text
    assert other.read_text() == "no markers"
    assert "linear_cross_entropy" in report.markdown(result, whole=True)


def test_times_have_three_digits_and_the_unit_of_what_is_shown() -> None:
    import report

    times = [report.time(t) for t in (9.996e-4, 0.0123456, 0.9996, 1.5, 1234.4)]
    assert times == ["1 ms", "12.3 ms", "1 s", "1.5 s", "1230 s"]
