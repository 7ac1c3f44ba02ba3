"""Named pretraining configurations: the rows of the paper's ablation tables.

A preset fixes the objective and the augmentations; everything else keeps its value.
"""

from dataclasses import dataclass, field

from hdc.config import ObjectiveConfig
from hdc.views import AugmentConfig


@dataclass(frozen=True)
class Preset:
    """`paper` is the top-1 accuracy in percent that the paper reports after finetuning on UCF101 split 1."""

    summary: str
    paper: float | None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def _objective(
    spatial: tuple[int, ...], temporal: tuple[int, ...], weights: dict[int, float]
) -> ObjectiveConfig:
    return ObjectiveConfig(
        spatial_scales=spatial,
        temporal_scales=temporal,
        alpha=tuple(weights[k] for k in spatial),
        beta=tuple(weights[k] for k in temporal),
    )


_EQUAL = {3: 1.0, 4: 1.0, 5: 1.0}
_PAPER = {3: 0.25, 4: 0.5, 5: 1.0}

PRESETS = {
    "table1-sc5": Preset("Spatial Contrast on block 5", 61.3, _objective((5,), (), _EQUAL)),
    "table1-tc5": Preset("Temporal Contrast on block 5", 62.7, _objective((), (5,), _EQUAL)),
    "table1-sc5-tc5": Preset("both on block 5", 65.5, _objective((5,), (5,), _EQUAL)),
    "table1-sc45-tc45": Preset(
        "both on blocks 4, 5, weights 1", 66.9, _objective((4, 5), (4, 5), _EQUAL)
    ),
    "table1-sc45-tc45-weighted": Preset(
        "both on blocks 4, 5, weights 0.5, 1", 67.8, _objective((4, 5), (4, 5), _PAPER)
    ),
    "table1-sc345-tc345": Preset(
        "both on blocks 3, 4, 5, weights 1", 66.8, _objective((3, 4, 5), (3, 4, 5), _EQUAL)
    ),
    "table1-hdc": Preset("both on blocks 3, 4, 5, weights 0.25, 0.5, 1 (HDC)", 69.0),
    "table2-no-color-jitter": Preset(
        "HDC without colour jitter", 65.4, augment=AugmentConfig(color_jitter=False)
    ),
    "table2-no-channel-replication": Preset(
        "HDC without channel replication", 61.0, augment=AugmentConfig(channel_replication=False)
    ),
    "table2-no-color": Preset(
        "HDC without both",
        49.4,
        augment=AugmentConfig(color_jitter=False, channel_replication=False),
    ),
    "table2-no-flip": Preset("HDC without flipping", 68.0, augment=AugmentConfig(flip=False)),
    "table2-no-scale-jitter": Preset(
        "HDC without scale jitter", 64.7, augment=AugmentConfig(scale_jitter=False)
    ),
    "table2-hdc": Preset("HDC with every augmentation", 69.0),
    "section4-tc-unaugmented": Preset(
        "HDC without spatial augmentation in Temporal Contrast",
        None,
        ObjectiveConfig(augment_temporal=False),
    ),
}
