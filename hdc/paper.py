"""The paper's tables: which runs make a row, and the accuracies that the paper prints for it, in percent.

Zhang and Crandall, Hierarchically Decoupled Spatial-Temporal Contrast for Self-supervised Video Representation
Learning. Only rows that this package can run are here: HDC, its ablations, and training without pretraining.
"""

from dataclasses import dataclass
from typing import Literal

from hdc.backbones import BackboneName

# By the names of their options and of `hdc-train prepare`.
DATASETS = {"kinetics400": "Kinetics-400", "ucf101": "UCF101", "hmdb51": "HMDB51"}

Figures = dict[str, dict[int, float | None]]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        title: what the paper's row says.
        backbone: the encoder.
        preset: how it is pretrained on Kinetics-400, a name in `hdc.presets`; None for random weights.
        figures: dataset → k → top-k accuracy in percent; None where the paper leaves it out.
    """

    title: str
    backbone: BackboneName
    preset: str | None
    figures: Figures


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        summary: what its figures are.
        command: the command of `hdc-train` that measures them.
        splits: the splits that they are the mean of.
        rows: by a short name.
    """

    summary: str
    command: Literal["recognize", "retrieve"]
    splits: tuple[int, ...]
    rows: dict[str, Row]


def _ablation(title: str, preset: str | None, figure: float | None) -> Row:
    return Row(title, "resnet3d-18", preset, {"ucf101": {1: figure}})


def _finetuned(title: str, backbone: BackboneName, preset: str | None, *figures: float) -> Row:
    return Row(title, backbone, preset, {"ucf101": {1: figures[0]}, "hmdb51": {1: figures[1]}})


def _retrieved(title: str, preset: str | None, dataset: str, *figures: float) -> Row:
    return Row(title, "c3d", preset, {dataset: dict(zip((1, 5, 10, 20, 50), figures, strict=True))})


HDC = "table1-hdc"

TABLES = {
    "table1": Table(
        "Spatial and Temporal Contrast by block; finetuned on UCF101, split 1",
        "recognize",
        (1,),
        {
            "sc5": _ablation("SC 5", "table1-sc5", 61.3),
            "tc5": _ablation("TC 5", "table1-tc5", 62.7),
            "sc5-tc5": _ablation("SC, TC 5", "table1-sc5-tc5", 65.5),
            "sc45-tc45": _ablation("SC, TC 4 5; α, β = 1 1", "table1-sc45-tc45", 66.9),
            "sc45-tc45-weighted": _ablation(
                "SC, TC 4 5; α, β = 0.5 1", "table1-sc45-tc45-weighted", 67.8
            ),
            "sc345-tc345": _ablation("SC, TC 3 4 5; α, β = 1 1 1", "table1-sc345-tc345", 66.8),
            "scratch": _ablation("training from scratch", None, None),
            "hdc": _ablation("SC, TC 3 4 5; α, β = 0.25 0.5 1 (HDC)", HDC, 69.0),
        },
    ),
    "table2": Table(
        "HDC without some augmentations; finetuned on UCF101, split 1",
        "recognize",
        (1,),
        {
            "no-color-jitter": _ablation("no colour jittering", "table2-no-color-jitter", 65.4),
            "no-channel-replication": _ablation(
                "no channel replication", "table2-no-channel-replication", 61.0
            ),
            "no-color": _ablation("neither of the two", "table2-no-color", 49.4),
            "no-flip": _ablation("no flipping", "table2-no-flip", 68.0),
            "no-scale-jitter": _ablation("no scale jittering", "table2-no-scale-jitter", 64.7),
            "hdc": _ablation("our full model (HDC)", "table2-hdc", 69.0),
        },
    ),
    "table3": Table(
        "finetuned on UCF101 and HMDB51, mean of 3 splits",
        "recognize",
        (1, 2, 3),
        {
            # Where the paper has two figures for random weights, the authors' own, in parentheses there.
            "resnet3d-18-random": _finetuned(
                "random initialization, 3D-ResNet18", "resnet3d-18", None, 43.8, 19.1
            ),
            "resnet3d-18-hdc": _finetuned("HDC, 3D-ResNet18", "resnet3d-18", HDC, 68.5, 38.1),
            "c3d-random": _finetuned("random initialization, C3D", "c3d", None, 51.4, 22.5),
            "c3d-hdc": _finetuned("HDC, C3D", "c3d", HDC, 72.3, 39.3),
            "r2plus1d-10-random": _finetuned(
                "random initialization, R(2+1)D-10", "r2plus1d-10", None, 56.2, 22.0
            ),
            "r2plus1d-10-hdc": _finetuned("HDC, R(2+1)D-10", "r2plus1d-10", HDC, 76.2, 39.8),
        },
    ),
    "table4": Table(
        "nearest-neighbour retrieval on UCF101, split 1",
        "retrieve",
        (1,),
        {
            "c3d-random": _retrieved(
                "random initialized C3D", None, "ucf101", 16.7, 27.5, 33.7, 41.4, 53.0
            ),
            "c3d-hdc": _retrieved("HDC (C3D)", HDC, "ucf101", 33.9, 49.6, 55.7, 61.6, 69.9),
        },
    ),
    "table5": Table(
        "nearest-neighbour retrieval on HMDB51, split 1",
        "retrieve",
        (1,),
        {
            "c3d-random": _retrieved(
                "random initialized C3D", None, "hmdb51", 7.4, 20.5, 31.9, 44.5, 66.3
            ),
            "c3d-hdc": _retrieved("HDC (C3D)", HDC, "hmdb51", 14.6, 28.8, 36.1, 44.8, 57.9),
        },
    ),
    "section4": Table(
        "spatial augmentation in Temporal Contrast; finetuned on UCF101 and HMDB51, mean of 3 splits",
        "recognize",
        (1, 2, 3),
        {
            "hdc": _finetuned("augmented", "c3d", HDC, 72.3, 39.3),
            "tc-unaugmented": _finetuned(
                "not augmented", "c3d", "section4-tc-unaugmented", 68.9, 38.0
            ),
        },
    ),
}


def preset_figures() -> dict[str, float]:
    """Preset → top-1 accuracy in percent after finetuning 3D-ResNet18 on UCF101, split 1 (Tables 1 and 2)."""
    rows = [row for name in ("table1", "table2") for row in TABLES[name].rows.values()]
    found = {row.preset: row.figures["ucf101"][1] for row in rows}
    return {preset: figure for preset, figure in found.items() if preset and figure}
