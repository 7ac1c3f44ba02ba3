"""Miniatures of every dataset as it is published: what the lists name is found, whatever its spelling."""

from pathlib import Path

import pytest
from downloads import lay

from hdc.data.hmdb51 import list_hmdb51
from hdc.data.kinetics400 import list_kinetics400
from hdc.data.listing import Listed
from hdc.data.ucf101 import list_ucf101
from hdc.data.video_folder import list_video_folder
from hdc.errors import InputError

UCF101 = {
    "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n",
    "ucfTrainTestlist/trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
    "HandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n",
    "ucfTrainTestlist/testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n"
    "HandStandPushups/v_HandStandPushups_g01_c01.avi\r\n",
    "ucfTrainTestlist/trainlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\r\n",
    "ucfTrainTestlist/testlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\r\n",
    "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": "",
    "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi": "",
    "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi": "",
}


def test_ucf101(tmp_path: Path) -> None:
    """Case differs in folder and file; one video of four is not there."""
    makeup, pushups = "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup", "UCF-101/HandstandPushups/v_Hand"
    assert list_ucf101(lay(tmp_path, UCF101)) == [
        Listed(
            f"{makeup}_g01_c01.avi", "ApplyEyeMakeup", {"split1": "test", "split2": "train"}, True
        ),
        Listed(f"{makeup}_g08_c01.avi", "ApplyEyeMakeup", {"split1": "train", "split2": "test"}),
        Listed(f"{pushups}StandPushups_g08_c01.avi", "HandstandPushups", {"split1": "train"}),
        Listed(f"{pushups}standPushups_g01_c01.avi", "HandstandPushups", {"split1": "test"}),
    ]


AWKWARD = "#122_Cleaning_Up_The_Beach_(_Nov_2_2008)_brush_hair_u_nm_np2_ba_goo_0.avi"
HMDB51 = {
    "testTrainMulti_7030_splits/brush_hair_test_split1.txt": f"{AWKWARD} 1 \r\nb hair (1).avi 2 \r\n",
    "testTrainMulti_7030_splits/brush_hair_test_split2.txt": f"{AWKWARD} 0 \r\nb hair (1).avi 1 \r\n",
    "testTrainMulti_7030_splits/brush_hair_test_split3.txt": f"{AWKWARD} 0 \r\nb hair (1).avi 0 \r\n",
    "testTrainMulti_7030_splits/wave_test_split1.txt": "gone.avi 0 \n",
    "testTrainMulti_7030_splits/readme.txt": "not a split file\n",
    f"VIDEOS/brush_hair/{AWKWARD}": "",
    "VIDEOS/brush_hair/b hair (1).avi": "",
    "VIDEOS/brush_hair/unlisted.avi": "",
    "VIDEOS/Wave/other.avi": "",
}


@pytest.mark.parametrize("videos", ["", "hmdb51_org/"])
def test_hmdb51(videos: str, tmp_path: Path) -> None:
    lay(tmp_path, {name.replace("VIDEOS/", videos): text for name, text in HMDB51.items()})
    assert list_hmdb51(tmp_path) == [
        Listed(f"{videos}Wave/gone.avi", "Wave", {}, True),
        Listed(f"{videos}brush_hair/{AWKWARD}", "brush_hair", {"split1": "train"}),
        Listed(
            f"{videos}brush_hair/b hair (1).avi",
            "brush_hair",
            {"split1": "test", "split2": "train"},
        ),
    ]


def test_a_list_that_is_no_utf8_further_down(tmp_path: Path) -> None:
    """Its head can be read, so it counts as a list."""
    rows = "".join(f"run,x{i},0,10\n" for i in range(1000)).encode()
    (tmp_path / "train.csv").write_bytes(
        b"label,youtube_id,time_start,time_end\n" + rows + b"ru\xff,x,0,10\n"
    )
    with pytest.raises(InputError, match=r"cannot read .*train\.csv: it is not UTF-8"):
        list_kinetics400(tmp_path)


KINETICS = {
    "annotations/train.csv": "\ufefflabel,youtube_id,time_start,time_end,split\r\n"
    "playing squash or racquetball,-0_aB3cdEfg,1,11,train\r\n"
    '"massaging person\'s head, neck",dQw4w9WgXcQ,95,105,train\r\n'
    "abseiling,GoneGoneGon,0,10,train\r\n",
    "annotations/val.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
    "abseiling,dqw4w9wgxcq,95,105,val,0\nabseiling,dqw4w9wgxcq,95,105,val,0\n",
    "annotations/test.csv": "youtube_id,time_start,time_end,split\nNoLabelHere,0,10,test\n",
    "annotations/README.csv": "not,a list\n",
    "train/playing squash or racquetball/-0_aB3cdEfg_000001_000011.mp4": "",
    "train/massaging/dQw4w9WgXcQ_000095_000105.mp4.webm": "",
    "train/massaging/dQw4w9WgXcQ_000095_000105.info.json": "",
    "val_256/abseiling/dqw4w9wgxcq_95_105.mkv": "",
    "train/abseiling/unlisted___000001_000011.mp4": "",
}


def test_kinetics400(tmp_path: Path) -> None:
    """Ids differ only in case, names have leading dashes, downloaders leave what they like."""
    assert list_kinetics400(lay(tmp_path, KINETICS)) == [
        Listed(
            "train/abseiling/GoneGoneGon_000000_000010.mp4", "abseiling", {"split1": "train"}, True
        ),
        Listed(
            "train/massaging/dQw4w9WgXcQ_000095_000105.mp4.webm",
            "massaging person's head, neck",
            {"split1": "train"},
        ),
        Listed(
            "train/playing squash or racquetball/-0_aB3cdEfg_000001_000011.mp4",
            "playing squash or racquetball",
            {"split1": "train"},
        ),
        Listed("val_256/abseiling/dqw4w9wgxcq_95_105.mkv", "abseiling", {"split1": "test"}),
    ]


def test_kinetics400_with_a_labelled_test_list(tmp_path: Path) -> None:
    """Validation is split 1's test part, the test list split 2's; a clip in two lists is not trained on."""
    row = "jogging,{id}_________,0,10\n"
    header = "label,youtube_id,time_start,time_end\n"
    lay(
        tmp_path,
        {
            "kinetics_train.csv": header + row.format(id="aa") + row.format(id="vv"),
            "kinetics_val.csv": header + row.format(id="vv"),
            "kinetics_test.csv": header + row.format(id="tt"),
        },
    )
    videos = list_kinetics400(tmp_path)
    assert {video.path.split("/")[-1][:2]: video.parts for video in videos} == {
        "aa": {"split1": "train", "split2": "train"},
        "vv": {"split1": "test"},
        "tt": {"split2": "test"},
    }
    assert all(video.missing for video in videos)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"run/b (2).mp4": "", "run/a.avi": "", "sit down/x/c": "", ".git/x": "", "run/.x": ""},
            {
                "run/a.avi": ("run", {"split1": "train"}),
                "run/b (2).mp4": ("run", {"split1": "train"}),
                "sit down/x/c": ("sit down", {"split1": "train"}),
            },
        ),
        (
            {"train/run/a": "", "val/run/b": "", "test/run/c": "", "notes/d": "", "e": ""},
            {
                "train/run/a": ("run", {"split1": "train", "split2": "train"}),
                "val/run/b": ("run", {"split1": "test"}),
                "test/run/c": ("run", {"split2": "test"}),
            },
        ),
        (
            {"train/run/a": "", "test/run/b": ""},
            {
                "train/run/a": ("run", {"split1": "train"}),
                "test/run/b": ("run", {"split1": "test"}),
            },
        ),
        ({"a.mp4": ""}, {"a.mp4": ("", {"split1": "train"})}),
    ],
)
def test_video_folder(
    files: dict[str, str], expected: dict[str, tuple[str, dict[str, str]]], tmp_path: Path
) -> None:
    videos = list_video_folder(lay(tmp_path, files))
    assert {video.path: (video.label, video.parts) for video in videos} == expected


@pytest.mark.parametrize(
    ("read", "files", "message"),
    [
        (list_hmdb51, {"run/a.avi": ""}, r"not laid out like HMDB51: .* split files"),
        (list_hmdb51, {"s/run_test_split1.txt": "a.avi 1"}, "no folder run with videos"),
        (
            list_hmdb51,
            {"s/run_test_split1.txt": "a.avi 1\nb.avi 3\n", "run/a.avi": ""},
            r"run_test_split1\.txt: 'b\.avi 3' is not of the form 'video\.avi 1'",
        ),
        (list_kinetics400, {"train/run/a.mp4": ""}, "has no list of Kinetics-400"),
        (
            list_kinetics400,
            {"train.csv": "label,youtube_id,time_start,time_end\nrun,x,0,10\nrun,y,soon,10\n"},
            r"train\.csv, line 3: 'run,y,soon,10' is not of the form",
        ),
        (
            list_kinetics400,
            {"all.csv": "label,youtube_id,time_start,time_end\nrun,x,0,10\n"},
            r"all\.csv, line 2: .* \(or val, or test\)",
        ),
        (
            list_kinetics400,
            {"val.csv": "label,youtube_id,time_start,time_end,split\nrun,x\n"},
            r"val\.csv, line 2",
        ),
        (
            list_kinetics400,
            {"val.csv": "label,youtube_id,time_start,time_end\nrun,x,inf,10\n"},
            r"val\.csv, line 2",
        ),
    ],
)
def test_mistakes(read: object, files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(lay(tmp_path, files))  # type: ignore[operator]
