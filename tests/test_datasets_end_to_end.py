"""Each dataset from its download to a report, by the command: what its lists say is what every number counts."""

import csv
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import downloads
import pytest
from downloads import Download

from hdc.cli import main
from hdc.data.manifest import read_manifest

TINY = ["--backbone=tiny", "--clips.size=20", "--clips.short_videos=loop", "--device=cpu"]
TRAIN = [*TINY, "--augment.crop_size=18", "--batch_size=4", "--epochs=1"]
MAKE = {
    "kinetics400": downloads.kinetics400,
    "ucf101": downloads.ucf101,
    "hmdb51": downloads.hmdb51,
}
# Good videos, of these to train and to test with in split 1, and the number of splits.
COUNTS = {"kinetics400": (12, 9, 3, 1), "ucf101": (15, 9, 6, 3), "hmdb51": (18, 9, 6, 3)}


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def small(path: str) -> str:
    """Where `prepare` writes a video."""
    return str(PurePosixPath(path).with_suffix(".mp4"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", MAKE)
def test_from_download_to_report(
    name: str,
    tmp_path: Path,
    write_video: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    download: Download = MAKE[name](tmp_path / "download", write_video)
    data, out = tmp_path / "data" / name, tmp_path / "runs"
    run("prepare", name, download.root, data, "--short_side=32", "--workers=1")
    run("prepare", name, download.root, data, "--short_side=32", "--check")

    good, train, test, splits = COUNTS[name]
    manifest = read_manifest(data / "manifest.csv")
    found = dict(zip(manifest.path.tolist(), manifest.frames.tolist(), strict=True))
    assert found == {small(path): frames for path, frames in download.frames.items()}
    assert len(found) == good
    assert [len(manifest.rows(part, 1)) for part in ("train", "test")] == [train, test]
    assert [c for c in manifest.columns if c.startswith("split")] == [
        f"split{number}" for number in range(1, splits + 1)
    ]
    for split, parts in download.parts.items():
        for part, paths in parts.items():
            rows = manifest.rows(part, int(split[-1]))  # type: ignore[arg-type]
            assert set(rows.path) == set(map(small, paths))
    with (data / "bad_files.csv").open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == download.bad.keys()
    assert all(reason in reasons[path] for path, reason in download.bad.items())

    given = f"--data={data}"
    pretrained = out / "pretrain"
    run("pretrain", given, f"--out={pretrained}", "--log_every=1", *TRAIN)
    steps = [json.loads(line)["step"] for line in (pretrained / "metrics.jsonl").open()]
    assert steps == list(range(train // 4))
    weights = f"--checkpoint={pretrained}"
    split = splits  # the last
    clips, queries, gallery = 0, set(), set()
    for path, frames in download.frames.items():
        if path in download.parts[f"split{split}"]["test"]:
            queries.add(small(path))
            clips += -(-frames // 16)
        elif path in download.parts[f"split{split}"]["train"]:
            gallery.add(small(path))
    tuned = out / "finetune"
    run("finetune", given, weights, f"--out={tuned}", f"--split={split}", *TRAIN)
    evaluate = [given, f"--split={split}", "--crop_size=18", *TINY]
    run("test", *evaluate, f"--checkpoint={tuned}", f"--out={tuned}")
    tested = read(tuned / "test.json")
    assert (tested["videos"], tested["clips"]) == (len(queries), clips)
    assert {entry["path"] for entry in tested["predictions"]} == queries
    classes = {PurePosixPath(path).parent.name for path in queries}
    assert {entry["class"] for entry in tested["predictions"]} == classes
    run("retrieve", *evaluate, weights, f"--out={pretrained}")
    retrieved = read(pretrained / "retrieval.json")
    assert (retrieved["queries"], retrieved["gallery"]) == (len(queries), len(gallery))
    assert {entry["query"] for entry in retrieved["nearest"]} == queries
    assert {entry["neighbor"] for entry in retrieved["nearest"]} <= gallery
    assert retrieved["accuracy"]["top50"] == 1  # of fewer than 50

    capsys.readouterr()
    run("report", out)
    assert "report.html" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    for path, reason in reasons.items():
        assert escaped(path) in page
        assert escaped(reason) in page
    assert (
        f"{100 * tested['video_accuracy']:.1f} % of {len(queries)} test videos recognised" in page
    )
    assert "No clips are shown" not in page


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#x27;")
