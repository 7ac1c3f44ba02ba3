"""The whole method on toy videos: make them, pretrain, retrieve, probe, finetune, test, and compare.

The videos are real files in UCF101's layout and go through the code that UCF101 goes through; only the
encoder and the frames are small. See `hdc.data.synthetic` for what the videos show.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from hdc import atomic, probe, retrieval
from hdc.config import (
    CommandConfig,
    FeatureConfig,
    FinetuneConfig,
    PretrainConfig,
    RetrieveConfig,
    TestConfig,
    check_seed,
    finetune_augment,
)
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest, read_manifest
from hdc.data.synthetic import MOTIONS, TAKE_FRAMES, TEXTURES, make_dataset
from hdc.errors import InputError
from hdc.features import extract, load_encoder
from hdc.finetune import finetune
from hdc.optimizer import OptimizerConfig
from hdc.presets import PRESETS
from hdc.pretrain import pretrain
from hdc.progress import console, say
from hdc.recognition import TestResult, test
from hdc.retrieval import RetrievalResult
from hdc.retrieval_figure import Column, draw_retrievals

CHANCE = {
    "appearance": 100 / len(TEXTURES),
    "motion": 100 / len(MOTIONS),
    "both": 100 / (len(TEXTURES) * len(MOTIONS)),
}
RANDOM = "random"
# Each model's preset; the order is that of the table and the figure.
MODELS = {
    "SC": "table1-sc5",
    "TC": "table1-tc5",
    "SC+TC": "table1-sc5-tc5",
    "HDC": "table1-hdc",
}
FRAME, CROP = 32, 28


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Every command on generated videos.

    Attributes:
        out: folder for the videos, the runs, the table and the figure; a second call goes on from there.
        seed: decides the videos and the training.
        compare: also pretrain SC, TC and SC+TC: the paper's decoupling side by side (takes three times
            as long).
        fixed_appearance: keep a video's appearance over its takes, a shortcut for Temporal Contrast.
        train_videos: number of training videos, a multiple of five.
        test_videos: number of test videos, a multiple of five.
        epochs: passes over the training videos in pretraining.
        finetune_epochs: passes over them in finetuning.
    """

    out: str = "runs/demo"
    seed: int = 0
    compare: bool = False
    fixed_appearance: bool = False
    train_videos: int = 200
    test_videos: int = 100
    epochs: int = 70
    finetune_epochs: int = 8

    def __post_init__(self) -> None:
        for name, least in (("train_videos", 35), ("test_videos", 5)):
            if getattr(self, name) < least or getattr(self, name) % 5:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of 5, at least {least}"
                )
        for name in ("epochs", "finetune_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_seed(self.seed)


@dataclass(frozen=True)
class ModelResult:
    """What one model reached on the test videos: percentages, by label where there are several."""

    nearest: dict[str, float]
    probe: dict[str, float]
    finetuned: TestResult | None
    retrieval: RetrievalResult


def demo(config: DemoConfig) -> dict[str, ModelResult]:
    """Run the demo; prints a table and writes it, and a figure, into `config.out`."""
    began = time.monotonic()
    out = Path(config.out)
    videos, takes = _dataset(config)
    names = list(MODELS) if config.compare else ["HDC"]

    checkpoints: dict[str, str | None] = {RANDOM: None}
    for name in names:
        console.rule(f"pretrain {name}", align="left", style="dim")
        checkpoints[name] = _pretrain(config, videos, name)

    console.rule("evaluate", align="left", style="dim")
    results = {
        name: _evaluate(config, videos, takes, name, path, finetuned=name in (RANDOM, "HDC"))
        for name, path in checkpoints.items()
    }
    figure = out / "retrieval.png"
    columns = [Column(name, result.retrieval) for name, result in results.items()]
    draw_retrievals(figure, columns, labels=("motion", "appearance"), seed=config.seed)
    _write_results(out / "results.json", config, results)
    _show(results, time.monotonic() - began)
    for what, path in (
        ("nearest neighbours", figure),
        ("these numbers", out / "results.json"),
        ("videos", out / "data"),
        ("runs with logs", out),
    ):
        say(f"{what + ':':<20}{path}")
    return results


def _dataset(config: DemoConfig) -> tuple[Manifest, Manifest]:
    """The videos, made once: a second call with the same settings finds them."""
    root = Path(config.out) / "data"
    settings = {
        name: value for name, value in vars(config).items() if name not in ("out", "compare")
    }
    stamp = root / "settings.json"
    found = atomic.read_json(stamp, ("seed",))
    if found:
        if found != settings:
            raise InputError(f"{config.out} holds a demo with other settings; choose another --out")
        return read_manifest(root / "manifest.csv"), read_manifest(root / "takes.csv")
    with console.status(f"making {config.train_videos + config.test_videos} videos"):
        manifests = make_dataset(
            root,
            train=config.train_videos,
            test=config.test_videos,
            seed=config.seed,
            fixed_appearance=config.fixed_appearance,
        )
    atomic.write_json(stamp, settings)  # last: it says that the rest is complete
    return manifests


def _common(config: DemoConfig, manifest: Manifest, folder: str) -> CommandConfig:
    return CommandConfig(
        data=str(manifest.source),
        out=str(Path(config.out) / folder),
        backbone="tiny",
        clips=ClipConfig(size=FRAME, start_every=TAKE_FRAMES),
        device="cpu",
        seed=config.seed,
    )


def _pretrain(config: DemoConfig, videos: Manifest, name: str) -> str:
    preset = PRESETS[MODELS[name]]
    settings = PretrainConfig(
        **vars(_common(config, videos, f"pretrain-{name}")),
        epochs=config.epochs,
        batch_size=32,
        objective=preset.objective,
        augment=replace(preset.augment, crop_size=CROP),
        # The first gradients have a norm above 10, and unclipped they throw the embeddings together:
        # TC alone then sat at ln 32 for 130 to 330 steps, clipped for 100.
        optimizer=OptimizerConfig(clip_norm=1.0),
        resume=True,
    )
    return str(pretrain(settings, videos).checkpoint)


def _evaluate(
    config: DemoConfig,
    videos: Manifest,
    takes: Manifest,
    name: str,
    path: str | None,
    *,
    finetuned: bool,
) -> ModelResult:
    """Retrieval and probe on takes, by every label; finetuning and its test on videos, by motion."""
    settings = FeatureConfig(
        **vars(_common(config, takes, f"evaluate-{name}")),
        checkpoint=path,
        crop_size=CROP,
        pooling="average",
    )
    backbone = load_encoder(settings, path, takes)
    gallery, queries = (extract(settings, backbone, takes, part) for part in ("train", "test"))
    retrievals = {label: retrieval.score(queries, gallery, takes, label) for label in CHANCE}
    probes = {label: probe.score(gallery, queries, takes, label, l2=1e-3) for label in CHANCE}
    retrieval.write(RetrieveConfig(**{**vars(settings), "label": "both"}), retrievals["both"])
    return ModelResult(
        nearest={label: 100 * result.accuracy[1] for label, result in retrievals.items()},
        probe={label: 100 * result.test_accuracy for label, result in probes.items()},
        finetuned=_finetune_and_test(config, videos, name, path) if finetuned else None,
        retrieval=retrievals["both"],
    )


def _finetune_and_test(
    config: DemoConfig, videos: Manifest, name: str, path: str | None
) -> TestResult:
    trained = finetune(
        FinetuneConfig(
            **vars(_common(config, videos, f"finetune-{name}")),
            checkpoint=path,
            epochs=config.finetune_epochs,
            batch_size=32,
            augment=finetune_augment(CROP),
            resume=True,
        ),
        videos,
    )
    return test(
        TestConfig(
            **vars(_common(config, videos, f"finetune-{name}")),
            checkpoint=str(trained.checkpoint),
            crop_size=CROP,
        ),
        videos,
    )


def _write_results(path: Path, config: DemoConfig, results: dict[str, ModelResult]) -> None:
    summary = {
        "config": vars(config),
        "models": {
            name: {
                "nearest": result.nearest,
                "probe": result.probe,
                **(
                    {
                        "finetuned_video": 100 * result.finetuned.video_accuracy,
                        "finetuned_clip": 100 * result.finetuned.clip_accuracy,
                    }
                    if result.finetuned
                    else {}
                ),
            }
            for name, result in results.items()
        },
    }
    atomic.write_json(path, summary)


def _show(results: dict[str, ModelResult], seconds: float) -> None:
    """The table: one column per model, the best of each row in bold."""
    rows: list[tuple[str, Sequence[float | None], float]] = [
        *(
            (f"nearest, {label}", [r.nearest[label] for r in results.values()], chance)
            for label, chance in CHANCE.items()
        ),
        *(
            (f"probe, {label}", [r.probe[label] for r in results.values()], chance)
            for label, chance in CHANCE.items()
        ),
        (
            "finetuned, motion",
            [100 * r.finetuned.video_accuracy if r.finetuned else None for r in results.values()],
            CHANCE["motion"],
        ),
    ]
    table = Table(title="top-1 accuracy on the test videos, %", title_justify="left")
    table.add_column(no_wrap=True)
    for name in results:
        table.add_column(name, justify="right")
    table.add_column("chance", justify="right", style="dim")
    for what, values, chance in rows:
        best = max(value for value in values if value is not None)
        cells = [
            "–" if value is None else Text(f"{value:.1f}", style="bold" if value == best else "")
            for value in values
        ]
        table.add_row(what, *cells, f"{chance:.1f}", end_section=what.endswith("both"))
    console.print(table)
    console.print(
        "nearest: the nearest training take has the same label; probe: a linear classifier on frozen "
        "features finds the label; finetuned: all weights trained on the labels, five crops × clips",
        style="dim",
    )
    say(f"{seconds:.0f} seconds")
