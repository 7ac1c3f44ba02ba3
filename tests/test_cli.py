"""`hdc-train` as a user meets it: help, results, and one line for every mistake."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hdc import environment
from hdc.cli import COMMANDS, main, parse
from hdc.config import RetrieveConfig
from hdc.config import TestConfig as RecognitionConfig
from hdc.data.clips import ClipConfig
from hdc.data.synthetic import make_dataset
from hdc.presets import PRESETS

LONG = "n" * 300  # more than file systems take
TINY = ["--backbone=tiny", "--clips.size=32", "--device=cpu"]
TRAIN = [*TINY, "--augment.crop_size=28", "--batch_size=5", "--epochs=1"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    make_dataset(root, train=10, test=5, seed=0)
    return root


@pytest.fixture(scope="module")
def pretrained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    assert main(["pretrain", f"--data={videos}", f"--out={out}", *TRAIN]) == 0
    return out / "checkpoint.pt"


@pytest.fixture(scope="module")
def finetuned(videos: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetuned")
    options = [f"--data={videos}", f"--out={out}", f"--checkpoint={pretrained}"]
    assert main(["finetune", *options, *TRAIN]) == 0
    return out / "checkpoint.pt"


def test_alone_says_what_it_can_do_and_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert "hdc-train demo" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the terminal and 100 columns, and in words that can be typed."""
    monkeypatch.setenv("COLUMNS", f"{columns}")
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"example: hdc-train {name}" in shown
    for field in COMMANDS[name].config.__dataclass_fields__:
        assert f"--{field}" in shown
    options = re.split(r"^(?:options|Presets|example)\b", shown, flags=re.MULTILINE)[1]
    indented = [line for line in options.splitlines() if line.startswith(" ")]
    assert max(map(len, indented)) <= min(columns, 100)
    assert not re.search(
        r"Literal|Optional|tuple\[|True|False|required, |type: (int|str|float)", shown
    )


def test_evaluation_commands_write_their_numbers(
    videos: Path, pretrained: Path, finetuned: Path, tmp_path: Path
) -> None:
    data = f"--data={videos}"
    crop = "--crop_size=28"
    weights = f"--checkpoint={pretrained}"
    assert main(["retrieve", data, weights, f"--out={tmp_path}", crop, *TINY]) == 0
    assert main(["probe", data, weights, f"--out={tmp_path}", crop, *TINY]) == 0
    test = ["test", data, f"--checkpoint={finetuned}", f"--out={tmp_path}", crop, *TINY]
    assert main(test) == 0
    votes = json.loads((tmp_path / "knn.json").read_text())
    assert votes["neighbors"] == 10  # all there are
    assert votes["checkpoint"] == str(pretrained)
    assert 0 <= votes["weighted"] <= 1
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert (found["queries"], found["gallery"], found["unreadable"]) == (5, 10, [])
    assert found["accuracy"]["top10"] == 1.0  # ten training videos, two of each class
    assert 0 <= json.loads((tmp_path / "probe.json").read_text())["test_accuracy"] <= 1
    tested = json.loads((tmp_path / "test.json").read_text())
    assert (tested["videos"], tested["clips"]) == (5, 30)
    right = [entry["class"] == entry["predicted"] for entry in tested["predictions"]]
    assert tested["video_accuracy"] == sum(right) / 5


def test_values_come_from_preset_then_file_then_options(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"seed": 7, "objective": {"temperature": 0.2}, "epochs": 1}))
    options = ["--preset=table1-sc5", f"--config={file}", "--objective.temperature=0.3"]
    out = tmp_path / "run"
    assert main(["pretrain", f"--data={videos}", f"--out={out}", *options, *TRAIN]) == 0
    config = torch.load(out / "checkpoint.pt", weights_only=True)["config"]
    assert config["objective"]["spatial_scales"] == (5,)
    assert config["seed"] == 7
    assert config["objective"]["temperature"] == 0.3
    # What the run wrote brings it back: the same command with its config finds nothing left to do.
    assert main(["pretrain", f"--config={out / 'config.yaml'}", "--resume"]) == 0


def test_a_printed_configuration_is_that_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data=x", "--preset", "table1-sc5", "--objective.temperature=0.2"]
    assert main(["pretrain", *given, "--print_config"]) == 0
    (tmp_path / "options.yaml").write_text(capsys.readouterr().out)
    by_hand, by_file = (
        parse("pretrain", COMMANDS["pretrain"], options)[0]
        for options in (given, [f"--config={tmp_path / 'options.yaml'}"])
    )
    assert by_hand.objective == replace(PRESETS["table1-sc5"].objective, temperature=0.2)
    assert by_file == by_hand


def next_command(shown: str) -> list[str]:
    """The words of the command that was printed."""
    (line,) = [line for line in shown.splitlines() if line.startswith("next: ")]
    program, *words = shlex.split(line.removeprefix("next: "))
    assert program == "hdc-train"
    return words


def test_the_next_command_tests_on_the_split_that_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the run's clips, classes and sizes, wherever it lies."""
    manifest = make_dataset(tmp_path / "the videos", train=10, test=10, seed=0)[0]
    first = manifest.columns["split1"]
    manifest.columns["split2"] = np.where(first == "train", "test", "train")
    manifest.columns["action"] = manifest.columns.pop("label")
    manifest.write()
    data, out = f"--data={manifest.source.parent}", tmp_path / "run [x] :bug:"
    options = ["--split=2", "--label=action", "--norm_eps=0.001", "--clips.start_every=4"]
    assert main(["finetune", data, f"--out={out}", *options, *TRAIN]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {out}/checkpoint.pt and {out}/metrics.jsonl\n" in shown
    name, *words = next_command(shown)
    assert name == "test"
    assert parse(name, COMMANDS[name], words)[0] == RecognitionConfig(
        data=str(manifest.source.parent),
        out=str(out),
        split=2,
        label="action",
        backbone="tiny",
        norm_eps=0.001,
        clips=ClipConfig(size=32, start_every=4),
        device="cpu",
        checkpoint=str(out / "checkpoint.pt"),
        crop_size=28,
    )
    assert main([name, *words]) == 0
    tested = json.loads((out / "test.json").read_text())
    trained_on = set(manifest.rows("train", 2).path.tolist())
    assert len(tested["predictions"]) == 10
    assert not trained_on & {entry["path"] for entry in tested["predictions"]}


def test_the_next_command_retrieves_with_what_was_pretrained(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = [f"--data={videos}", f"--out={out}", "--seed=3", *TRAIN]
    assert main(["pretrain", *options]) == 0
    name, *words = next_command(capsys.readouterr().out)
    assert name == "retrieve"
    assert parse(name, COMMANDS[name], words)[0] == RetrieveConfig(
        data=str(videos),
        out=str(out),
        backbone="tiny",
        clips=ClipConfig(size=32),
        device="cpu",
        seed=3,
        checkpoint=str(out / "checkpoint.pt"),
        crop_size=28,
    )
    assert main([name, *words]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out in (
        f"hdc-train {environment.package_version('hdc')}\n",
        "hdc-train of a checkout, not installed\n",
    )


def test_help_on_a_terminal_of_ascii() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hdc.cli", "pretrain", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u2212" in done.stdout


def test_whoever_reads_may_stop() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hdc.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_folder_without_manifest_is_indexed_once(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_dataset(root, train=10, test=5, seed=0)
    expected = (root / "manifest.csv").read_text()
    (root / "manifest.csv").unlink()
    assert main(["pretrain", f"--data={root}", f"--out={tmp_path / 'run'}", *TRAIN]) == 0
    assert (root / "manifest.csv").read_text() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "'pretrian' is no command; there are demo, pretrain"),
        (["pretrain"], "the following arguments are required: data"),
        (["pretrain", "--data=DATA", "--nope=3"], "unrecognized arguments: --nope=3"),
        (["pretrain", "--data=DATA", "--epochs=many"], "epochs: expected int, got many"),
        (["pretrain", "--data=DATA", "--epochs=0"], "epochs is 0; it must be at least 1"),
        (["pretrain", "--data=DATA", "--batch_size=1"], "needs at least 2 videos"),
        (["pretrain", "--data=DATA", "--backbone=vgg"], "backbone: expected one of 'c3d'"),
        (
            ["pretrain", "--data=DATA", "--preset=x"],
            "preset is 'x'; it must be one of table1-sc5, ",
        ),
        (["pretrain", "--data=DATA", "--preset"], "--preset: expected one argument"),
        (["pretrain", "--data=DATA", "--pres=table1-sc5"], "unrecognized arguments: --pres="),
        (["pretrain", "--data=DATA", "--config=PRESET"], "preset is in a --config file; "),
        (["finetune", "--data=DATA", "--config=PRESET"], "preset"),
        (["pretrain", "--data=DATA", "--config=nope.yaml"], "nope.yaml"),
        (["pretrain", "--data=DATA", f"--seed={2**64}"], "it must be from 0 to 2^64 - 1"),
        (["demo", "--seed=-1"], "seed is -1; it must be from 0 to 2^64 - 1"),
        (["pretrain", "--data=LONG"], f"{LONG}: file name too long"),
        (["pretrain", f"--data={'/d' * 3000}"], "/d/d: file name too long"),
        (["finetune", "--data=DATA", "--checkpoint=LONG"], f"{LONG}: file name too long"),
        (["report", "LONG"], f"{LONG}: file name too long"),
        (["report", "RUN", "--data=LONG"], f"{LONG}: file name too long"),
        (["export", "LONG", "EMPTY"], f"{LONG}: file name too long"),
        (["pack", "LONG"], f"{LONG}: file name too long"),
        (["prepare", "folder", "LONG", "EMPTY"], f"{LONG}: file name too long"),
        (["pretrain", "--data=DATA", "--objective.temperature=0"], "objective.temperature is 0"),
        (["pretrain", "--data=DATA", "--objective.alpha=[1]"], "objective.alpha has 1 weights"),
        (["pretrain", "--data=DATA", "--objective.spatial_scales=[2]"], "3, 4 and 5 at most once"),
        (["pretrain", "--data=DATA", "--optimizer.lr=-1"], "optimizer.lr is -1"),
        (["pretrain", "--data=DATA", "--augment.hue=2"], "hue is 2"),
        (["pretrain", "--data=DATA", "--device=warp"], "device is 'warp'"),
        (["pretrain", "--data=DATA", *TRAIN, "--augment.crop_size=64"], "crop_size is 64"),
        (["pretrain", "--data=DATA", *TRAIN, "--batch_size=64"], "only 10 training videos"),
        (["pretrain", "--data=DATA", *TRAIN, "--clips.frames=200"], "shorter than a clip of 200"),
        (["pretrain", "--data=DATA", *TRAIN, "--split=2"], "no column split2; it has split1"),
        (["pretrain", "--data=missing.csv", *TRAIN], "cannot read the manifest missing.csv"),
        (["pretrain", "--data=EMPTY", *TRAIN], "has no folder UCF-101"),
        (["pretrain", "--data=DATA", *TRAIN, "--out=FILE/run"], "cannot write"),
        (["finetune", "--data=DATA", *TRAIN, "--label=action"], "no column 'action'"),
        (["finetune", "--data=DATA", *TRAIN, "--checkpoint=FILE"], "not a readable checkpoint"),
        (["finetune", "--data=DATA", *TRAIN, "--checkpoint=nope.pt"], "there is no checkpoint"),
        (
            ["retrieve", "--data=DATA", "--checkpoint=PRETRAINED", "--backbone=c3d"],
            "(backbone tiny) do not fit backbone c3d: ",
        ),
        (
            ["test", "--data=DATA", "--checkpoint=PRETRAINED", *TINY, "--crop_size=28"],
            "a finetune one is needed",
        ),
        (["probe", "--data=DATA", "--neighbors=0"], "neighbors is 0; it must be at least 1"),
        (["probe", "--data=DATA", "--knn_temperature=0"], "knn_temperature is 0"),
        (["recognize", "--data=DATA", "--splits=[1,1]"], "splits is [1, 1]; it must name splits"),
        (["recognize", "--data=DATA", *TRAIN], "no column split2; it has split1"),
        (["demo", "--train_videos=7"], "train_videos is 7; it must be a multiple of 5"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    videos: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where the default folders go
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a checkpoint")
    (tmp_path / "preset.yaml").write_text("preset: table1-sc5")
    places = {
        "DATA": videos,
        "EMPTY": tmp_path / "empty",
        "FILE": tmp_path / "file",
        "PRETRAINED": pretrained,
        "RUN": pretrained.parent,
        "PRESET": tmp_path / "preset.yaml",
        "LONG": Path(LONG),
    }
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("hdc-train: ")
    assert message in error


def test_missing_video_is_named_before_training(videos: Path, tmp_path: Path) -> None:
    """In a process of its own: exit code, one line, no traceback."""
    text = (videos / "manifest.csv").read_text().replace("UCF-101", str(videos / "UCF-101"))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(text.replace("v_Up_g01_c01", "v_Up_g99_c01"))
    command = [sys.executable, "-P", "-m", "hdc.cli", "pretrain", f"--data={manifest}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'run'}", *TRAIN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "names 1 missing video: " in done.stderr
    assert "v_Up_g99_c01.avi" in done.stderr
