"""The page about a run: everything that the run holds, escaped, with its own numbers, and nothing from outside."""

import base64
import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from hdc import environment
from hdc.cli import main
from hdc.data.manifest import read_manifest
from hdc.data.synthetic import make_dataset
from hdc.data.video import read_clips
from hdc.report.confusion import draw_confusion
from hdc.report.curves import MOST_POINTS, draw_curves, round_numbers
from hdc.report.html import element
from hdc.report.retrievals import SIDE, encode_clip

TINY = ["--backbone=tiny", "--clips.size=32", "--device=cpu"]
TRAIN = [*TINY, "--augment.crop_size=28", "--batch_size=4", "--epochs=2", "--log_every=1"]
HOSTILE = 'Up & <img src=x onerror="alert(1)">'  # a class name


class Page(HTMLParser):
    """Sections with their tables, titles and texts; every element must be closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, Section] = {}
        self.section = Section()
        self.attributes: list[tuple[str, str, str]] = []  # element, name, value
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "section":
            self.section = self.sections[given["id"]] = Section()
        elif tag == "table":
            self.section.tables.append([])
        elif tag == "tr":
            self.section.tables[-1].append([])
        elif tag in ("td", "th"):
            self.section.tables[-1][-1].append("")
            self.section.exact[len(self.section.tables) - 1, self.here()] = given.get("title", "")
        elif tag == "video":
            self.section.videos.append(given["src"])
        elif tag == "figure" and given.get("class", "").startswith("clip"):
            self.section.clips.append(given["class"].removeprefix("clip").strip())

    def here(self) -> tuple[int, int]:
        """Row and column of the cell being read."""
        rows = self.section.tables[-1]
        return len(rows) - 1, len(rows[-1]) - 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = Section()

    def handle_data(self, data: str) -> None:
        self.section.text += data
        if self.open and self.open[-1] == "title":
            self.section.titles.append(data)
        elif "td" in self.open or "th" in self.open:
            self.section.tables[-1][-1][-1] += data


class Section:
    """exact: the title of a cell, by (table, (row, column))."""

    def __init__(self) -> None:
        self.text = ""
        self.titles: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.exact: dict[tuple[int, tuple[int, int]], str] = {}
        self.videos: list[str] = []
        self.clips: list[str] = []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training videos, one of them cut short, and five test videos; a class has a name that bites."""
    root = tmp_path_factory.mktemp("videos")
    make_dataset(root, train=10, test=5, seed=0)
    manifest = read_manifest(root / "manifest.csv")
    labels = manifest.columns["label"]
    manifest.columns["label"] = np.array(
        [HOSTILE if name == "Up" else str(name) for name in labels]
    )
    manifest.write()
    row = int(np.flatnonzero(manifest.columns["split1"] == "train")[0])
    manifest.file(row).write_bytes(manifest.file(row).read_bytes()[:300])
    (root / "bad_files.csv").write_text('path,reason\n"<i>a</i>, b.avi",holds no frames\n')
    return root


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every command's output, each in a folder of its own."""
    root = tmp_path_factory.mktemp("runs")
    source = f"--data={data}"
    pretrained, finetuned = f"{root}/pre/checkpoint.pt", f"{root}/fine/checkpoint.pt"
    for command in (
        ["pretrain", f"--out={root}/pre", *TRAIN],
        ["finetune", f"--out={root}/fine", f"--checkpoint={pretrained}", *TRAIN],
        ["test", f"--out={root}/fine", f"--checkpoint={finetuned}", "--crop_size=28", *TINY],
        ["retrieve", f"--out={root}/HDC", f"--checkpoint={pretrained}", "--crop_size=28", *TINY],
        ["retrieve", f"--out={root}/random", "--crop_size=28", *TINY],
        ["probe", f"--out={root}/HDC", f"--checkpoint={pretrained}", "--crop_size=28", *TINY],
    ):
        assert main([*command, source]) == 0
    return root


@pytest.fixture(scope="module")
def text(runs: Path) -> str:
    assert main(["report", str(runs)]) == 0
    return (runs / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def rows(table: list[list[str]]) -> dict[str, list[str]]:
    return {head: cells for head, *cells in table}


def test_every_section_is_there(page: Page) -> None:
    assert list(page.sections) == [
        "results",
        "retrieval",
        "confusion",
        "training",
        "configuration",
        "left-out",
        "environment",
    ]
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{name}" for name in page.sections]
    assert "torch" in page.sections["environment"].text
    assert rows(page.sections["configuration"].tables[1])["clips.size"] == ["32"]


def test_nothing_is_fetched(text: str, page: Page) -> None:
    for _, name, value in page.attributes:
        if name in ("src", "href", "poster", "srcset", "action", "data"):
            assert value.startswith(("data:", "#"))
    without_clips = re.sub(r"data:video/mp4;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|url\(|@import|fetch|<link|<iframe", without_clips)
    assert "default-src 'none'" in text


def test_names_are_escaped(text: str, page: Page) -> None:
    assert HOSTILE not in text
    assert "<img" not in text
    assert "<i>" not in text
    assert HOSTILE in page.sections["confusion"].text
    assert HOSTILE in page.sections["retrieval"].text
    assert rows(page.sections["left-out"].tables[1])["<i>a</i>, b.avi"] == ["holds no frames"]


def test_numbers_are_those_of_the_files(runs: Path, page: Page) -> None:
    results = page.sections["results"]
    tested, retrieved, probed, voted, logged = (rows(table) for table in results.tables)
    found = {
        name: json.loads((runs / file).read_text())
        for name, file in (
            ("test", "fine/test.json"),
            ("HDC", "HDC/retrieval.json"),
            ("random", "random/retrieval.json"),
            ("probe", "HDC/probe.json"),
            ("knn", "HDC/knn.json"),
        )
    }
    assert tested["fine"][0] == f"{100 * found['test']['video_accuracy']:.1f}"
    assert tested["fine"][2:4] == ["5", "30"]
    assert probed["HDC"][1] == f"{100 * found['probe']['test_accuracy']:.1f}"
    assert voted["HDC"][1:4] == [
        "9",  # one of the ten training videos is cut short
        *(f"{100 * found['knn'][name]:.1f}" for name in ("weighted", "majority")),
    ]
    for name in ("HDC", "random"):
        shares = found[name]["accuracy"].values()
        assert retrieved[name][1:6] == [f"{100 * share:.1f}" for share in shares]
    assert logged[""] == ["fine", "pre"]
    for column, run in enumerate(logged[""], start=1):
        lines = (runs / run / "metrics.jsonl").read_text().splitlines()
        last = [line for line in map(json.loads, lines) if "loss" in line][-1]
        for row, (name, cells) in enumerate(logged.items()):
            value = last.get(name.replace(" ", "_"))
            if value is not None:
                assert float(results.exact[4, (row, column)]) == value
                assert float(cells[column - 1]) == pytest.approx(value, rel=1e-3)
            elif name:
                assert cells[column - 1] == ""


def test_curves_show_every_logged_value(runs: Path, page: Page) -> None:
    lines = [json.loads(line) for line in (runs / "pre/metrics.jsonl").read_text().splitlines()]
    shown = page.sections["training"].titles
    for line in lines:
        if "loss" in line:
            assert f"step {line['step']}\nloss: {line['loss']:.4g}" in shown
            scales = [f"SC block {k}: {100 * line[f'spatial{k}_accuracy']:.4g}" for k in (3, 4, 5)]
            assert any("\n".join(scales) in title for title in shown)


def test_clips_play_and_are_framed(runs: Path, data: Path, page: Page) -> None:
    retrieval = page.sections["retrieval"]
    found = {
        name: json.loads((runs / name / "retrieval.json").read_text())["nearest"]
        for name in ("HDC", "random")
    }
    manifest = read_manifest(data / "manifest.csv")
    label = dict(zip(manifest.path.tolist(), manifest.columns["label"].tolist(), strict=True))
    expected = []
    for pairs in zip(*found.values(), strict=True):
        right = [label[pair["query"]] == label[pair["neighbor"]] for pair in pairs]
        expected += ["", *("hit" if hit else "miss" for hit in right)]
    assert retrieval.clips == expected
    assert retrieval.tables[0][0] == ["query", "HDC", "random"]

    file = io.BytesIO(base64.b64decode(retrieval.videos[0].removeprefix("data:video/mp4;base64,")))
    with av.open(file) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    path = data / found["HDC"][0]["query"]
    expected_frames = read_clips(path, [(96 - 16) // 2], 16, SIDE)[0]
    assert np.abs(np.stack(frames).astype(float) - expected_frames).mean() < 12


def test_clip_with_odd_sides() -> None:
    frames = np.zeros((3, 17, 23, 3), dtype=np.uint8)
    with av.open(io.BytesIO(encode_clip(frames))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (22, 16, 3)


def test_confusion_sums(runs: Path, page: Page) -> None:
    """Counts add up to the videos, the diagonal to those recognised, every row to its class."""
    tested = json.loads((runs / "fine/test.json").read_text())
    cells = [
        re.fullmatch(r"(.+) → (.+): (\d+) of (\d+) \(\d+%\)", title)
        for title in page.sections["confusion"].titles
    ]
    counts = [(cell[1], cell[2], int(cell[3]), int(cell[4])) for cell in cells if cell]
    assert len(counts) == len(cells)
    assert sum(count for _, _, count, _ in counts) == tested["videos"]
    right = sum(count for true, taken, count, _ in counts if true == taken)
    assert right == tested["video_accuracy"] * tested["videos"]
    for name, total in {(true, total) for true, _, _, total in counts}:
        assert sum(count for true, _, count, _ in counts if true == name) == total


def test_large_confusion_has_no_numbers_in_cells() -> None:
    predictions = [{"class": f"c{i}", "predicted": f"c{i * 7 % 40}"} for i in range(40)]
    drawn = draw_confusion(predictions)
    assert drawn.count("<title>") == 40
    assert drawn.count('class="right"') == 2  # 7 i and i differ by a multiple of 40 for 0 and 20
    assert drawn.count('class="wrong"') == 38
    assert 'class="count' not in drawn
    assert drawn.count("<tr>") == 1 + 10


def test_environment_is_that_of_the_runs(runs: Path, tmp_path: Path) -> None:
    """One that was resumed elsewhere has a column for each; the reader's own machine is not shown."""
    folder = tmp_path / "moved"
    shutil.copytree(runs / "pre", folder)
    (start,) = environment.read(folder)
    assert start["first_step"] == 0
    assert start["environment"]["torch"] == torch.__version__
    assert start["environment"]["device"] == "cpu"
    later = {"first_step": 3, "environment": {**start["environment"], "torch": "0.1"}}
    (folder / "environment.json").write_text(json.dumps({"starts": [start, later]}))
    out = tmp_path / "page.html"
    assert main(["report", str(folder), f"--out={out}"]) == 0
    table = rows(Page(out.read_text(encoding="utf-8")).sections["environment"].tables[0])
    assert table[""] == ["moved: training", "moved: training, from step 3"]
    assert table["torch"] == [torch.__version__, "0.1"]
    (folder / "environment.json").unlink()
    assert main(["report", str(folder), f"--out={out}"]) == 0
    section = Page(out.read_text(encoding="utf-8")).sections["environment"]
    assert section.tables == []
    assert "store no environment" in section.text


def test_retrievals_from_two_manifests_are_two_grids(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "HDC", tmp_path / "first")
    shutil.copytree(runs / "random", tmp_path / "second")
    other = tmp_path / "copy.csv"
    other.write_text((data / "manifest.csv").read_text().replace("UCF-101", f"{data}/UCF-101"))
    options = [f"--data={other}", f"--out={tmp_path}/second", "--crop_size=28", *TINY]
    assert main(["retrieve", *options]) == 0
    assert main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    grids = page.sections["retrieval"].tables
    assert [grid[0] for grid in grids] == [["query", "first"], ["query", "second"]]
    assert len(page.sections["retrieval"].videos) == 2 * 2 * 5


def test_skipped_videos_are_named(page: Page) -> None:
    (_, *skipped), bad = page.sections["left-out"].tables
    assert {run for _, _, run in skipped} == {"fine", "pre", "HDC", "random"}
    assert all("v_Down" in path for path, _, _ in skipped)
    assert bad[0] == ["file", "reason"]


def test_one_run_gets_only_its_sections(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["report", f"{runs}/pre", f"--out={out}"]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert list(page.sections) == [
        "results",
        "training",
        "configuration",
        "left-out",
        "environment",
    ]
    assert page.sections["results"].tables[0][0] == ["", "pre"]


def test_a_manifest_that_does_not_fit_is_said(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the manifest there are no clips, but everything else."""
    out = tmp_path / "page.html"
    other = f"--data={data / 'takes.csv'}"
    assert main(["report", str(runs), f"--out={out}", other]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.sections["retrieval"].videos == []
    assert "No clips are shown: " in page.sections["retrieval"].text
    assert "has no column 'label'" in page.sections["retrieval"].text
    assert main(["report", str(runs), "--data=nowhere.csv"]) == 2
    assert "cannot read the manifest nowhere.csv" in capsys.readouterr().err


def test_long_logs_are_averaged() -> None:
    lines = [{"step": step, "loss": float(step % 2), "lr": math.nan} for step in range(1000)]
    drawn = draw_curves(lines)
    assert "mean of 7 logged steps" in drawn
    assert 1000 / 7 <= drawn.count("<title>") <= MOST_POINTS
    assert "steps 7 to 13, mean\nloss: 0.5714" in drawn
    assert "Learning rate" not in drawn  # not one value of it is a number
    assert "nan" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 100.0, [0, 20, 40, 60, 80, 100]), (1.0, 1.0, [0.95, 1.0, 1.05])],
)
def test_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(expected)


def test_element() -> None:
    made = element("p", "a<b", element("i", 3), class_="x", aria_label='"')
    assert made == '<p class="x" aria-label="&quot;">a&lt;b<i>3</i></p>'


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "is no run: neither it nor a folder in it has metrics.jsonl, config.yaml"),
        ({"test.json": "{"}, [], "test.json"),
        ({"sub/probe.json": "[]"}, [], "probe.json was not written by hdc-train"),
        ({"config.yaml": "a: ["}, [], "config.yaml"),
        ({"config.yaml": "- 1"}, [], "config.yaml was not written by hdc-train"),
        ({"config.yaml": "seed: 1"}, ["--out=RUN"], "is a folder; out must name a file"),
        ({"config.yaml": "seed: 1"}, ["--out=RUN/config.yaml/x"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    files: dict[str, str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    arguments = [argument.replace("RUN", str(tmp_path)) for argument in arguments]
    assert main(["report", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("hdc-train: ")
    assert message in error
    assert not (tmp_path / "report.html").exists()


def test_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """Windows and macOS refuse such a name; where it can be, the page shows its bytes."""
    folder = tmp_path / os.fsdecode(b"run[\xff]")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (folder / "config.yaml").write_text("seed: 1")
    assert main(["report", str(folder), f"--out={tmp_path / 'page.html'}"]) == 0
    assert "Report of run[\\udcff]" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"hdc-train: there is no folder {tmp_path / 'nowhere'}\n"
