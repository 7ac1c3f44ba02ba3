"""Action recognition over the splits of a dataset: finetune and test on each, and average."""

from dataclasses import dataclass, fields
from pathlib import Path

from hdc import checkpoint, results
from hdc.config import FinetuneConfig, RecognizeConfig, TestConfig, shared
from hdc.data.clips import Unreadable
from hdc.data.manifest import Manifest
from hdc.finetune import finetune
from hdc.finetune import finished as finetuned
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
    """splits: by their numbers. The accuracies are the means over the splits, each counting the same.

    unreadable: the test videos that were left out, each once.
    """

    splits: dict[int, SplitResult]
    video_accuracy: float
    clip_accuracy: float
    unreadable: list[Unreadable]


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
    found: list[_Tested] = []
    for split in config.splits:
        console.rule(f"split {split}", align="left", style="dim")
        known = _known(config, manifest, split) if config.resume else None
        found.append(known or _finetune_and_test(config, manifest, split))
    result = _mean(config, found)
    summary = {
        "splits": {str(split): vars(numbers) for split, numbers in result.splits.items()},
        "mean": {"video_accuracy": result.video_accuracy, "clip_accuracy": result.clip_accuracy},
    }
    results.write(config, results.RECOGNITION, summary, result.unreadable)
    return result


def finished(config: RecognizeConfig, manifest: Manifest) -> RecognitionResult | None:
    """What `recognize` has come to, where nothing is left to do for any of its splits.

    Raises:
        InputError: as `hdc.training.finished`.
    """
    found = []
    for split in config.splits:
        known = _known(config, manifest, split)
        if known is None:
            return None
        found.append(known)
    return _mean(config, found)


_Tested = tuple[SplitResult, list[Unreadable]]  # of one split, with what its test left out


def _mean(config: RecognizeConfig, found: list[_Tested]) -> RecognitionResult:
    numbers = [result for result, _ in found]
    video, clip = (
        sum(getattr(result, name) for result in numbers) / len(numbers)
        for name in ("video_accuracy", "clip_accuracy")
    )
    unreadable = dict.fromkeys(entry for _, entries in found for entry in entries)
    by_split = dict(zip(config.splits, numbers, strict=True))
    return RecognitionResult(by_split, video, clip, list(unreadable))


def _known(config: RecognizeConfig, manifest: Manifest, split: int) -> _Tested | None:
    """What a split's folder holds; None unless it is of these very settings, weights and videos."""
    first, second = _parts(config, split)
    if not finetuned(first, manifest):
        return None
    known = results.finished(second, results.TEST)
    if not known:
        return None
    numbers = SplitResult(**{field.name: known[field.name] for field in fields(SplitResult)})
    return numbers, [Unreadable(**entry) for entry in known["unreadable"]]


def _finetune_and_test(config: RecognizeConfig, manifest: Manifest, split: int) -> _Tested:
    first, second = _parts(config, split)
    finetune(first, manifest)
    tested = test(second, manifest)
    numbers = {field.name: getattr(tested, field.name) for field in fields(SplitResult)}
    return SplitResult(**numbers), tested.unreadable


def _parts(config: RecognizeConfig, split: int) -> tuple[FinetuneConfig, TestConfig]:
    """The commands that a split consists of."""
    out = Path(config.out) / f"split{split}"
    place = {"out": str(out), "split": split}
    weights = str(out / checkpoint.FILE)
    return (
        FinetuneConfig(**shared(config, FinetuneConfig) | place),
        TestConfig(**shared(config, TestConfig) | place | {"checkpoint": weights}),
    )
