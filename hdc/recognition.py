"""Testing a finetuned model: five crops of every non-overlapping clip, class scores averaged per video.

The scores are probabilities, after the softmax. `scores.npz` keeps them, to be fused with another model's:

    paths, starts    [V]: the videos that were tested, as in the manifest
    labels           int64 [V]: their classes by number
    classes          [C]: the names of all classes
    probabilities    float32 [V, C]: the mean over a video's clips of the mean over a clip's crops
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from hdc import atomic, checkpoint, distributed, results
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

SCORES = "scores.npz"


@dataclass(frozen=True)
class TestResult:
    """Accuracies, top-1 and top-5. A clip's scores are the mean over its five crops, a video's the mean over its clips.

    Top-5 ones are None where there are no more than 5 classes.
    """

    video_accuracy: float
    clip_accuracy: float
    video_top5_accuracy: float | None
    clip_top5_accuracy: float | None
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


def top_hits(scores: Tensor, ids: Tensor, tops: Sequence[int]) -> Tensor:
    """Whether a row's class is among the k of largest scores: [N, C], int64 [N] -> bool [len(tops), N]."""
    best = scores.topk(max(tops)).indices == ids[:, None]
    return torch.stack([best[:, :k].any(1) for k in tops])


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
    """Classify every test video; writes `scores.npz` and `test.json` into `config.out`, one entry per video.

    Several processes share the videos, and each of them gets the whole result.
    """
    check_clip_size(config.backbone, config.clips.frames, config.crop_size, option="crop_size")
    model, classes = load_classifier(config, manifest)
    device = next(model.parameters()).device
    videos = manifest.rows("test", config.split)
    ids = torch.from_numpy(videos.labels(config.label, classes).ids)
    tops = (1, 5) if len(classes) > 5 else (1,)

    def scores(crops: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return model(to_unit_range(crops.to(device))).float().softmax(1).cpu()

    # Per video its row, its scores, and for each k and clip whether that was recognised.
    own: list[tuple[int, Tensor, Tensor]] = []
    skipped: dict[int, Unreadable] = {}
    rows = own_rows([1] * len(videos), 1)
    with readable_videos(videos, rows, config, "test", skipped) as readable:
        for row, video in readable:
            clips = non_overlapping(video, config.clips.frames)
            crops = [five_crops(clip, config.crop_size, corners=config.corners) for clip in clips]
            flat = torch.from_numpy(np.stack(crops)).flatten(0, 1)
            per_crop = torch.cat([scores(chunk) for chunk in flat.split(config.crop_batch)])
            per_clip = per_crop.view(len(clips), 5, -1).mean(1)
            hits = top_hits(per_clip, ids[row].expand(len(clips)), tops)
            own.append((row, per_clip.mean(0), hits))

    unreadable = merge_unreadable(skipped, len(videos))
    tested = [video for part in distributed.gather(own) for video in part]
    tested.sort(key=lambda video: video[0])
    found = np.array([row for row, _, _ in tested])
    videos, ids = videos.take(found), ids[torch.from_numpy(found)]
    mean = torch.stack([of_video for _, of_video, _ in tested])
    clip_hits = torch.cat([hits for _, _, hits in tested], dim=1)
    by_video = top_hits(mean, ids, tops).double().mean(1).tolist()
    by_clip = clip_hits.double().mean(1).tolist()
    result = TestResult(
        video_accuracy=by_video[0],
        clip_accuracy=by_clip[0],
        video_top5_accuracy=by_video[1] if 5 in tops else None,
        clip_top5_accuracy=by_clip[1] if 5 in tops else None,
        videos=len(tested),
        clips=clip_hits.shape[1],
        unreadable=unreadable,
    )
    numbers = {name: value for name, value in vars(result).items() if name != "unreadable"}
    predicted = mean.topk(max(tops)).indices[:, 0].tolist()  # as in `top_hits`, should two be equal
    predictions = [
        {"path": path, "class": classes[label], "predicted": classes[number]}
        for path, label, number in zip(videos.path.tolist(), ids.tolist(), predicted, strict=True)
    ]
    scores_file = Path(config.out) / SCORES
    distributed.on_rank0(lambda: _write_scores(scores_file, videos, ids, classes, mean))
    # Last: where it is, the other is, too.
    results.write(config, results.TEST, {**numbers, "predictions": predictions}, unreadable)
    return result


def _write_scores(
    path: Path, videos: Manifest, ids: Tensor, classes: Sequence[str], probabilities: Tensor
) -> None:
    def fill(file: BinaryIO) -> None:
        np.savez(
            file,
            paths=videos.path,
            starts=videos.start,
            labels=ids.numpy(),
            classes=np.array(classes),
            probabilities=probabilities.numpy(),
        )

    atomic.write(path, fill)
