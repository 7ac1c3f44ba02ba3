"""The paper's tables on toy videos: the commands' own numbers, shared runs, and going on after a kill."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdc import training
from hdc.cli import COMMANDS, main, parse
from hdc.paper import DATASETS, TABLES
from hdc.reproduce import ReproduceConfig, plan

TOY = [
    "--backbone=tiny",
    "--clips.size=20",
    "--crop_size=18",
    "--pretrain.epochs=2",
    "--pretrain.batch_size=2",
    "--finetune.epochs=1",
    "--finetune.batch_size=2",
    "--checkpoint_every=1",
    "--device=cpu",
]


# Of videos 0 to 5 of a dataset, which ones a split tests with; odd ones are of class b.
TESTED = {1: (0, 1), 2: (2, 3), 3: (4, 5)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Three datasets of six videos of a single clip: each split has four to train with, two to test with."""
    folder = tmp_path_factory.mktemp("data")
    for name in DATASETS:
        rng = np.random.default_rng(len(name))
        lines = ["path,frames,label,split1,split2,split3"]
        for video in range(6):
            picture = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            write_video(
                folder / name / f"{video}.avi",
                16,
                width=32,
                height=32,
                draw=lambda number, *size, picture=picture: np.roll(picture, number, 1),
            )
            parts = ["test" if video in tested else "train" for tested in TESTED.values()]
            lines.append(",".join([f"{video}.avi", "16", "ab"[video % 2], *parts]))
        (folder / name / "manifest.csv").write_text("\n".join(lines))
    return folder


def sources(data: Path, *names: str) -> list[str]:
    return [f"--{name}={data / name}" for name in names or ("kinetics400", "ucf101", "hmdb51")]


def result(out: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((out / f"{name}.json").read_text())["percent"]


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.rglob("*")
        if path.is_file() and not re.fullmatch(r"(table|section)\d\.json", path.name)
    }


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables 3 (one encoder's rows) and 4 in one folder."""
    out = tmp_path_factory.mktemp("done")
    rows = "--rows=[resnet3d-18-random,resnet3d-18-hdc]"
    assert main(["reproduce", "table3", f"--out={out}", rows, *sources(data), *TOY]) == 0
    assert main(["reproduce", "table4", f"--out={out}", *sources(data), *TOY]) == 0
    return out


def test_figures_are_those_of_the_commands(done: Path) -> None:
    """Means over three splits of what `test` left, and the shares that `retrieve` left, beside the paper's."""
    paper = [43.8, 19.1, 68.5, 38.1]
    lines = result(done, "table3")
    assert [(line["paper"], line["k"]) for line in lines] == [(figure, 1) for figure in paper]
    for line in lines:
        shares = [
            json.loads((Path(line["run"]) / f"split{split}" / "test.json").read_text())
            for split in (1, 2, 3)
        ]
        assert {share["videos"] for share in shares} == {2}
        mean = 100 * sum(share["video_accuracy"] for share in shares) / 3
        assert line["here"] == pytest.approx(mean)
        assert line["gap"] == pytest.approx(mean - line["paper"])
    lines = result(done, "table4")
    assert [line["k"] for line in lines] == [1, 5, 10, 20, 50] * 2
    for line in lines:
        shares = json.loads((Path(line["run"]) / "retrieval.json").read_text())["accuracy"]
        assert line["here"] == 100 * shares[f"top{line['k']}"]


def test_a_second_call_does_nothing(
    done: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, lines = files(done), result(done, "table4")
    assert main(["reproduce", "table4", f"--out={done}", *sources(data), *TOY]) == 0
    assert files(done) == before
    assert result(done, "table4") == lines
    shown = capsys.readouterr().out
    for line in lines:
        figures = f"{line['paper']}", f"{line['here']:.1f}", f"{line['gap']:+.1f}"
        cells = " │ +".join(map(re.escape, figures))
        assert re.search(rf"│ +{line['k']} │ +{cells} │", shown)


def test_tables_share_runs(done: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 1's HDC needs what Table 3's does, but for the splits; nothing is left to do for these rows."""
    before = files(done)
    rows = "--rows=[scratch,hdc]"
    assert main(["reproduce", "table1", f"--out={done}", rows, *sources(data), *TOY]) == 0
    assert files(done) == before
    scratch, hdc = result(done, "table1")
    assert (scratch["paper"], scratch["gap"]) == (None, None)
    split1 = json.loads((Path(hdc["run"]) / "split1" / "test.json").read_text())
    assert hdc["here"] == 100 * split1["video_accuracy"]
    assert hdc["run"] == result(done, "table3")[2]["run"]
    assert "training from scratch" in capsys.readouterr().out


def test_rows_that_pretrain_alike_share_the_folder() -> None:
    def pretraining(table: str, row: str) -> str:
        config = ReproduceConfig(kinetics400="k", ucf101="u", hmdb51="h", rows=(row,), out="out")
        return plan(config, TABLES[table])[0].steps[0].config.out

    assert pretraining("table1", "hdc") == pretraining("table2", "hdc")
    assert pretraining("table3", "resnet3d-18-hdc") == pretraining("table1", "hdc")
    assert pretraining("table4", "c3d-hdc") == pretraining("table5", "c3d-hdc")
    assert pretraining("table3", "c3d-hdc") == pretraining("table4", "c3d-hdc")
    assert pretraining("section4", "hdc") == pretraining("table4", "c3d-hdc")
    folders = [pretraining("table1", row) for row in TABLES["table1"].rows if row != "scratch"]
    folders += [pretraining("table2", row) for row in TABLES["table2"].rows if row != "hdc"]
    folders += [pretraining("table3", f"{name}-hdc") for name in ("c3d", "r2plus1d-10")]
    folders += [pretraining("section4", "tc-unaugmented")]
    assert len(set(folders)) == 15


def commands(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """The lines of a dry run that are no comments."""
    assert main(["reproduce", *options, "--dry-run"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("options", [[], [*TOY, "--precision=bf16", "--workers=3", "--seed=2"]])
@pytest.mark.parametrize("name", TABLES)
def test_a_dry_run_prints_what_would_run(
    name: str, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Parsed again, every line is the configuration that is run; the folders need not be there yet."""
    out = tmp_path / "a b"
    given = ["--kinetics400=k k", "--ucf101=u", "--hmdb51=h", f"--out={out}", *options]
    config, _ = parse("reproduce", COMMANDS["reproduce"], [name, *given])
    steps = [step for cell in plan(config, TABLES[name]) for step in cell.steps]
    lines = commands(capsys, name, *given)
    assert lines == list(dict.fromkeys(map(str, steps)))
    for step in steps:
        program, command, *words = shlex.split(str(step))
        assert program == "hdc-train"
        assert parse(command, COMMANDS[command], words)[0] == step.config
    assert not out.exists()


def test_the_printed_commands_do_the_same(
    done: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["table4", f"--out={tmp_path}", *sources(data), *TOY]
    lines = commands(capsys, *options)
    assert [shlex.split(line)[1] for line in lines] == ["retrieve", "pretrain", "retrieve"]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    capsys.readouterr()
    assert commands(capsys, *options) == []
    assert main(["reproduce", *options]) == 0
    ours, theirs = result(tmp_path, "table4"), result(done, "table4")
    assert [line["here"] for line in ours] == [line["here"] for line in theirs]


def test_interrupted_again_and_again(
    done: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start gets through one step of training; in the end all is as without."""
    options = [
        "--rows=[resnet3d-18-hdc]",
        f"--out={tmp_path}",
        *sources(data, "kinetics400", "ucf101"),
    ]
    seed, steps = training.step_seed, 0

    def one_step(value: int, now: int) -> int:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise KeyboardInterrupt
        return seed(value, now)

    monkeypatch.setattr(training, "step_seed", one_step)
    starts = 1
    while main(["reproduce", "table3", *options, *TOY]) != 0:
        starts, steps = starts + 1, 0
    # Four steps of pretraining and two of finetuning for each of three splits.
    assert starts == 10
    assert result(tmp_path, "table3")[0]["here"] == result(done, "table3")[2]["here"]
    run = Path(result(tmp_path, "table3")[0]["run"]).name
    for split in (1, 2, 3):
        ours, theirs = (
            torch.load(out / run / f"split{split}" / "checkpoint.pt", weights_only=True)["model"]
            for out in (tmp_path, done)
        )
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_kill_9(done: Path, data: Path, tmp_path: Path) -> None:
    """Once a first checkpoint is there; what is left then comes to the same figures."""
    options = ["--rows=[c3d-hdc]", f"--out={tmp_path}", *sources(data, "kinetics400", "ucf101")]
    command = [sys.executable, "-m", "hdc.cli", "reproduce", "table4", *options, *TOY]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while run.poll() is None and not list(tmp_path.glob("*/checkpoint.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "table4.json").exists()
    assert main(["reproduce", "table4", *options, *TOY]) == 0
    ours, theirs = result(tmp_path, "table4"), result(done, "table4")[5:]
    assert [line["here"] for line in ours] == [line["here"] for line in theirs]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            "table3",
            ["--seed=1"],
            "tiny-random-ucf101/split1/checkpoint.pt was made with different seed",
        ),
        ("table4", ["--seed=1"], "tiny-random-ucf101/retrieval.json was made with different seed;"),
        (
            "table4",
            ["--pretrain.batch_size=4"],
            "checkpoint.pt was made with different batch_size; ",
        ),
        ("table4", ["--ucf101=HMDB51"], "retrieval.json was made with different data; "),
        ("table9", [], "invalid choice: 'table9'"),
        ("table4", ["--rows=[hdc]"], "rows has 'hdc'; the table has c3d-random, c3d-hdc"),
        ("table4", ["--out="], "out is empty"),
        ("table4", ["--pretrain.epochs=0"], "epochs is 0"),
        ("table4", ["--crop_size=64"], "crop_size is 64, larger than"),
        ("table4", ["--kinetics400=null", "--ucf101=null"], "needs --ucf101 and --kinetics400"),
        ("table4", ["--kinetics400=nowhere", "--out=OTHER"], "cannot read the manifest nowhere"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    table: str,
    options: list[str],
    message: str,
    done: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(done)
    options = [
        option.replace("HMDB51", str(data / "hmdb51")).replace("OTHER", str(tmp_path / "other"))
        for option in options
    ]
    rows = ["--rows=[resnet3d-18-random,resnet3d-18-hdc]"] if table == "table3" else []
    assert main(["reproduce", table, f"--out={done}", *sources(data), *TOY, *rows, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hdc-train: ")
    assert error.count("\n") == 1
    assert message in error
    assert files(done) == before
    assert not any((tmp_path / "other").rglob("*.pt"))


def test_pretraining_goes_on_but_what_came_of_it_is_not_mixed(
    done: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More epochs: a longer pretraining, another retrieval, and a finetuning that must begin anew."""
    options = [f"--out={tmp_path}", *sources(data), *TOY]
    options[options.index("--pretrain.epochs=2")] = "--pretrain.epochs=1"
    row = "--rows=[c3d-hdc]"
    assert main(["reproduce", "table4", row, *options]) == 0
    assert main(["reproduce", "section4", "--rows=[hdc]", *options, "--hmdb51=null"]) == 0
    assert main(["reproduce", "table4", row, *options, "--pretrain.epochs=2"]) == 0
    assert [line["here"] for line in result(tmp_path, "table4")] == [
        line["here"] for line in result(done, "table4")[5:]
    ]
    capsys.readouterr()
    again = ["section4", "--rows=[hdc]", *options, "--pretrain.epochs=2", "--hmdb51=null"]
    assert main(["reproduce", *again]) == 2
    assert "was made with different pretrained weights; " in capsys.readouterr().err


def test_rows_without_their_data_are_skipped(
    done: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--out={done}", *sources(data, "ucf101"), *TOY]
    rows = "--rows=[resnet3d-18-random,resnet3d-18-hdc]"
    lines = result(done, "table3")
    assert main(["reproduce", "table3", rows, *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [line["here"] for line in result(done, "table3")] == [lines[0]["here"], None, None, None]
    assert "HDC, 3D-ResNet18 on UCF101: skipped, needs --kinetics400" in shown
    assert "HDC, 3D-ResNet18 on HMDB51: skipped, needs --kinetics400 and --hmdb51" in shown
    assert re.search(r"│ 38\.1 │ – │ – │", shown)


def test_report_shows_the_tables(done: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(done), f"--out={page}"]) == 0
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page.read_text())
    shown = [re.sub(r"(<[^>]*>)+", "|", row) for row in rows]
    for line in result(done, "table4"):
        percentages = (f"{line[name]:.1f}" for name in ("paper", "here"))
        figures = (f"{line['k']}", *percentages, f"{line['gap']:+.1f}")
        assert "|".join([line["title"], "UCF101", *figures, ""]) in shown


def test_torchrun(done: Path, data: Path, tmp_path: Path) -> None:
    """Two processes: the same features, so the same retrieval, from random weights; one table, one file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "hdc.cli", "reproduce", "table4", f"--out={tmp_path}"]
    ran = subprocess.run(
        [*command, *sources(data, "kinetics400", "ucf101"), *TOY],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("table4: ") == 1
    ours, theirs = result(tmp_path, "table4"), result(done, "table4")
    assert [line["here"] for line in ours[:5]] == [line["here"] for line in theirs[:5]]
    assert all(isinstance(line["here"], float) for line in ours)
