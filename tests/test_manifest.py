"""The list of videos: what is written is read, and every mistake in it is named with its place."""

from pathlib import Path

import numpy as np
import pytest

from hdc.data.manifest import Manifest, read_manifest
from hdc.errors import InputError

TEXT = """path,start,frames,label,split1,split2
videos/a.avi,0,40,Run,train,test
videos/b.avi,5,16,Jump,test,train
videos/c.avi,0,20,Run,train,
"""


def store(folder: Path, text: str = TEXT) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text.encode())
    return path


def values(manifest: Manifest) -> dict[str, list[object]]:
    columns = {"path": manifest.path, "start": manifest.start, "frames": manifest.frames}
    return {name: array.tolist() for name, array in (columns | manifest.columns).items()}


def test_read(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    assert values(manifest) == {
        "path": ["videos/a.avi", "videos/b.avi", "videos/c.avi"],
        "start": [0, 5, 0],
        "frames": [40, 16, 20],
        "label": ["Run", "Jump", "Run"],
        "split1": ["train", "test", "train"],
        "split2": ["test", "train", ""],
    }
    assert len(manifest) == 3
    assert manifest.file(1) == tmp_path / "videos/b.avi"


def test_absolute_paths(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path, "path,frames\n/data/a.avi,40\n"))
    assert manifest.file(0) == Path("/data/a.avi")
    assert manifest.start.tolist() == [0]


@pytest.mark.parametrize(
    "text", [TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT, TEXT.replace("\n", "\n\n")]
)
def test_files_from_other_programs(text: str, tmp_path: Path) -> None:
    """CRLF ends, a byte order mark and empty lines change nothing."""
    (tmp_path / "other").mkdir()
    expected = values(read_manifest(store(tmp_path / "other")))
    assert values(read_manifest(store(tmp_path, text))) == expected


def test_round_trip(tmp_path: Path) -> None:
    names = ["a b/v_(1).avi", 'comma, quote ".avi', "größe/Ω.avi", "line\nbreak.avi", " lead.avi"]
    manifest = Manifest(
        tmp_path / "new folder" / "manifest.csv",
        np.array(names),
        np.array([0, 1, 2, 3, 4]),
        np.array([16, 17, 18, 19, 2**40]),
        {"label": np.array(["x, y", "z", "", "u v", "w"]), "split1": np.array(["train"] * 5)},
    )
    manifest.write()
    copy = read_manifest(manifest.source)
    assert values(copy) == values(manifest)
    assert copy.frames.dtype == np.int64
    assert list(manifest.source.parent.iterdir()) == [manifest.source]


def test_digest_changes_with_what_is_trained_on(tmp_path: Path) -> None:
    """And with nothing else: neither other rows nor other columns, nor where the manifest lies."""

    def digest(text: str, *columns: str) -> str:
        return read_manifest(store(tmp_path, text)).rows("train", 1).digest(*columns)

    same = (TEXT, TEXT.replace("b.avi,5", "b.avi,6"), TEXT.replace("Run,", "Walk,"))
    assert len({digest(text) for text in same}) == 1
    assert len({digest(text, "label") for text in same}) == 2
    lines = TEXT.splitlines(keepends=True)
    other = (
        TEXT.replace("a.avi,0,40", "a.avi,0,41"),
        TEXT.replace("a.avi,0", "a.avi,1"),
        TEXT.replace("c.avi", "d.avi"),
        TEXT.replace("b.avi,5,16,Jump,test", "b.avi,5,16,Jump,train"),
        "".join([lines[0], *reversed(lines[1:])]),
    )
    assert len({digest(text) for text in (TEXT, *other)}) == 6


def test_rows_of_a_split(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    train = manifest.rows("train", 1)
    assert values(train)["path"] == ["videos/a.avi", "videos/c.avi"]
    assert train.columns["label"].tolist() == ["Run", "Run"]
    assert train.frames.tolist() == [40, 20]
    assert train.file(1) == tmp_path / "videos/c.avi"
    assert values(manifest.rows("train", 2))["start"] == [5]


def test_labels_count_from_zero_in_the_order_of_names(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    assert manifest.labels("label").names == ("Jump", "Run")
    assert manifest.labels("label").ids.tolist() == [1, 0, 1]
    # A part of the manifest keeps the numbers of the whole.
    names = ("Walk", "Run", "Jump")
    assert manifest.rows("train", 1).labels("label", names).ids.tolist() == [1, 1]
    assert manifest.labels("label", names).ids.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path'"),
        ("file,frames\na,1\n", "no column 'path'"),
        ("path,label\na,b\n", "no column 'frames'"),
        ("path,frames\n", "lists no videos"),
        ("path,frames\na.avi,16\nb.avi,many\n", "line 3: frames is 'many'"),
        ("path,frames\na.avi,16\n\n\nb.avi,1.5\n", "line 5: frames is '1.5'"),
        ('path,frames\n"a\nb.avi",16\nb.avi,x\n', "line 4: frames is 'x'"),
        ("path,frames\na.avi,0\n", "line 2: frames is '0'.*at least 1"),
        ("path,frames\na.avi,-3\n", "line 2: frames is '-3'"),
        ("path,frames\na.avi,\n", "line 2: frames is ''"),
        ("path,frames\na.avi\n", "line 2: frames is None"),
        (f"path,frames\na.avi,{10**19}\n", "line 2: frames is '1.*at most 18 digits"),
        (f"path,frames\na.avi,{'9' * 5000}\n", "line 2: frames is '9.*at most 18 digits"),
        ("label,frames,path\nRun,16\n", "line 2: path is empty"),
        ("path,frames\na.avi,16\n,16\n", "line 3: path is empty"),
        ("path,start,frames\na.avi,-1,16\n", "line 2: start is '-1'.*at least 0"),
        ("path,start,frames\na, b.avi,0,16\n", "line 2: start is ' b.avi'"),
    ],
)
def test_unreadable_text(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"manifest\.csv.*{message}"):
        read_manifest(store(tmp_path, text))


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the manifest .*none\.csv: no such file"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match=r"cannot read the manifest .*null byte"):
        read_manifest(Path("a\0.csv"))
    (tmp_path / "binary.csv").write_bytes(b"path,frames\n\xff\xfe\x00,1\n")
    with pytest.raises(InputError, match=r"cannot read the manifest .*binary\.csv"):
        read_manifest(tmp_path / "binary.csv")


def test_unknown_split_or_empty_part(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    with pytest.raises(InputError, match="no column split3; it has split1, split2"):
        manifest.rows("train", 3)
    with pytest.raises(InputError, match=r"no column split1; it has no splits$"):
        read_manifest(store(tmp_path, "path,frames\na.avi,16\n")).rows("train", 1)
    with pytest.raises(InputError, match="split 1 has no test videos"):
        manifest.take(np.array([0, 2])).rows("test", 1)


def test_unusable_labels(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path, TEXT.replace("20,Run", "20,")))
    with pytest.raises(InputError, match=r"videos/c\.avi has an empty 'label'"):
        manifest.labels("label")
    with pytest.raises(InputError, match="no column 'motion'; it has label"):
        manifest.labels("motion")
    with pytest.raises(InputError, match="Jump not among the known classes"):
        read_manifest(store(tmp_path)).labels("label", ("Run",))


def test_columns_of_the_file_are_no_labels(tmp_path: Path) -> None:
    text = "path,frames,label,split1,fps,width,height,sha256\na.mp4,40,Run,train,25,170,128,00ff\n"
    manifest = read_manifest(store(tmp_path, text))
    assert manifest.columns["fps"].tolist() == ["25"]
    assert manifest.text() == text.replace("path,", "path,start,").replace("a.mp4,", "a.mp4,0,")
    with pytest.raises(InputError, match=r"no column 'motion'; it has label$"):
        manifest.labels("motion")


def test_missing_videos_are_counted_and_named(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/b.avi").touch()
    with pytest.raises(InputError, match=r"2 missing videos: videos/a\.avi, videos/c\.avi"):
        manifest.check_files()
    (tmp_path / "videos/a.avi").touch()
    with pytest.raises(InputError, match=r"1 missing video: videos/c\.avi"):
        manifest.check_files()
    (tmp_path / "videos/c.avi").touch()
    manifest.check_files()


def test_short_videos(tmp_path: Path) -> None:
    manifest = read_manifest(store(tmp_path))
    manifest.check_length(16)
    with pytest.raises(InputError, match=r"1 shorter .* 17 frames: videos/b\.avi \(16 frames\)"):
        manifest.check_length(17)
