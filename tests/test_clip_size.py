"""The least clips that an encoder takes, against encoders that are really run; and what a user is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdc import cli
from hdc.backbones import build_backbone
from hdc.backbones.clip_size import FRAMES, SIZE, check_clip_size
from hdc.data.manifest import Manifest
from hdc.errors import InputError

NAMES = ("c3d", "resnet3d-18", "r2plus1d-10", "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_what_all_are_made_for(name: str) -> None:
    """A run does not try it."""
    with torch.device("meta"):
        backbone = build_backbone(name)
        for frames, size in ((FRAMES, SIZE), (FRAMES + 4, SIZE), (FRAMES, SIZE - 1)):
            assert min(backbone(torch.empty(1, 3, frames, size, size))[5].shape[3:]) >= 2
            check_clip_size(name, frames, size, option="crop_size", least_map=2)


# A clip that is refused, and the pixels and frames that each would be enough.
LEAST = [
    ("resnet3d-18", 16, 28, 33, 17),
    ("resnet3d-18", 1, 32, 33, 17),
    ("c3d", 4, 32, None, 8),
    ("c3d", 8, 16, 32, 16),
    ("c3d", 16, 8, 16, None),
    ("r2plus1d-10", 8, 16, 17, 9),
    ("tiny", 16, 16, 17, 17),
]


@pytest.mark.parametrize(("name", "frames", "size", "larger", "longer"), LEAST)
def test_least(name: str, frames: int, size: int, larger: int | None, longer: int | None) -> None:
    ways = [f"--augment.crop_size to at least {larger}"] if larger else []
    ways += [f"--clips.frames to at least {longer}"] if longer else []
    with pytest.raises(InputError) as error:
        check_clip_size(name, frames, size, option="augment.crop_size")
    assert str(error.value) == (
        f"clips.frames is {frames} and augment.crop_size {size}: too small for backbone {name}; "
        f"raise {', or '.join(ways)}"
    )
    backbone = build_backbone(name)
    cases = [(frames, size, False)]
    cases += [(frames, larger - 1, False), (frames, larger, True)] if larger else []
    cases += [(longer - 1, size, False), (longer, size, True)] if longer else []
    for length, side, fits in cases:
        clip = torch.zeros(1, 3, length, side, side)
        with torch.inference_mode():
            if fits:
                backbone(clip)
            else:
                with pytest.raises((RuntimeError, ValueError)):
                    backbone(clip)


def test_both_too_small() -> None:
    """Neither alone would do."""
    with pytest.raises(
        InputError, match=r"raise --clips.frames to at least 8 and --crop_size to at least 32$"
    ):
        check_clip_size("c3d", 4, 8, option="crop_size")


def test_map_for_pooling() -> None:
    """16 pixels leave a map of 1 × 1, which has nothing to pool."""
    check_clip_size("c3d", 16, 16, option="crop_size")
    with pytest.raises(InputError, match=r"raise --crop_size to at least 32$"):
        check_clip_size("c3d", 16, 16, option="crop_size", least_map=2)


@pytest.mark.parametrize(
    ("command", "option", "more"),
    [
        ("pretrain", "augment.crop_size", ["--batch_size=2"]),
        ("finetune", "augment.crop_size", ["--batch_size=2"]),
        ("retrieve", "crop_size", []),
        ("probe", "crop_size", []),
        ("test", "crop_size", ["--checkpoint=none.pt"]),
    ],
)
def test_one_line(
    command: str,
    option: str,
    more: list[str],
    numbered: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever the command, with the default encoder."""
    replace(numbered, source=tmp_path / "manifest.csv").write()
    options = [f"--data={tmp_path}", f"--out={tmp_path}", "--clips.size=32", f"--{option}=28"]
    assert cli.main([command, *options, *more, "--device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"hdc-train: clips.frames is 16 and {option} 28: too small for backbone resnet3d-18; "
        f"raise --{option} to at least 33"
        + ", or --clips.frames to at least 17"
        * (command != "retrieve")  # its maps are pooled by 2
    )
