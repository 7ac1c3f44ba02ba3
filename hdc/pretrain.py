"""Self-supervised pretraining: video file → clips → views → encoder → pools → projections → HD-NCE."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Generator, Tensor, nn

from hdc import distributed, training
from hdc.backbones import build_backbone
from hdc.backbones.clip_size import check_clip_size
from hdc.config import PretrainConfig
from hdc.data.clips import TrainingClips
from hdc.data.manifest import Manifest
from hdc.device import pick_device
from hdc.model import HDC, Pair
from hdc.share import Share, augment
from hdc.training import TrainedRun
from hdc_kernels import fused_hd_nce


def pretrain(config: PretrainConfig, manifest: Manifest) -> TrainedRun:
    """Train the encoder on the training videos of `manifest`; labels are not looked at."""
    objective = config.objective
    check_clip_size(
        config.backbone, config.clips.frames, config.augment.crop_size, option="augment.crop_size"
    )
    torch.manual_seed(config.seed)
    backbone = build_backbone(
        config.backbone, norm_eps=config.norm_eps, norm_affine=config.norm_affine
    )
    model = HDC(
        backbone, objective.spatial_scales, objective.temporal_scales, objective.projection_dim
    ).to(pick_device(config))
    videos = manifest.rows("train", config.split)
    videos.check_files()
    dataset = TrainingClips(
        videos,
        labels=np.zeros(len(videos), dtype=np.int64),
        config=config.clips,
        views=2 if objective.temporal_scales else 1,
        seed=config.seed,
    )

    def step_loss(
        model: nn.Module, clips: Tensor, labels: Tensor, generator: Generator, share: Share
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        spatial, temporal = model(*make_views(clips, config, generator, share))
        loss, metrics = fused_hd_nce(
            _rows(spatial, share),
            _rows(temporal, share),
            alpha=objective.alpha,
            beta=objective.beta,
            temperature=objective.temperature,
            reduction=objective.reduction,
            return_metrics=True,
            process_group=distributed.group(),
        )
        values: dict[str, Tensor] = {}
        for task, scales, losses, accuracies in (
            ("spatial", objective.spatial_scales, metrics.spatial_loss, metrics.spatial_accuracy),
            (
                "temporal",
                objective.temporal_scales,
                metrics.temporal_loss,
                metrics.temporal_accuracy,
            ),
        ):
            for k, task_loss, accuracy in zip(scales, losses, accuracies, strict=True):
                values[f"{task}{k}_loss"] = share.weigh(task_loss)
                values[f"{task}{k}_accuracy"] = share.weigh(accuracy)
        return loss, values

    return training.train(
        "pretrain",
        config,
        model,
        dataset,
        step_loss,
        {"videos": videos.digest()},
        _status,
        min_videos=2,  # one would have no negatives
    )


def finished(config: PretrainConfig, manifest: Manifest) -> bool:
    """Whether `pretrain` has nothing left to do.

    Raises:
        InputError: as `hdc.training.finished`.
    """
    videos = manifest.rows("train", config.split)
    return training.finished("pretrain", config, len(videos), {"videos": videos.digest()})


def make_views(
    clips: Tensor, config: PretrainConfig, generator: Generator, share: Share
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The views o, s and t of uint8 clips [V, B, T, H, W, 3]; V is 2 where Temporal Contrast asks for t.

    o and s come from the first clip, t from the second. s is None without Spatial Contrast.
    """
    objective = config.objective
    view_o = augment(clips[0], config.augment, generator, share)
    view_s = view_t = None
    if objective.spatial_scales:
        view_s = augment(clips[0], config.augment, generator, share)
    if objective.temporal_scales:
        plain = config.augment.center_only()
        view_t = augment(
            clips[1], config.augment if objective.augment_temporal else plain, generator, share
        )
    return view_o, view_s, view_t


def _rows(pairs: list[Pair], share: Share) -> list[Pair]:
    return [(query[: share.count], key[: share.count]) for query, key in pairs]


def _status(values: Mapping[str, float]) -> str:
    """ "loss 5.21  SC 41 62 88 %  TC 12 20 31 %": contrastive accuracy per scale."""
    text = f"loss {values['loss']:.3f}"
    for task, short in (("spatial", "SC"), ("temporal", "TC")):
        names = [name for name in values if name.startswith(task) and name.endswith("accuracy")]
        if names:
            text += f"  {short} {' '.join(f'{100 * values[name]:.0f}' for name in names)} %"
    return text
