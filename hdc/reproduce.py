"""The paper's tables, computed anew: a row's runs are begun, gone on with, or found done already.

    OUT/<encoder>-<preset>              pretraining, shared by all rows that pretrain alike
    OUT/<encoder>-<preset>-<dataset>    what is evaluated with it, by `recognize` (a folder a split) or `retrieve`
    OUT/<table>.json                    the paper's figures beside these

All tables may have the same OUT, and then share more. Every run is that of a command with the options
that `--dry-run` prints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table as Shown

from hdc import atomic, distributed, pretrain, results, retrieval, splits
from hdc.backbones import BackboneName
from hdc.config import (
    CommandConfig,
    PretrainConfig,
    RecognizeConfig,
    RetrieveConfig,
    RunConfig,
    TrainConfig,
    finetune_augment,
)
from hdc.data.clips import Unreadable
from hdc.data.dataset import open_data
from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.optimizer import OptimizerConfig
from hdc.options import command_line, defaults
from hdc.paper import DATASETS, TABLES, Row, Table
from hdc.presets import PRESETS
from hdc.progress import console, say
from hdc.views import AugmentConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast a network is trained.

    Attributes:
        epochs: passes over the training list.
        batch_size: videos in a step.
    """

    epochs: int
    batch_size: int
    optimizer: OptimizerConfig


def _schedule(kind: type[PretrainConfig | RecognizeConfig]) -> ScheduleConfig:
    """The one that the command has without options."""
    default = defaults(kind)
    return ScheduleConfig(default.epochs, default.batch_size, default.optimizer)


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig:
    """The datasets of the paper.

    Attributes:
        kinetics400: manifest or prepared folder of Kinetics-400, to pretrain on; null skips the rows that need it.
        ucf101: manifest or prepared folder of UCF101; null skips the rows that need it.
        hmdb51: manifest or prepared folder of HMDB51; null skips the rows that need it.
    """

    kinetics400: str | None = None
    ucf101: str | None = None
    hmdb51: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(
    RunConfig, DatasetsConfig
):  # the help lists the fields of the last base first
    """How the rows of a table are run.

    Attributes:
        out: folder for all runs; tables that share it share runs. A second call goes on from there.
        rows: short names of the rows to run (--dry-run lists them); null for all.
        backbone: the encoder of all rows; null takes each row's own.
        crop_size: side in pixels of what the encoder sees.
        pretrain: How long and how fast pretraining goes
        finetune: How long and how fast finetuning goes
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        dry_run: change nothing; print the commands that the table consists of, as a shell script.
    """

    out: str = "runs/reproduce"
    rows: tuple[str, ...] | None = None
    backbone: BackboneName | None = None
    crop_size: int = 112
    pretrain: ScheduleConfig = field(default_factory=lambda: _schedule(PretrainConfig))
    finetune: ScheduleConfig = field(default_factory=lambda: _schedule(RecognizeConfig))
    checkpoint_every: int = TrainConfig.checkpoint_every
    log_every: int = TrainConfig.log_every
    dry_run: bool = False


@dataclass(frozen=True)
class Step:
    """A command of `hdc-train`; `preset` is the one that a pretraining's options begin with."""

    command: str
    config: PretrainConfig | RecognizeConfig | RetrieveConfig
    preset: str | None = None

    def __str__(self) -> str:
        """As one types it: the options that are not the command's defaults."""
        words = ["hdc-train", self.command]
        usual: CommandConfig = defaults(type(self.config))
        if self.preset:
            words.append(f"--preset={self.preset}")
            usual = replace(usual, **_settings(self.preset, AugmentConfig.crop_size))
        return command_line(words, self.config, usual)


@dataclass(frozen=True)
class Cell:
    """A row on a dataset, with its steps in their order; `needs` are the options that they lack."""

    name: str
    row: Row
    dataset: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """What the last step of a cell measured: k → top-k accuracy in percent, and the videos it left out."""

    top: dict[int, float]
    unreadable: list[Unreadable]


def reproduce(config: ReproduceConfig, name: str) -> dict[tuple[str, str], Figures]:
    """Run what is not done of the table `name`; prints it and writes `<name>.json` into `config.out`.

    Returns:
        The figures by (row, dataset).

    Raises:
        InputError: as the commands; a row that the table does not have, no row with all that it needs, an
            `out` with runs of other settings.
    """
    cells = plan(config, TABLES[name])
    complete = [cell for cell in cells if not cell.needs]
    if not complete:
        needs = dict.fromkeys(need for cell in cells for need in cell.needs)
        raise InputError(f"{name} needs {' and '.join(needs)}")
    manifests = _Manifests()
    if config.dry_run:
        for line in _script(name, cells, manifests):
            say(line)
        return {}
    distributed.on_rank0(lambda: atomic.check_folder(Path(config.out)))
    for cell in complete:  # what is wrong should show before the work
        for step in cell.steps:
            _check(step, manifests.open(step))
            _known(step, manifests)
    found: dict[tuple[str, str], Figures] = {}
    for cell in complete:
        for step in cell.steps:
            figures = _known(step, manifests)
            if figures is None:
                console.rule(f"{cell.row.title}: {step.command}", align="left", style="dim")
                _run(step, manifests.open(step))
                figures = _known(step, manifests)
        assert figures is not None  # a run leaves what `_known` looks for
        found[cell.name, cell.dataset] = figures
        _write(config, name, cells, found)
    _show(name, cells, found)
    return found


def plan(config: ReproduceConfig, table: Table) -> list[Cell]:
    """What the rows consist of, in the table's order.

    Raises:
        InputError: `config.rows` names one that is not there; a schedule or a size that cannot be.
    """
    for name in config.rows or ():
        if name not in table.rows:
            raise InputError(f"rows has {name!r}; the table has {', '.join(table.rows)}")
    return [
        _cell(config, table, name, dataset)
        for name in config.rows or table.rows
        for dataset in table.rows[name].figures
    ]


def _cell(config: ReproduceConfig, table: Table, name: str, dataset: str) -> Cell:
    row = table.rows[name]
    used = ("kinetics400", dataset) if row.preset else (dataset,)
    sources = {key: getattr(config, key) or "" for key in used}
    backbone = config.backbone or row.backbone
    preset = _first_alike(row.preset) if row.preset else None
    encoder = str(Path(config.out) / f"{backbone}-{preset or 'random'}")
    same = {f.name: getattr(config, f.name) for f in fields(RunConfig)} | {"backbone": backbone}
    training = {
        "checkpoint_every": config.checkpoint_every,
        "log_every": config.log_every,
        "resume": True,
    }
    steps = []
    if preset:
        settings = _settings(preset, config.crop_size) | training | vars(config.pretrain)
        place = {"data": sources["kinetics400"], "out": encoder}
        steps.append(Step("pretrain", PretrainConfig(**same | settings | place), preset))
    place = {"data": sources[dataset], "out": f"{encoder}-{dataset}"}
    start = {"checkpoint": encoder if preset else None}
    if table.command == "recognize":
        settings = training | vars(config.finetune) | {"splits": table.splits}
        settings["augment"] = finetune_augment(config.crop_size)
        steps.append(Step("recognize", RecognizeConfig(**same | settings | start | place)))
    else:
        settings = {"split": table.splits[0], "crop_size": config.crop_size}
        steps.append(Step("retrieve", RetrieveConfig(**same | settings | start | place)))
    needs = tuple(f"--{key}" for key in used if not sources[key])
    return Cell(name, row, dataset, tuple(steps), needs)


def _settings(preset: str, crop_size: int) -> dict[str, Any]:
    """The options that a preset stands for, at this size."""
    given = PRESETS[preset]
    return {"objective": given.objective, "augment": replace(given.augment, crop_size=crop_size)}


def _first_alike(name: str) -> str:
    """The first preset with the settings of the preset `name`: a table may repeat another one's row."""
    given = PRESETS[name]
    return next(
        other
        for other, preset in PRESETS.items()
        if (preset.objective, preset.augment) == (given.objective, given.augment)
    )


class _Manifests:
    """Each one read once, when it is first asked for."""

    def __init__(self) -> None:
        self.found: dict[str, Manifest] = {}

    def open(self, step: Step) -> Manifest:
        data = step.config.data
        if data not in self.found:
            self.found[data] = open_data(data)
        return self.found[data]


def _check(step: Step, manifest: Manifest) -> None:
    """Raises InputError when `manifest` lacks what the step needs only after hours."""
    config = step.config
    for split in config.splits if isinstance(config, RecognizeConfig) else (config.split,):
        manifest.rows("train", split).check_files()
        if not isinstance(config, PretrainConfig):
            manifest.rows("test", split).check_files()
            manifest.labels(config.label)


def _known(step: Step, manifests: _Manifests) -> Figures | None:
    """What a step that is done has come to, nothing being computed; None for one that is not.

    Raises:
        InputError: its folder is of other settings.
    """
    config = step.config
    if not distributed.on_rank0(lambda: Path(config.out).exists()):
        return None
    if isinstance(config, PretrainConfig):
        return Figures({}, []) if pretrain.finished(config, manifests.open(step)) else None
    if isinstance(config, RecognizeConfig):
        result = splits.finished(config, manifests.open(step))
        return Figures({1: 100 * result.video_accuracy}, result.unreadable) if result else None
    different = results.different(config, results.RETRIEVAL)
    if different:
        raise InputError(
            f"{Path(config.out) / results.RETRIEVAL} was made with different {', '.join(different)}; "
            "choose another --out"
        )
    found = results.finished(config, results.RETRIEVAL)
    if not found:
        return None
    top = {k: 100 * found["accuracy"][f"top{k}"] for k in retrieval.TOP}
    return Figures(top, [Unreadable(**entry) for entry in found["unreadable"]])


def _run(step: Step, manifest: Manifest) -> None:
    config = step.config
    if isinstance(config, PretrainConfig):
        pretrain.pretrain(config, manifest)
    elif isinstance(config, RecognizeConfig):
        splits.recognize(config, manifest)
    else:
        retrieval.retrieve(config, manifest)


def _script(name: str, cells: Sequence[Cell], manifests: _Manifests) -> Iterator[str]:
    """A shell script: the commands to run, and as comments what they are for and what is done."""
    yield f"# {name}: {TABLES[name].summary}"
    listed: set[str] = set()
    last = ""
    for cell in cells:
        if cell.name != last:
            yield f"\n# {cell.name}: {cell.row.title}"
            last = cell.name
        if cell.needs:
            yield f"# {_skipped(cell)}"
            continue
        for step in cell.steps:
            if str(step) in listed:
                continue
            listed.add(str(step))
            yield f"{step}" if _known(step, manifests) is None else f"# done: {step}"


def _skipped(cell: Cell) -> str:
    place = f"{cell.row.title} on {DATASETS[cell.dataset]}"
    return f"{place}: skipped, needs {' and '.join(cell.needs)}"


def _lines(
    cells: Sequence[Cell], found: dict[tuple[str, str], Figures]
) -> Iterator[tuple[Cell, int, float | None, float | None]]:
    """For every figure of the table its cell, k, the paper's percentage and the one found here."""
    for cell in cells:
        here = found.get((cell.name, cell.dataset))
        for k, paper in cell.row.figures[cell.dataset].items():
            yield cell, k, paper, here.top[k] if here else None


def _gap(paper: float | None, here: float | None) -> float | None:
    return None if paper is None or here is None else here - paper


def _write(
    config: ReproduceConfig,
    name: str,
    cells: Sequence[Cell],
    found: dict[tuple[str, str], Figures],
) -> None:
    """Percentages, unlike the other results: it is how the paper has them."""
    lines = [
        {
            "row": cell.name,
            "title": cell.row.title,
            "dataset": cell.dataset,
            "k": k,
            "paper": paper,
            "here": here,
            "gap": _gap(paper, here),
            "run": cell.steps[-1].config.out,
        }
        for cell, k, paper, here in _lines(cells, found)
    ]
    values = {"table": name, "summary": TABLES[name].summary, "percent": lines}
    unreadable = dict.fromkeys(entry for figures in found.values() for entry in figures.unreadable)
    results.write(config, f"{name}.json", values, list(unreadable))


def _show(name: str, cells: Sequence[Cell], found: dict[tuple[str, str], Figures]) -> None:
    several = TABLES[name].command == "retrieve"
    say(f"{name}: {TABLES[name].summary}")
    shown = Shown("row", "dataset")
    for header in (*(["top-k"] if several else []), "paper %", "here %", "gap"):
        shown.add_column(header, justify="right", no_wrap=True)
    for cell, k, paper, here in _lines(cells, found):
        gap = _gap(paper, here)
        shown.add_row(
            cell.row.title,
            DATASETS[cell.dataset],
            *([f"{k}"] if several else []),
            *("–" if value is None else f"{value:.1f}" for value in (paper, here)),
            "–" if gap is None else f"{gap:+.1f}",
        )
    console.print(shown)
    for cell in cells:
        if cell.needs:
            say(_skipped(cell))
