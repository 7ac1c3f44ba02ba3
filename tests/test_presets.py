"""The presets are the rows of the paper's tables, and each of them trains."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from hdc.config import PretrainConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.data.synthetic import make_dataset
from hdc.paper import preset_figures
from hdc.presets import PRESETS
from hdc.pretrain import pretrain

# Spatial scales, temporal scales, α, β and the accuracy of each row, read off Table 1 of the paper.
TABLE_1 = {
    "table1-sc5": ((5,), (), (1,), (), 61.3),
    "table1-tc5": ((), (5,), (), (1,), 62.7),
    "table1-sc5-tc5": ((5,), (5,), (1,), (1,), 65.5),
    "table1-sc45-tc45": ((4, 5), (4, 5), (1, 1), (1, 1), 66.9),
    "table1-sc45-tc45-weighted": ((4, 5), (4, 5), (0.5, 1), (0.5, 1), 67.8),
    "table1-sc345-tc345": ((3, 4, 5), (3, 4, 5), (1, 1, 1), (1, 1, 1), 66.8),
    "table1-hdc": ((3, 4, 5), (3, 4, 5), (0.25, 0.5, 1), (0.25, 0.5, 1), 69.0),
}
# What each row of Table 2 leaves out.
TABLE_2 = {
    "table2-no-color-jitter": ({"color_jitter"}, 65.4),
    "table2-no-channel-replication": ({"channel_replication"}, 61.0),
    "table2-no-color": ({"color_jitter", "channel_replication"}, 49.4),
    "table2-no-flip": ({"flip"}, 68.0),
    "table2-no-scale-jitter": ({"scale_jitter"}, 64.7),
    "table2-hdc": (set(), 69.0),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("videos"), train=5, test=5, seed=0)[0]


def test_table_1() -> None:
    for name, row in TABLE_1.items():
        preset = PRESETS[name]
        o = preset.objective
        figure = preset_figures()[name]
        assert (o.spatial_scales, o.temporal_scales, o.alpha, o.beta, figure) == row
        assert o.temperature == 0.07


def test_table_2() -> None:
    for name, (off, accuracy) in TABLE_2.items():
        preset = PRESETS[name]
        switches = {
            f.name for f in fields(preset.augment) if getattr(preset.augment, f.name) is False
        }
        assert (switches, preset_figures()[name]) == (off, accuracy)
        assert preset.objective == PRESETS["table1-hdc"].objective


def test_every_preset_is_in_a_table() -> None:
    assert set(PRESETS) == {*TABLE_1, *TABLE_2, "section4-tc-unaugmented"}
    assert not PRESETS["section4-tc-unaugmented"].objective.augment_temporal


@pytest.mark.parametrize("name", PRESETS)
def test_preset_takes_a_step(name: str, videos: Manifest, tmp_path: Path) -> None:
    """One step of a real run moves the weights of everything that the preset trains."""
    preset = PRESETS[name]
    config = PretrainConfig(
        data="",
        out=str(tmp_path),
        backbone="tiny",
        clips=ClipConfig(size=32),
        objective=preset.objective,
        augment=replace(preset.augment, crop_size=28),
        epochs=1,
        batch_size=5,
        device="cpu",
    )
    run = pretrain(config, videos)
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["step"] == 1
    losses = {name.split("_")[0] for name in run.metrics if name.endswith("_loss")}
    o = preset.objective
    expected = {f"spatial{k}" for k in o.spatial_scales} | {
        f"temporal{k}" for k in o.temporal_scales
    }
    assert losses == expected
    moved = [buffers["momentum_buffer"] for buffers in state["optimizer"]["state"].values()]
    # Every parameter got a gradient; the last instance norm's shift and all weights a non-zero one.
    assert len(moved) == len([n for n in state["model"] if not n.endswith("running_mean")])
    assert sum(bool(m.abs().sum() > 0) for m in moved) >= len(moved) - 2 * len(losses)
