"""Action recognition over the splits of a dataset: finetune and test on each, and average."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hdc import results
from hdc.config import FinetuneConfig, RecognizeConfig, TestConfig
from hdc.data.clips import Unreadable
from hdc.data.manifest import Manifest
from hdc.finetune import finetune
from hdc.progress import console
from hdc.recognition import test


@dataclass(frozen=True)
class SplitResult:
    """Top-1 accuracies on one split's test list, and of how many videos and clips; see `hdc.recognition`."""

    video_accuracy: float
    clip_accuracy: float
    videos: int
    clips: int


@dataclass(frozen=True)
class RecognitionResult:
    """splits: by their numbers. The accuracies are the means over the splits, each counting the same."""

    splits: dict[int, SplitResult]
    video_accuracy: float
    clip_accuracy: float


def recognize(config: RecognizeConfig, manifest: Manifest) -> RecognitionResult:
    """Finetune and test on each of `config.splits`; writes `recognition.json` into `config.out`.

    A split has the folder `split1`, ... there, with what finetuning and testing leave. With `config.resume`,
    a split goes on where it was, and one that is done is read.

    Raises:
        InputError: as `finetune` and `test`; a split that `manifest` does not have.
    """
    for split in config.splits:  # a missing one should fail before the work
        for part in ("train", "test"):
            manifest.rows(part, split).labels(config.label)
    found: dict[int, SplitResult] = {}
    unreadable: list[Unreadable] = []
    for split in config.splits:
        console.rule(f"split {split}", align="left", style="dim")
        found[split], left_out = _finetune_and_test(config, manifest, split)
        unreadable += left_out
    video, clip = (
        sum(getattr(result, name) for result in found.values()) / len(found)
        for name in ("video_accuracy", "clip_accuracy")
    )
    summary = {
        "splits": {str(split): vars(result) for split, result in found.items()},
        "mean": {"video_accuracy": video, "clip_accuracy": clip},
    }
    results.write(config, results.RECOGNITION, summary, list(dict.fromkeys(unreadable)))
    return RecognitionResult(found, video, clip)


def _finetune_and_test(
    config: RecognizeConfig, manifest: Manifest, split: int
) -> tuple[SplitResult, list[Unreadable]]:
    """The result of one split, and what its test left out."""
    out = str(Path(config.out) / f"split{split}")
    trained = finetune(
        FinetuneConfig(**{**_shared(config, FinetuneConfig), "out": out, "split": split}), manifest
    )
    test_config = TestConfig(
        **{
            **_shared(config, TestConfig),
            "out": out,
            "split": split,
            "checkpoint": str(trained.checkpoint),
        },
        crop_size=config.augment.crop_size,
    )
    known = results.finished(test_config, results.TEST) if config.resume else {}
    if known:
        numbers = {field.name: known[field.name] for field in fields(SplitResult)}
        return SplitResult(**numbers), [Unreadable(**entry) for entry in known["unreadable"]]
    tested = test(test_config, manifest)
    numbers = {field.name: getattr(tested, field.name) for field in fields(SplitResult)}
    return SplitResult(**numbers), tested.unreadable


def _shared(config: RecognizeConfig, kind: type[FinetuneConfig | TestConfig]) -> dict[str, Any]:
    """The options of `config` that `kind` has, too."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(config)}
    return {name: getattr(config, name) for name in names}
