"""Named pretraining configurations: the rows of the paper's ablation tables.

A preset fixes the objective and the augmentations; everything else keeps its value.
"""

from dataclasses import dataclass, field

from hdc.config import ObjectiveConfig
from hdc.views import AugmentConfig


@dataclass(frozen=True)
class Preset:
    """What a row of a table pretrains with; `hdc.paper` has the accuracies."""

    summary: str
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
    "table1-sc5": Preset("Spatial Contrast on block 5", _objective((5,), (), _EQUAL)),
    "table1-tc5": Preset("Temporal Contrast on block 5", _objective((), (5,), _EQUAL)),
    "table1-sc5-tc5": Preset("both on block 5", _objective((5,), (5,), _EQUAL)),
    "table1-sc45-tc45": Preset(
        "both on blocks 4, 5, weights 1", _objective((4, 5), (4, 5), _EQUAL)
    ),
    "table1-sc45-tc45-weighted": Preset(
        "both on blocks 4, 5, weights 0.5, 1", _objective((4, 5), (4, 5), _PAPER)
    ),
    "table1-sc345-tc345": Preset(
        "both on blocks 3, 4, 5, weights 1", _objective((3, 4, 5), (3, 4, 5), _EQUAL)
    ),
    "table1-hdc": Preset("both on blocks 3, 4, 5, weights 0.25, 0.5, 1 (HDC)"),
    "table2-no-color-jitter": Preset(
        "HDC without colour jitter", augment=AugmentConfig(color_jitter=False)
    ),
    "table2-no-channel-replication": Preset(
        "HDC without channel replication", augment=AugmentConfig(channel_replication=False)
    ),
    "table2-no-color": Preset(
        "HDC without both",
        augment=AugmentConfig(color_jitter=False, channel_replication=False),
    ),
    "table2-no-flip": Preset("HDC without flipping", augment=AugmentConfig(flip=False)),
    "table2-no-scale-jitter": Preset(
        "HDC without scale jitter", augment=AugmentConfig(scale_jitter=False)
    ),
    "table2-hdc": Preset("HDC with every augmentation"),
    "section4-tc-unaugmented": Preset(
        "HDC without spatial augmentation in Temporal Contrast",
        ObjectiveConfig(augment_temporal=False),
    ),
}
