"""`hdc-train prepare` as a user meets it: bad files are reported, a killed run goes on, a second does nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from downloads import audio, lay
from test_prepare_listing import AWKWARD, HMDB51, KINETICS, UCF101

from hdc.cli import main
from hdc.data import workers
from hdc.data.manifest import read_manifest
from hdc.data.prepare import PrepareConfig, check, prepare
from hdc.data.video import read_all, read_clips
from hdc.errors import InputError

FRAMES = 20
TWO = PrepareConfig(short_side=32, workers=2)


def reasons(target: Path) -> dict[str, str]:
    with (target / "bad_files.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but the log, whose lines stand in the order of the work."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "prepare.jsonl"
    }


@pytest.fixture
def film(tmp_path: Path, write_video: Callable[..., Path]) -> bytes:
    """The content of a file that is good under any name."""
    return write_video(tmp_path / "film.avi", FRAMES, b_frames=2, width=96).read_bytes()


@pytest.fixture
def source(tmp_path: Path, film: bytes, write_video: Callable[..., Path]) -> Path:
    """A folder with three good videos, one of them under a strange name, and every kind of bad one."""
    root = tmp_path / "source"
    write_video(root / "jump (high)/b, 2.mp4", FRAMES, codec="libx264", width=96)
    write_video(root / "run/one frame.mp4", 1)
    files = {
        "run/a.avi": film,
        "run/film called.jpg": film,
        "run/empty.avi": b"",
        "run/cut.avi": film[: len(film) * 4 // 5],
        "run/text.mp4": b"<html>This video is not available</html>\n" * 9,
        "run/README.txt": b"nothing to see here\n" * 9,
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    audio(root / "run/song.mp4")
    return root


def test_good_and_bad_files(
    source: Path, tmp_path: Path, frame_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    target = tmp_path / "target"
    steps: list[tuple[int, int, int]] = []
    result = prepare("folder", source, target, TWO, lambda *step: steps.append(step))
    assert result.changed
    assert [step[:2] for step in steps] == [(done, 9) for done in range(1, 10)]
    assert steps[-1] == (9, 9, 6)
    manifest = read_manifest(target / "manifest.csv")
    names = ["jump (high)/b, 2.mp4", "run/a.mp4", "run/film called.mp4"]
    assert manifest.path.tolist() == names
    assert manifest.frames.tolist() == [FRAMES] * 3
    columns = {name: values.tolist() for name, values in manifest.columns.items()}
    digests = columns.pop("sha256")
    assert columns == {
        "label": ["jump (high)", "run", "run"],
        "split1": ["train"] * 3,
        "fps": ["25"] * 3,
        "width": ["48"] * 3,
        "height": ["32"] * 3,
    }
    for row, digest in enumerate(digests):
        assert workers.hash_file(manifest.file(row)) == digest
        assert frame_numbers(read_all(manifest.file(row), 32)) == list(range(FRAMES))
    bad = reasons(target)
    assert bad == result.bad
    assert f" of {FRAMES} frames" in bad.pop("run/cut.avi")
    assert bad == {
        "run/README.txt": "invalid data found when processing input",
        "run/empty.avi": "is empty (0 bytes)",
        "run/one frame.mp4": "holds a single frame",
        "run/song.mp4": "holds no video stream that can be decoded",
        "run/text.mp4": "invalid data found when processing input",
    }
    assert set(contents(target)) == {*names, "manifest.csv", "bad_files.csv"}


def test_second_run_does_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    prepare("folder", source, target, TWO)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert not prepare("folder", source, target, TWO).changed
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_what_changed_is_done_again(source: Path, tmp_path: Path, film: bytes) -> None:
    target = tmp_path / "target"
    first = contents_after = prepare("folder", source, target, TWO).manifest.text()
    (target / "run/a.mp4").unlink()
    (source / "run/empty.avi").write_bytes(film)  # downloaded again
    (source / "run/song.mp4").unlink()
    steps = []
    result = prepare("folder", source, target, TWO, lambda *step: steps.append(step[0]))
    assert result.changed
    assert len(steps) == 2
    assert "run/empty.mp4" in result.manifest.path
    assert "run/song.mp4" not in result.bad
    assert set(first.splitlines()) < set(result.manifest.text().splitlines())
    assert contents_after == first


def test_ucf101(tmp_path: Path, film: bytes) -> None:
    source = lay(tmp_path / "source", UCF101)
    for video in source.rglob("*.avi"):
        video.write_bytes(film)
    result = prepare("ucf101", source, tmp_path / "target", TWO)
    assert result.manifest.path.tolist() == [
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.mp4",
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.mp4",
        "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.mp4",
    ]
    assert result.manifest.columns["split1"].tolist() == ["train", "train", "test"]
    assert result.manifest.columns["split2"].tolist() == ["test", "", ""]
    assert result.bad == {"UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": "is missing"}


def test_hmdb51(tmp_path: Path, film: bytes) -> None:
    source = lay(tmp_path / "source", HMDB51)
    for video in source.rglob("*.avi"):
        video.write_bytes(film)
    result = prepare("hmdb51", source, tmp_path / "target", TWO)
    names = [AWKWARD.replace(".avi", ".mp4"), "b hair (1).mp4"]
    assert result.manifest.path.tolist() == [f"VIDEOS/brush_hair/{name}" for name in names]
    assert result.manifest.columns["split1"].tolist() == ["train", "test"]
    assert result.bad == {"VIDEOS/Wave/gone.avi": "is missing"}
    assert check(tmp_path / "target") == []


def test_kinetics400(tmp_path: Path, film: bytes) -> None:
    source = lay(tmp_path / "source", KINETICS)
    for video in (path for path in source.rglob("*") if path.suffix in (".mp4", ".webm", ".mkv")):
        video.write_bytes(film)
    result = prepare("kinetics400", source, tmp_path / "target", TWO)
    assert result.manifest.path.tolist() == [
        "train/massaging/dQw4w9WgXcQ_000095_000105.mp4.mp4",
        "train/playing squash or racquetball/-0_aB3cdEfg_000001_000011.mp4",
        "val_256/abseiling/dqw4w9wgxcq_95_105.mp4",
    ]
    labels = ["massaging person's head, neck", "playing squash or racquetball", "abseiling"]
    assert result.manifest.columns["label"].tolist() == labels
    assert result.bad == {"train/abseiling/GoneGoneGon_000000_000010.mp4": "is missing"}


def test_two_files_never_become_one(tmp_path: Path, film: bytes) -> None:
    names = ["run/a.avi", "run/a.mkv", "run/A.mp4", "run/b.avi"]
    lay(tmp_path / "source", dict.fromkeys(names, ""))
    for name in names:
        (tmp_path / "source" / name).write_bytes(film)
    result = prepare("folder", tmp_path / "source", tmp_path / "target", TWO)
    assert sorted(result.manifest.path.tolist()) == [
        "run/A.mp4.mp4",
        "run/a.avi.mp4",
        "run/a.mkv.mp4",
        "run/b.mp4",
    ]


def test_names_that_are_not_utf8(tmp_path: Path, film: bytes) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/good.avi").write_bytes(film)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/source/caf\xe9.avi")).write_bytes(film)
    prepare("folder", tmp_path / "source", tmp_path / "target", TWO)
    assert reasons(tmp_path / "target") == {"caf\\udce9.avi": "has a name that is not UTF-8"}


@pytest.mark.parametrize("in_place", [True, False])
def test_without_transcoding(in_place: bool, source: Path, tmp_path: Path) -> None:
    """Only the manifest is written, and it can be checked and read from."""
    target = source if in_place else tmp_path / "target"
    before = set(source.rglob("*"))
    config = PrepareConfig(workers=2, no_transcode=True)
    manifest = prepare("folder", source, target, config).manifest
    written = {path.name for path in set(target.rglob("*")) - before}
    assert written == {"manifest.csv", "bad_files.csv", "prepare.jsonl"}
    paths = ["jump (high)/b, 2.mp4", "run/a.avi", "run/film called.jpg"]
    assert [manifest.file(row) for row in range(3)] == [source / path for path in paths]
    assert [Path(path).is_absolute() for path in manifest.path] == [not in_place] * 3
    assert manifest.columns["width"].tolist() == ["96"] * 3
    assert check(target) == []
    assert not prepare("folder", source, target, config).changed
    assert read_clips(manifest.file(1), [3], 8, 32)[0].shape == (8, 32, 48, 3)


def test_check_finds_every_difference(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    prepare("folder", source, target, TWO)
    assert check(target) == []
    content = (target / "run/a.mp4").read_bytes()
    (target / "run/a.mp4").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (target / "run/film called.mp4").unlink()
    (target / "run/.a.mp4.partial").touch()
    (target / "new.mp4").touch()
    assert check(target) == [
        "changed run/a.mp4",
        "missing run/film called.mp4",
        "extra new.mp4",
        "extra run/.a.mp4.partial",
    ]


# What a worker runs in place of `hdc.data.workers`: the same, but one file makes it misbehave.
MISBEHAVING = """
import os, signal, time
from hdc.data import workers
workers.SECONDS_PER_FRAME = 1
transcode = workers.transcode
def misbehave(path, short_side, on_frame):
    if "crash" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "killed" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in path.name:
        time.sleep(60)
    if "noise" in path.name:
        print("a library's debug output")
    return transcode(path, short_side, on_frame)
workers.transcode = misbehave
workers.serve()
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_crashing_and_hanging_decoders(
    processes: int, tmp_path: Path, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "crash", "killed", "b", "hang", "noise", "z crash"]
    lay(tmp_path / "source", {f"run/{name}.avi": "" for name in names})
    for path in (tmp_path / "source/run").iterdir():
        path.write_bytes(film)
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-P", "-c", MISBEHAVING])
    config = PrepareConfig(short_side=32, workers=processes)
    result = prepare("folder", tmp_path / "source", tmp_path / "target", config)
    assert result.manifest.path.tolist() == ["run/a.mp4", "run/b.mp4", "run/noise.mp4"]
    assert result.bad == {
        "run/crash.avi": "crashes the decoder (SIGSEGV)",
        "run/hang.avi": "hangs the decoder: no frame in 60 s",
        "run/killed.avi": "crashes the decoder (SIGKILL)",
        "run/z crash.avi": "crashes the decoder (SIGSEGV)",
    }


def test_workers_that_cannot_start_are_not_bad_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(InputError, match="a worker process ended with exit code 3"):
        prepare("folder", source, tmp_path / "target", TWO)
    assert not (tmp_path / "target/bad_files.csv").exists()


RUN = """
import sys
from pathlib import Path
from hdc.data.prepare import PrepareConfig, prepare
prepare("folder", Path(sys.argv[1]), Path(sys.argv[2]), PrepareConfig(short_side=32, workers=2))
"""


def test_killed_and_resumed(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """kill -9 again and again; in the end every byte is as without."""
    source, target = tmp_path / "source", tmp_path / "target"
    shape = {"width": 200, "height": 150}
    films = [
        write_video(tmp_path / f"{n}.avi", 2 * FRAMES + n, **shape).read_bytes() for n in range(4)
    ]
    lay(source, {f"{'ab'[number % 2]}/v ({number}).avi": "" for number in range(80)})
    for number, path in enumerate(sorted(source.rglob("*.avi"))):
        path.write_bytes(films[number % 4])
    (source / "a/empty.avi").touch()
    prepare("folder", source, tmp_path / "undisturbed", TWO)
    log = target / "prepare.jsonl"
    kills = 0
    for lines in (2, 9, 20):
        run = subprocess.Popen([sys.executable, "-P", "-c", RUN, str(source), str(target)])
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
        assert not (target / "manifest.csv").exists()
    assert kills == 3
    done = log.read_bytes().count(b"\n") - 1  # the first line has the settings
    assert done > 0
    with log.open("ab") as file:
        file.write(b'{"path": "a/v (0')  # the line that was being written
    steps = []
    result = prepare("folder", source, target, TWO, lambda *step: steps.append(step[0]))
    assert result.changed
    assert len(steps) <= 81 - done
    assert contents(target) == contents(tmp_path / "undisturbed")
    assert check(target) == []
    assert not prepare("folder", source, target, TWO).changed


def test_one_run_at_a_time(
    source: Path, tmp_path: Path, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdc.data.prepare.SECONDS_TO_WAIT", 0.2)
    target = tmp_path / "target"

    def second(done: int, total: int, bad: int) -> None:
        if done == 1:
            with pytest.raises(InputError, match=f"another .* is at work in {target}"):
                prepare("folder", source, target, TWO)

    prepare("folder", source, target, TWO, second)


def test_interrupted(source: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the workers; nothing is lost."""
    target = tmp_path / "target"

    def interrupt(done: int, total: int, bad: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("folder", source, target, TWO, interrupt)
    steps = []
    prepare("folder", source, target, TWO, lambda *step: steps.append(step[0]))
    assert steps == list(range(5, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "the following arguments are required: src, dst"),
        (["imagenet", "SOURCE", "TARGET"], "invalid choice: 'imagenet' (choose from 'kinetics400'"),
        (["folder", "SOURCE/none", "TARGET"], "none is no folder"),
        (["ucf101", "SOURCE", "TARGET"], "not laid out like UCF101"),
        (["hmdb51", "SOURCE", "TARGET"], "not laid out like HMDB51"),
        (["kinetics400", "SOURCE", "TARGET"], "no list of Kinetics-400"),
        (["folder", "EMPTY", "TARGET"], "holds no videos"),
        (["folder", "SOURCE", "SOURCE"], "must not lie inside each other"),
        (["folder", "SOURCE", "SOURCE/small"], "must not lie inside each other"),
        (["folder", "SOURCE/run", "SOURCE", "--no-transcode"], "must not lie inside each other"),
        (["folder", "SOURCE", "FILE"], "cannot write"),
        (["folder", "SOURCE", "TARGET", "--short_side=33"], "short_side is 33; it must be even"),
        (["folder", "SOURCE", "TARGET", "--workers=0"], "workers is 0; it must be at least 1"),
        (["folder", "SOURCE", "TARGET", "--fast"], "unrecognized arguments: --fast"),
        (["folder", "SOURCE", "TARGET", "--check"], "cannot read the manifest"),
        (["folder", "BAD", "TARGET"], "none of the 1 videos of"),
        (["folder", "SOURCE", "OTHERS"], "is not of hdc-train prepare; move it away"),
        (["folder", "SOURCE", "DAMAGED"], "prepare.jsonl is damaged; delete it"),
        (["folder", "SOURCE", "DONE"], "was prepared with short_side = 64, not 128"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"dataset": "folder", "no_transcode": False, "short_side": 64}
    files = {
        "others/manifest.csv": "path,frames\na.avi,3\n",
        "damaged/prepare.jsonl": "{}\n[]\n",
        "done/prepare.jsonl": json.dumps(settings) + "\n",
        "file": "",
        "bad/a.avi": "",
    }
    lay(tmp_path, files)
    (tmp_path / "empty").mkdir()
    for word in ("SOURCE", "TARGET", "EMPTY", "FILE", "BAD", "OTHERS", "DAMAGED", "DONE"):
        place = str(tmp_path / word.lower())
        arguments = [argument.replace(word, place) for argument in arguments]
    assert main(["prepare", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("hdc-train: ")
    assert message in shown


def test_full_disk_is_not_a_bad_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here, a file where a class folder should be written."""
    lay(tmp_path / "target", {"run": ""})
    assert main(["prepare", "folder", str(source), str(tmp_path / "target")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "target/bad_files.csv").exists()


def test_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepare, again, check, train, check what was changed."""
    target = tmp_path / "target"
    command = ["prepare", "folder", str(source), str(target), "--short_side=32"]
    assert main(command) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert (
        f"3 videos in {target}/manifest.csv; 0 missing and 6 bad, see {target}/bad_files" in shown
    )
    assert main(command) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert main([*command, "--check"]) == 0
    assert f"{target} is as its manifest says" in capsys.readouterr().out
    options = ["--backbone=tiny", "--clips.size=32", "--augment.crop_size=28", "--batch_size=3"]
    run = [f"--out={tmp_path / 'run'}", "--epochs=1", "--device=cpu", *options]
    assert main(["pretrain", f"--data={target}", *run]) == 0
    assert main(["finetune", f"--data={target}", *run[1:], f"--out={tmp_path / 'fine'}"]) == 0
    (target / "run/a.mp4").unlink()
    capsys.readouterr()
    assert main([*command, "--check"]) == 1
    assert "missing run/a.mp4" in capsys.readouterr().out.splitlines()


def test_half_prepared_folder_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(tmp_path, {"prepare.jsonl": "{}\n"})
    assert main(["pretrain", f"--data={tmp_path}", f"--out={tmp_path / 'run'}"]) == 2
    assert "is prepared only in part; run hdc-train prepare again" in capsys.readouterr().err
