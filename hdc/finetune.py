"""Finetuning for action recognition: the pretrained encoder, global pooling, dropout, one linear layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hdc import checkpoint, training
from hdc.backbones import Backbone
from hdc.backbones.clip_size import check_clip_size
from hdc.config import FinetuneConfig
from hdc.data.clips import TrainingClips
from hdc.data.manifest import Manifest
from hdc.device import pick_device
from hdc.errors import InputError
from hdc.features import load_encoder
from hdc.share import Share, augment, dropout
from hdc.training import TrainedRun


class Classifier(nn.Module):
    """Clips [B, 3, T, H, W] -> class logits [B, classes]."""

    def __init__(self, backbone: Backbone, classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = dropout
        self.classifier = nn.Linear(backbone.channels[5], classes)

    def forward(self, clips: Tensor, share: Share | None = None) -> Tensor:
        """`share` says which clips these are, for the dropout in training."""
        features = self.backbone(clips)[5].mean((2, 3, 4))
        if share:
            features = dropout(features, self.dropout, share)
        logits: Tensor = self.classifier(features)
        return logits


def finetune(config: FinetuneConfig, manifest: Manifest) -> TrainedRun:
    """Train encoder and classifier on the labelled training videos of `manifest`.

    Raises:
        InputError: besides what `train` raises, when a class has no training videos in this split.
    """
    check_clip_size(
        config.backbone, config.clips.frames, config.augment.crop_size, option="augment.crop_size"
    )
    names = manifest.labels(config.label).names
    videos = manifest.rows("train", config.split)
    ids = videos.labels(config.label, names).ids
    missing = sorted(set(range(len(names))) - set(ids.tolist()))
    if missing:
        raise InputError(
            f"{manifest.source}: class {names[missing[0]]} has no training videos in split {config.split}"
        )
    videos.check_files()
    backbone = load_encoder(config, config.checkpoint, manifest)
    model = Classifier(backbone, len(names), config.dropout).to(pick_device(config))
    dataset = TrainingClips(videos, ids, config.clips, views=1, seed=config.seed)

    def step_loss(
        model: nn.Module, clips: Tensor, labels: Tensor, generator: Generator, share: Share
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = model(augment(clips[0], config.augment, generator, share), share).float()
        accuracy = (logits.argmax(1) == labels).float().mean()
        loss = F.cross_entropy(logits, labels)
        return loss * share.weight, {"accuracy": share.weigh(accuracy)}

    return training.train(
        "finetune",
        config,
        model,
        dataset,
        step_loss,
        _extra(config, videos, names),
        _status,
        min_videos=1,
    )


def finished(config: FinetuneConfig, manifest: Manifest) -> bool:
    """Whether `finetune` has nothing left to do.

    Raises:
        InputError: as `hdc.training.finished`.
    """
    names = manifest.labels(config.label).names
    videos = manifest.rows("train", config.split)
    return training.finished("finetune", config, len(videos), _extra(config, videos, names))


def _extra(config: FinetuneConfig, videos: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """What the checkpoint holds beside the model: its classes, and what it comes from."""
    return {
        "classes": list(names),
        "videos": videos.digest(config.label),
        "pretrained_weights": checkpoint.digest(config.checkpoint),
    }


def _status(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.3f}  accuracy {100 * values['accuracy']:.0f} %"
