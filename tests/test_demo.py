"""The demo at a small size: everything is made, shown and found again on a second call."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from hdc.cli import main

SMALL = ["--train_videos=35", "--test_videos=5", "--epochs=1", "--finetune_epochs=1"]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", f"--out={tmp_path}", "--compare", *SMALL]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("random", "SC", "TC", "SC+TC", "HDC", "chance"):
        assert f" {name} " in shown
    results = json.loads((tmp_path / "results.json").read_text())
    for path in ("retrieval.png", "results.json", "data"):
        assert str(tmp_path / path) in shown

    # "both" is a hit only where motion and appearance are, and the takes number 5 × 6.
    for model in results["models"].values():
        nearest = model["nearest"]
        assert nearest["both"] <= min(nearest["motion"], nearest["appearance"])
        for value in nearest.values():
            assert value * 30 / 100 == pytest.approx(round(value * 30 / 100))

    # A report needs no more than the folder to show the retrieved clips, by the same numbers.
    for name in ("random", "SC", "TC", "SC+TC", "HDC"):
        found = json.loads((tmp_path / f"evaluate-{name}" / "retrieval.json").read_text())
        assert 100 * found["accuracy"]["top1"] == results["models"][name]["nearest"]["both"]
        assert found["data"] == str(tmp_path / "data" / "takes.csv")
    assert main(["report", str(tmp_path)]) == 0
    assert "No clips are shown" not in (tmp_path / "report.html").read_text()

    # The figure is an image with green and red in it.
    with av.open(str(tmp_path / "retrieval.png")) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for color in ((0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)):
        assert (image == np.array(color)).all(-1).any()

    # A second call finds videos and runs, and comes to the same numbers.
    checkpoint = tmp_path / "pretrain-HDC" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert main(command) == 0
    assert checkpoint.read_bytes() == before
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("text", ['{"seed": 0, "trai', "{}", "[]"])
def test_settings_that_were_cut_short(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text(text)
    assert main(["demo", f"--out={tmp_path}", *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "data" / "settings.json") in error
    assert ("it is not JSON from line 1, column 13 on" in error) == text.endswith("trai")


def test_other_videos_in_the_folder_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text('{"seed": 1}')
    assert main(["demo", f"--out={tmp_path}", *SMALL]) == 2
    assert "holds a demo with other settings" in capsys.readouterr().err
