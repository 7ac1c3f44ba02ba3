"""`bench/loading.py`: the plain loop computes what ours does, and everybody is accounted for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdc.data.manifest import Manifest
from hdc.data.video import read_all
from hdc.views import AugmentConfig, augment

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, Any]:
    """What the smallest measurement writes."""
    out = folder / "result.json"
    command = [sys.executable, str(BENCH / "loading.py"), "--folder", str(folder), "--videos=2"]
    command += ["--takes=2", "--workers=1", "--rounds=1", "--seconds=0.01", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| ours on prepared files beside the plain loop on unprepared ones | " in done.stdout
    return json.loads(out.read_text())


@pytest.fixture
def manifests(
    folder: Path, stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Manifest]:
    monkeypatch.syspath_prepend(str(BENCH))
    import loading

    return loading.make_videos(folder, 2, 2)


def test_everybody_is_accounted_for(stored: dict[str, Any]) -> None:
    measured = stored["videos_a_second_and_cpu_seconds_a_video"]
    assert measured.keys() | stored["missing"].keys() == {
        "ours",
        "ours, decoding alone",
        "plain loop",
        "plain loop, decoding alone",
        "plain loop with torchcodec",
        "plain loop with kornia",
    }
    for name, by_files in measured.items():
        kinds = {"prepared", "unprepared"} | ({"packed"} if name.startswith("ours") else set())
        assert by_files.keys() == kinds
        for ((videos, cpu),) in by_files.values():
            assert videos > 0
            assert cpu >= 0
    assert {"date", "commit", "cpu", "cores", "python", "torch"} <= stored["machine"].keys()


def test_files(manifests: dict[str, Manifest]) -> None:
    """The same videos twice: 320 × 240, and with a short side of 128."""
    for row in range(2):
        raw, small = (manifests[files].file(row) for files in ("unprepared", "prepared"))
        assert read_all(raw, 240).shape == (32, 240, 320, 3)
        assert read_all(small, 128).shape == (32, 128, 170, 3)


def test_plain_loop_decodes_the_same_frames(manifests: dict[str, Manifest]) -> None:
    import plain_loop

    for files, short_side in (("prepared", 128), ("unprepared", 240)):
        path = manifests[files].file(1)
        everything = read_all(path, short_side)
        for start in (0, 5, 16):
            found = plain_loop.decode_with_pyav(path, start).numpy()
            np.testing.assert_array_equal(found, everything[start : start + 16])


@pytest.mark.parametrize("scale", [1.0, 0.66])
def test_plain_loop_makes_the_same_views(manifests: dict[str, Manifest], scale: float) -> None:
    """Of what is no matter of chance: crop and resize. At its edge ours sees the pixels outside the crop."""
    import plain_loop

    settings = {"random_crop": False, "flip": False, "color_jitter": False}
    config = AugmentConfig(scales=(scale,), channel_replication=False, **settings)
    clip = torch.randint(256, (16, 128, 128, 3), dtype=torch.uint8)
    expected = augment(clip[None], config, torch.Generator())[0]
    found = plain_loop.augment_with_torch(clip.permute(3, 0, 1, 2).float() / 255, config)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-4)


def test_plain_loop_changes_colors_as_ours_does(manifests: dict[str, Manifest]) -> None:
    """Uniform colors: hue keeps grey as it is and the luma of all, as does the matrix of `hdc.views`."""
    import plain_loop

    clip = torch.rand(3, 16, 8, 8)
    for turns in (0.0, 0.07, -0.3):
        turned = plain_loop.turn_hue(clip, turns)
        torch.testing.assert_close(
            plain_loop.grey(turned), plain_loop.grey(clip), rtol=0, atol=2e-3
        )
    torch.testing.assert_close(plain_loop.turn_hue(clip, 0.0), clip, rtol=0, atol=3e-3)
    grey = clip[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(plain_loop.turn_hue(grey, 0.2), grey, rtol=0, atol=2e-3)
    view = plain_loop.augment_with_torch(torch.rand(3, 16, 128, 128))
    assert view.shape == (3, 16, 112, 112)
    assert -1 <= view.min() < view.max() <= 1
