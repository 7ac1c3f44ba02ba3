"""Small copies of the published datasets, as they come: names, folders, lists, codes, line ends, bad files.

Every video is a real one in the codec of its dataset. Each copy says what should come of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

WriteVideo = Callable[..., Path]
TEXT = b"<html>This video is not available</html>\n" * 9


@dataclass
class Download:
    """A copy below `root`.

    frames: the good videos by their paths below it, with their numbers of frames.
    parts: "split1" → "train" or "test" → the good videos there.
    bad: the other videos that its lists name, and a part of the reason.
    """

    root: Path
    frames: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, frames: int, parts: dict[str, str]) -> None:
        self.frames[path] = frames
        for split, part in parts.items():
            self.parts.setdefault(split, {"train": set(), "test": set()})[part].add(path)


def lay(root: Path, files: dict[str, str]) -> Path:
    """Write texts below `root`, their line ends as they are."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def audio(path: Path) -> None:
    """A file with sound and no picture."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def ucf101(root: Path, write_video: WriteVideo) -> Download:
    """Three classes of three groups of two clips; split n tests on group n. CRLF; a class is spelled in two ways.

    Of the 18 videos one is missing, one is empty and one is cut short.
    """
    found = Download(root)
    spelled = {
        "ApplyEyeMakeup": "ApplyEyeMakeup",
        "HandstandPushups": "HandStandPushups",
        "YoYo": "YoYo",
    }
    lists = {f"{kind}list0{split}.txt": "" for split in (1, 2, 3) for kind in ("train", "test")}
    for number, (folder, name) in enumerate(spelled.items(), start=1):
        for group in (1, 2, 3):
            for clip in (1, 2):
                video = f"v_{name}_g{group:02}_c{clip:02}.avi"
                path = f"UCF-101/{folder}/{video}"
                for split in (1, 2, 3):
                    if split == group:
                        lists[f"testlist0{split}.txt"] += f"{folder}/{video}\r\n"
                    else:
                        lists[f"trainlist0{split}.txt"] += f"{folder}/{video} {number}\r\n"
                if (group, clip) == (3, 2):
                    found.bad[path] = ("is missing", "of 29 frames", "is empty")[number - 1]
                else:
                    parts = {f"split{n}": "test" if n == group else "train" for n in (1, 2, 3)}
                    found.add(path, 28 + number + group, parts)
                if (number, group, clip) != (1, 3, 2):
                    frames = found.frames.get(path, 29)
                    write_video(root / path, frames, width=40, height=32, b_frames=2)
    cut = root / "UCF-101/HandstandPushups/v_HandStandPushups_g03_c02.avi"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 4 // 5])
    (root / "UCF-101/YoYo/v_YoYo_g03_c02.avi").write_bytes(b"")
    names = "".join(f"{number} {name}\r\n" for number, name in enumerate(spelled, start=1))
    # One list has the files' spelling for the folder, too.
    lists["trainlist01.txt"] = lists["trainlist01.txt"].replace("HandstandP", "HandStandP")
    files = {f"ucfTrainTestlist/{name}": text for name, text in lists.items()}
    lay(root, {**files, "ucfTrainTestlist/classInd.txt": names, "UCF-101/YoYo/Thumbs.db": "x"})
    return found


def hmdb51(root: Path, write_video: WriteVideo) -> Download:
    """Three classes of seven videos: in each split three train, two test, one is unused, and one is bad.

    Names with parentheses, brackets and spaces; lines that end with a space.
    """
    found = Download(root)
    stems = {
        "brush_hair": "#122_Cleaning_Up_The_Beach_(_Nov_2_2008)_brush_hair_u_nm_np2_ba_goo_",
        "shoot_bow": "6 Arrows Within 30 Seconds_shoot_bow_f_nm_np1_fr_med_",
        "wave": "[HD]_50_FIRST_DATES_wave_f_cm_np1_fr_med_",
    }
    lists: dict[str, str] = {}
    for number, (name, stem) in enumerate(stems.items()):
        for video in range(7):
            path = f"hmdb51_org/{name}/{stem}{video}.avi"
            codes = {
                split: "0" if video == 5 else "12"[(video + split) % 5 < 2] for split in (1, 2, 3)
            }
            for split, code in codes.items():
                file = f"testTrainMulti_7030_splits/{name}_test_split{split}.txt"
                lists[file] = lists.get(file, "") + f"{stem}{video}.avi {code} \n"
            if video == 6:
                found.bad[path] = ("is missing", "holds a single frame", "invalid data")[number]
                continue
            parts = {
                f"split{n}": {"1": "train", "2": "test"}[c] for n, c in codes.items() if c != "0"
            }
            found.add(path, 19 + 7 * number + video, parts)
            write_video(root / path, found.frames[path], width=42, height=32)
    lay(root, {**lists, "testTrainMulti_7030_splits/readme.txt": "splits\n"})
    write_video(root / f"hmdb51_org/shoot_bow/{stems['shoot_bow']}6.avi", 1, width=42, height=32)
    (root / f"hmdb51_org/wave/{stems['wave']}6.avi").write_bytes(TEXT)
    write_video(root / "hmdb51_org/wave/unlisted.avi", 20, width=42, height=32)
    return found


def kinetics400(root: Path, write_video: WriteVideo) -> Download:
    """Three classes of three videos to train with and one to validate, as H.264; the test list has no labels.

    Class names with spaces, commas and apostrophes, ids that begin with a dash; two videos are missing, one is
    sound alone, one is a web page; one is shorter than a clip.
    """
    found = Download(root)
    names = ("abseiling", "massaging person's head", "sword fighting, fencing")
    header = "label,youtube_id,time_start,time_end,split\r\n"
    lists = {"train": header, "val": header}
    for number, name in enumerate(names):
        for video in range(5):
            part = "val" if video == 4 else "train"
            start = 95 * video
            clip = f"{'-_aB'[video % 4]}{number}x-YZ_{video}0Qw"
            lists[part] += f'"{name}",{clip},{start},{start + 10},{part}\r\n'
            path = f"{part}/{name}/{clip}_{start:06}_{start + 10:06}.mp4"
            if video == 3:
                found.bad[path] = ("is missing", "holds no video stream", "invalid data")[number]
                continue
            frames = 12 if (number, video) == (0, 0) else 20 + 15 * number + video
            found.add(path, frames, {"split1": {"train": "train", "val": "test"}[part]})
            write_video(root / path, frames, codec="libx264", b_frames=2, width=48, height=36)
    sound, page = (root / path for path in list(found.bad)[1:])
    audio(sound)
    page.write_bytes(TEXT)
    gone = "val/abseiling/gone--11-id_000007_000017.mp4"
    found.bad[gone] = "is missing"
    lists["val"] += "abseiling,gone--11-id,7,17,val\r\n"
    unlabelled = "youtube_id,time_start,time_end,split\r\nNoLabelHere,0,10,test\r\n"
    files = {f"annotations/{part}.csv": text for part, text in lists.items()}
    lay(root, {**files, "annotations/test.csv": unlabelled, "train/abseiling/.DS_Store": "x"})
    return found
