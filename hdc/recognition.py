"""Testing a finetuned model: five crops of every non-overlapping clip, class scores averaged per video."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdc import checkpoint, distributed, results
from hdc.backbones import build_backbone
from hdc.backbones.clip_size import check_clip_size
from hdc.config import TestConfig
from hdc.data.clips import Unreadable
from hdc.data.manifest import Manifest
from hdc.data.video import Frames
from hdc.device import pick_device
from hdc.features import cut, merge_unreadable, own_rows, readable_videos
from hdc.finetune import Classifier
from hdc.provenance import check_encoder, check_split
from hdc.views import center_square, to_unit_range


@dataclass(frozen=True)
class TestResult:
    """Top-1 accuracies. A clip's scores are the mean over its five crops, a video's the mean over its clips."""

    video_accuracy: float
    clip_accuracy: float
    videos: int
    clips: int
    unreadable: list[Unreadable]


def five_crops(frames: Frames, size: int, *, corners: str = "frame") -> Frames:
    """The centre and the four corners: [T, H, W, 3] -> [5, T, size, size, 3].

    `corners` "frame" are those of the whole frame, "square" those of its central square.
    """
    centre = center_square(frames, size)
    if corners == "square":
        frames = center_square(frames, min(frames.shape[1:3]))
    bottom, right = frames.shape[1] - size, frames.shape[2] - size
    crops = [
        frames[:, top : top + size, left : left + size]
        for top in (0, bottom)
        for left in (0, right)
    ]
    return np.stack([centre, *crops])


def non_overlapping(frames: Frames, count: int) -> Frames:
    """Clips of `count` frames one after the other; a shorter last one is repeated: [clips, count, H, W, 3]."""
    return np.stack([cut(frames, start, count) for start in range(0, len(frames), count)])


def load_classifier(config: TestConfig, manifest: Manifest) -> tuple[Classifier, tuple[str, ...]]:
    """The model of a finetuning checkpoint and the names of its classes.

    Raises:
        InputError: the checkpoint is of another encoder, or was finetuned on another split of `manifest`.
    """
    state = checkpoint.load(Path(config.checkpoint), "finetune")
    backbone = build_backbone(
        config.backbone, norm_eps=config.norm_eps, norm_affine=config.norm_affine
    )
    classes = tuple(state["classes"])
    model = Classifier(backbone, len(classes), dropout=0.0)
    source = f"{config.checkpoint} (backbone {state['config']['backbone']})"
    checkpoint.load_strict(model, state["model"], source, f"backbone {config.backbone}")
    check_encoder(config, state, config.checkpoint)
    check_split(config, state, config.checkpoint, manifest)
    return model.to(pick_device(config)).eval(), classes


@torch.inference_mode()
def test(config: TestConfig, manifest: Manifest) -> TestResult:
    """Classify every test video; writes `test.json` into `config.out`, one entry per video.

    Several processes share the videos, and each of them gets the whole result.
    """
    check_clip_size(config.backbone, config.clips.frames, config.crop_size, option="crop_size")
    model, classes = load_classifier(config, manifest)
    device = next(model.parameters()).device
    videos = manifest.rows("test", config.split)
    ids = videos.labels(config.label, classes).ids

    def scores(crops: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return model(to_unit_range(crops.to(device))).float().softmax(1).cpu()

    # Per video its row, its class, and for each clip whether it was recognised.
    own: list[tuple[int, int, list[bool]]] = []
    skipped: dict[int, Unreadable] = {}
    rows = own_rows([1] * len(videos), 1)
    with readable_videos(videos, rows, config, "test", skipped) as readable:
        for row, video in readable:
            clips = non_overlapping(video, config.clips.frames)
            crops = [five_crops(clip, config.crop_size, corners=config.corners) for clip in clips]
            flat = torch.from_numpy(np.stack(crops)).flatten(0, 1)
            per_crop = torch.cat([scores(chunk) for chunk in flat.split(config.crop_batch)])
            per_clip = per_crop.view(len(clips), 5, -1).mean(1)
            hits = (per_clip.argmax(1) == int(ids[row])).tolist()
            own.append((row, int(per_clip.mean(0).argmax()), hits))

    unreadable = merge_unreadable(skipped, len(videos))
    tested = sorted(video for part in distributed.gather(own) for video in part)
    video_hits = [predicted == int(ids[row]) for row, predicted, _ in tested]
    clip_hits = [hit for _, _, hits in tested for hit in hits]
    result = TestResult(
        video_accuracy=sum(video_hits) / len(video_hits),
        clip_accuracy=sum(clip_hits) / len(clip_hits),
        videos=len(tested),
        clips=len(clip_hits),
        unreadable=unreadable,
    )
    summary = {
        "video_accuracy": result.video_accuracy,
        "clip_accuracy": result.clip_accuracy,
        "videos": result.videos,
        "clips": result.clips,
        "predictions": [
            {
                "path": str(videos.path[row]),
                "class": classes[ids[row]],
                "predicted": classes[predicted],
            }
            for row, predicted, _ in tested
        ],
    }
    results.write(config, results.TEST, summary, unreadable)
    return result
