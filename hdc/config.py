"""Typed configuration of every command. Defaults are the paper's; a run stores what it was given.

Values arrive as defaults, then from a preset, then from a YAML file, then from the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hdc.backbones import BackboneName
from hdc.data.clips import ClipConfig
from hdc.errors import InputError
from hdc.optimizer import OptimizerConfig
from hdc.views import AugmentConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """HD-NCE: which blocks are contrasted, and how much each counts (the paper's Eq. 6).

    Attributes:
        spatial_scales: blocks with Spatial Contrast, out of 3, 4, 5; [] for none.
        temporal_scales: blocks with Temporal Contrast, out of 3, 4, 5; [] for none.
        alpha: weight of each spatial scale.
        beta: weight of each temporal scale.
        temperature: τ, the softmax temperature.
        reduction: "mean" divides by the batch size; "sum" is Eq. 6 to the letter.
        projection_dim: size of the embeddings that are compared.
        augment_temporal: spatial augmentation of the other clip too; false leaves it a centre crop.
    """

    spatial_scales: tuple[int, ...] = (3, 4, 5)
    temporal_scales: tuple[int, ...] = (3, 4, 5)
    alpha: tuple[float, ...] = (0.25, 0.5, 1.0)
    beta: tuple[float, ...] = (0.25, 0.5, 1.0)
    temperature: float = 0.07
    reduction: Literal["mean", "sum"] = "mean"
    projection_dim: int = 128
    augment_temporal: bool = True

    def __post_init__(self) -> None:
        for scales, weights, names in (
            (self.spatial_scales, self.alpha, ("spatial_scales", "alpha")),
            (self.temporal_scales, self.beta, ("temporal_scales", "beta")),
        ):
            if not set(scales) <= {3, 4, 5} or len(set(scales)) != len(scales):
                raise InputError(
                    f"objective.{names[0]} is {list(scales)}; it must hold 3, 4 and 5 at most once each"
                )
            if len(weights) != len(scales):
                raise InputError(
                    f"objective.{names[1]} has {len(weights)} weights but objective.{names[0]} has "
                    f"{len(scales)} scales; give one weight per scale"
                )
            if any(not weight >= 0 for weight in weights):
                raise InputError(
                    f"objective.{names[1]} is {list(weights)}; no weight may be negative"
                )
        if not self.spatial_scales and not self.temporal_scales:
            raise InputError(
                "objective.spatial_scales and objective.temporal_scales are both empty"
            )
        if not self.temperature > 0:
            raise InputError(f"objective.temperature is {self.temperature}; it must be positive")
        if self.projection_dim < 1:
            raise InputError(
                f"objective.projection_dim is {self.projection_dim}; it must be at least 1"
            )


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that PyTorch's generators do not take."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}; it must be from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What a command looks at.

    Attributes:
        data: a folder that `hdc-train prepare` wrote, one in UCF101's layout, or a manifest (CSV with path,
            frames, label, split1).
        split: which split's train and test lists to use.
        label: the manifest's column of class names.
        backbone: the encoder.
    """

    data: str
    split: int = 1
    label: str = "label"
    backbone: BackboneName = "resnet3d-18"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What everything takes that computes.

    Attributes:
        out: folder for everything the command writes.
        norm_eps: epsilon of the instance norms (Keras implementations use 1e-3).
        norm_affine: learned scale and shift in the instance norms.
        precision: "bf16" runs the encoder under bfloat16 autocast on a GPU; losses stay in float32.
        device: "auto" takes the GPU if there is one.
        workers: decoding processes; null takes one per core, at most 16, where a GPU computes, and none
            where the CPU does (they would fight for its cores).
        seed: decides initial weights, order, crops and augmentations.
    """

    out: str
    norm_eps: float = 1e-5
    norm_affine: bool = True
    clips: ClipConfig = field(default_factory=ClipConfig)
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "auto"
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers is {self.workers}; it must not be negative")
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class CommandConfig(RunConfig, InputConfig):  # the help lists the fields of the last base first
    """What every command takes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommandConfig):
    """What every training command takes besides.

    Attributes:
        epochs: passes over the training list.
        batch_size: videos in a step.
        checkpoint_every: steps between checkpoints.
        keep_every: epochs between checkpoints that stay, as checkpoint-EPOCH.pt; 0 leaves the newest only.
        log_every: steps between lines of the log.
        resume: go on from the checkpoint in `out`, to the same result as without the interruption.
    """

    epochs: int
    batch_size: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint_every: int = 200
    keep_every: int = 0
    log_every: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.keep_every < 0:
            raise InputError(f"keep_every is {self.keep_every}; it must not be negative")
        _check_crop(self.augment.crop_size, self.clips)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Self-supervised pretraining with HD-NCE."""

    out: str = "runs/pretrain"
    epochs: int = 50
    batch_size: int = 128
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise InputError("batch_size is 1; a contrastive loss needs at least 2 videos")


def finetune_augment(crop_size: int = 112) -> AugmentConfig:
    """The paper's augmentations in finetuning: crops, scale jitter and flips, nothing on the colours."""
    return AugmentConfig(crop_size=crop_size, color_jitter=False, channel_replication=False)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Supervised training of encoder and classifier, from pretrained or random weights.

    Attributes:
        checkpoint: a pretraining run's checkpoint; null trains from scratch (the paper's baseline).
        dropout: dropout before the classifier.
    """

    out: str = "runs/finetune"
    checkpoint: str | None = None
    epochs: int = 50
    batch_size: int = 32
    dropout: float = 0.5
    augment: AugmentConfig = field(default_factory=finetune_augment)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be in [0, 1)")


Corners = Literal["frame", "square"]


@dataclass(frozen=True, kw_only=True)
class TestConfig(CommandConfig):
    """Action recognition by a finetuned model: five crops of every clip of every test video.

    Attributes:
        checkpoint: a finetuning run's checkpoint.
        crop_size: side of the crops in pixels.
        corners: "frame" takes the corner crops from the full frame, "square" from its central square.
        crop_batch: crops that go through the network at a time.
    """

    checkpoint: str
    out: str = "runs/test"
    crop_size: int = 112
    corners: Corners = "frame"
    crop_batch: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_crop(self.crop_size, self.clips)
        if self.crop_batch < 1:
            raise InputError(f"crop_batch is {self.crop_batch}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RecognizeConfig(FinetuneConfig):
    """Finetuning and testing on several splits of a dataset.

    Attributes:
        splits: the splits, each finetuned and tested by itself.
        corners: of the test: "frame" takes the corner crops from the full frame, "square" from its central
            square.
        crop_batch: crops of the test that go through the network at a time.
    """

    out: str = "runs/recognize"
    split: int = field(default=1, init=False)  # `splits` says it
    splits: tuple[int, ...] = (1, 2, 3)
    corners: Corners = "frame"
    crop_batch: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits or len(set(self.splits)) < len(self.splits) or min(self.splits) < 1:
            raise InputError(
                f"splits is {list(self.splits)}; it must name splits such as 1, 2, 3, each once"
            )
        if self.crop_batch < 1:
            raise InputError(f"crop_batch is {self.crop_batch}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(CommandConfig):
    """Frozen features of a video: the mean over clips of the last block's pooled feature map.

    Attributes:
        checkpoint: a pretraining or finetuning run's checkpoint; null takes random weights.
        clips_per_video: clips at evenly spaced places of every video.
        crop_size: side of the centre crop in pixels.
        pooling: "max" is 2 × 2 spatial max pooling, flattened (VCOP's); "average" is global.
    """

    checkpoint: str | None = None
    clips_per_video: int = 10
    crop_size: int = 112
    pooling: Literal["max", "average"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clips_per_video", "crop_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _check_crop(self.crop_size, self.clips)


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(FeatureConfig):
    """Nearest-neighbour retrieval: test videos query the training videos (the paper's Tables 4 and 5).

    Attributes:
        center: subtract the training features' mean before the cosine.
    """

    out: str = "runs/retrieve"
    center: bool = False


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(FeatureConfig):
    """Two classifiers on the same frozen features: a linear one, and the nearest neighbours' vote.

    Attributes:
        l2: strength of the linear classifier's penalty on the squared weights (features are standardised
            first).
        neighbors: k, the training videos that vote on a test video.
        knn_temperature: T; a neighbour of cosine s votes with weight exp(s / T).
    """

    out: str = "runs/probe"
    pooling: Literal["max", "average"] = "average"
    l2: float = 1e-3
    neighbors: int = 20
    knn_temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l2", "knn_temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.neighbors < 1:
            raise InputError(f"neighbors is {self.neighbors}; it must be at least 1")


def _check_crop(crop_size: int, clips: ClipConfig) -> None:
    if crop_size > clips.size:
        raise InputError(
            f"crop_size is {crop_size}, larger than frames with a short side of {clips.size}; "
            "lower it or raise --clips.size"
        )


def shared(config: TrainConfig, kind: type[CommandConfig]) -> dict[str, Any]:
    """The options of a training that the command of `kind` has, too; it sees crops of the same size."""
    given = vars(config) | {"crop_size": config.augment.crop_size}
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def plain(value: Any) -> Any:
    """Nested values as JSON and YAML give them back: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names, in their order."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
