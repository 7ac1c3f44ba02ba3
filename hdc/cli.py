"""`hdc-train`: pretrain, finetune, test, probe, retrieve, a demo of all of them, prepare and pack
before them, report and export after them.

Exit codes: 0 done, 1 `prepare --check` found differences, 2 something given was wrong (one line on stderr
says what), 3 another process of a run under torchrun died or hangs, 130 interrupted.
"""

import argparse
import dataclasses
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.table import Table

from hdc import atomic, distributed, environment, results
from hdc.config import (
    CommandConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    RecognizeConfig,
    RetrieveConfig,
    RunConfig,
    TestConfig,
    TrainConfig,
    shared,
)
from hdc.data.dataset import open_data
from hdc.data.pack import PackConfig, pack
from hdc.data.prepare import BAD_FILES, DATASETS, MISSING, PrepareConfig, check, prepare
from hdc.demo import DemoConfig, demo
from hdc.errors import InputError, reason
from hdc.export import export
from hdc.finetune import finetune
from hdc.help import HelpFormatter
from hdc.options import command_line, defaults
from hdc.paper import TABLES, preset_figures
from hdc.presets import PRESETS
from hdc.pretrain import pretrain
from hdc.probe import probe
from hdc.progress import ProgressBar, console, say
from hdc.recognition import SCORES, test
from hdc.report import ReportConfig, report
from hdc.reproduce import ReproduceConfig, reproduce
from hdc.retrieval import retrieve
from hdc.splits import recognize
from hdc.training import TrainedRun

START = "hdc-train demo"


def run_pretrain(config: PretrainConfig) -> None:
    """Learn a video representation without labels (HD-NCE)."""
    run = pretrain(config, open_data(config.data))
    _show_run(config, run, "retrieve")


def run_finetune(config: FinetuneConfig) -> None:
    """Train a classifier from pretrained weights, or from scratch."""
    run = finetune(config, open_data(config.data))
    _show_run(config, run, "test")


def run_test(config: TestConfig) -> None:
    """Recognise actions with a finetuned model (5 crops × clips)."""
    result = test(config, open_data(config.data))
    top5 = result.video_top5_accuracy is not None
    table = Table("accuracy", "top-1 %", *["top-5 %"] * top5, "of")
    for name, shares, of in (
        ("video", (result.video_accuracy, result.video_top5_accuracy), f"{result.videos} videos"),
        ("clip", (result.clip_accuracy, result.clip_top5_accuracy), f"{result.clips} clips"),
    ):
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares if share is not None), of)
    console.print(table)
    _show_written(config.out, results.TEST)
    _show_written(config.out, SCORES)


def run_recognize(config: RecognizeConfig) -> None:
    """Finetune and test on every split, and average."""
    result = recognize(config, open_data(config.data))
    table = Table("split", "video top-1 %", "clip top-1 %", "videos", "clips")
    for split, found in result.splits.items():
        shares = (f"{100 * found.video_accuracy:.1f}", f"{100 * found.clip_accuracy:.1f}")
        last = split == config.splits[-1]
        table.add_row(f"{split}", *shares, f"{found.videos}", f"{found.clips}", end_section=last)
    shares = (f"{100 * result.video_accuracy:.1f}", f"{100 * result.clip_accuracy:.1f}")
    table.add_row("mean", *shares)
    console.print(table)
    _show_written(config.out, results.RECOGNITION)


def run_probe(config: ProbeConfig) -> None:
    """Classify by frozen features: linear probe and kNN."""
    linear, vote = probe(config, open_data(config.data))
    table = Table("on frozen features", "top-1 %")
    table.add_row("linear classifier", f"{100 * linear.test_accuracy:.1f}")
    table.add_row(
        "the same, training videos", f"{100 * linear.train_accuracy:.1f}", end_section=True
    )
    table.add_row(f"{vote.neighbors} nearest, weighted vote", f"{100 * vote.weighted:.1f}")
    table.add_row(f"{vote.neighbors} nearest, majority", f"{100 * vote.majority:.1f}")
    console.print(table)
    _show_written(config.out, results.PROBE)
    _show_written(config.out, results.KNN)


def run_retrieve(config: RetrieveConfig) -> None:
    """Find each test video's nearest training videos."""
    result = retrieve(config, open_data(config.data))
    table = Table("retrieval", *(f"top-{k}" for k in result.accuracy))
    table.add_row("hits %", *(f"{100 * value:.1f}" for value in result.accuracy.values()))
    console.print(table)
    _show_written(config.out, results.RETRIEVAL)


def run_reproduce(config: ReproduceConfig, table: str) -> None:
    """Run the rows of one of the paper's tables, beside its figures."""
    reproduce(config, table)
    if not config.dry_run:
        _show_written(config.out, f"{table}.json")
        _show_next("report", config.out)


def run_demo(config: DemoConfig) -> None:
    """All of it on generated videos, in minutes on a CPU: start here."""
    demo(config)


@dataclasses.dataclass(frozen=True)
class Place:
    """An argument without a name."""

    name: str
    help: str
    choices: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return "{" + ",".join(self.choices) + "}" if self.choices else self.name


def run_prepare(config: PrepareConfig, dataset: str, source: str, target: str) -> int:
    """Make a downloaded dataset small, quick to read, free of bad files."""
    target_folder = Path(target)
    with ProgressBar("checking" if config.check else "preparing", 1) as bar:

        def progress(done: int, total: int, bad: int) -> None:
            bar.set(bar.done, total)
            bar.advance(done - bar.done, f"{bad} bad")

        if config.check:
            differences = check(target_folder, progress)
        else:
            result = prepare(dataset, Path(source), target_folder, config, progress)
    if config.check:
        print(*differences or [f"{target} is as its manifest says"], sep="\n")
        return 1 if differences else 0
    good, missing = len(result.manifest), list(result.bad.values()).count(MISSING)
    summary = f"{good} videos in {result.manifest.source}"
    if result.bad:
        summary += f"; {missing} missing and {len(result.bad) - missing} bad, see {target_folder / BAD_FILES}"
    show = ["nothing was left to do", summary] if not result.changed else [summary]
    for line in show:
        say(line)
    _show_next("pretrain", f"--data={target}")
    return 0


def run_pack(config: PackConfig, data: str) -> None:
    """Decode a prepared dataset to disk, so that training need not."""
    with ProgressBar("packing", 1) as bar:
        packed = pack(Path(data), config, say, bar.set)
    say(f"{packed.folder} is whole: runs with --clips.size {config.short_side} read it")


def run_report(config: ReportConfig, run: str) -> None:
    """Show a run, or a folder of runs, as one HTML page."""
    path = report(Path(run), config)
    size = path.stat().st_size / 1024
    say(f"wrote {path} ({size:,.0f} KiB)")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Nothing to choose."""


def run_export(config: ExportConfig, run: str, target: str) -> None:
    """Write a run's encoder as safetensors, with a model card."""
    path = export(Path(run), Path(target))
    say(f"wrote {path}")
    say(f"next: hdc.load_backbone({target!r}) in Python")


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its configuration and what it runs. The docstring of `run` is its summary.

    `run` gets the configuration and then the places, which are given without a name.
    """

    config: type
    run: Callable[..., int | None]
    example: str
    places: tuple[Place, ...] = ()


COMMANDS = {
    "demo": Command(DemoConfig, run_demo, "hdc-train demo --compare"),
    "pretrain": Command(
        PretrainConfig, run_pretrain, "hdc-train pretrain --data ucf101 --preset table1-hdc"
    ),
    "finetune": Command(
        FinetuneConfig,
        run_finetune,
        "hdc-train finetune --data ucf101 --checkpoint runs/pretrain/checkpoint.pt",
    ),
    "test": Command(
        TestConfig,
        run_test,
        "hdc-train test --data ucf101 --checkpoint runs/finetune/checkpoint.pt",
    ),
    "recognize": Command(
        RecognizeConfig,
        run_recognize,
        "hdc-train recognize --data ucf101 --checkpoint runs/pretrain/checkpoint.pt",
    ),
    "probe": Command(
        ProbeConfig,
        run_probe,
        "hdc-train probe --data ucf101 --checkpoint runs/pretrain/checkpoint.pt",
    ),
    "retrieve": Command(
        RetrieveConfig,
        run_retrieve,
        "hdc-train retrieve --data ucf101 --checkpoint runs/pretrain/checkpoint.pt",
    ),
    "reproduce": Command(
        ReproduceConfig,
        run_reproduce,
        "hdc-train reproduce table1 --kinetics400 data/kinetics400 --ucf101 data/ucf101",
        (Place("TABLE", "which of the paper's results", tuple(TABLES)),),
    ),
    "prepare": Command(
        PrepareConfig,
        run_prepare,
        "hdc-train prepare ucf101 downloads/ucf101 data/ucf101",
        (
            Place("DATASET", "how SRC is laid out", tuple(DATASETS)),
            Place("SRC", "the dataset's folder, as it came"),
            Place("DST", "the folder to write; killed at any moment, the same command goes on"),
        ),
    ),
    "pack": Command(
        PackConfig,
        run_pack,
        "hdc-train pack data/ucf101",
        (Place("DATA", "a prepared folder, or a manifest; killed, the same command goes on"),),
    ),
    "report": Command(
        ReportConfig,
        run_report,
        "hdc-train report runs/demo",
        (Place("RUN", "the folder of a run, or of several"),),
    ),
    "export": Command(
        ExportConfig,
        run_export,
        "hdc-train export runs/pretrain models/hdc",
        (
            Place("RUN", "the folder of a pretraining or finetuning run"),
            Place("DST", "the folder to write"),
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every mistake of the user into one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with distributed.session(), _system_errors():
            return _carry_out(arguments)
    except (InputError, argparse.ArgumentError) as error:
        print(f"hdc-train: {one_line(error)}", file=sys.stderr)
        return 2
    except distributed.RankLost as error:
        print(f"hdc-train: {one_line(error)}", file=sys.stderr)
        return 3
    except SystemExit as end:  # after --help, or because another rank has said why
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(
            "hdc-train: interrupted; a training run goes on with --resume, prepare and reproduce without",
            file=sys.stderr,
        )
        return 130


@contextmanager
def _system_errors() -> Iterator[None]:
    """What the operating system says about a file is the user's to mend: a folder that is not theirs, a full disk.

    Raises:
        InputError: "path: reason". An error about no file is taken for a bug, and goes on as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise InputError(f"{error.filename}: {reason(error)}") from error


def _carry_out(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"hdc-train {environment.package_version('hdc') or 'of a checkout, not installed'}")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        raise InputError(f"{name!r} is no command; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    config, places = parse(name, command, options)
    if distributed.world() > 1 and not isinstance(config, RunConfig):
        raise InputError(f"{name} is for one process; start it without torchrun")
    if isinstance(config, RunConfig | DemoConfig) and not config.out:
        raise InputError("out is empty; it must name a folder")
    if isinstance(config, CommandConfig | DemoConfig):
        distributed.on_rank0(lambda: atomic.check_folder(Path(config.out)))
    return command.run(config, *places) or 0


def overview() -> str:
    """What `hdc-train` alone prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "hdc-train: self-supervised video representations by Hierarchically Decoupled",
        "Spatial-Temporal Contrast (HDC).",
        "",
        *(f"  {name:<{width}}{command.run.__doc__}" for name, command in COMMANDS.items()),
        "",
        f"Start with:   {START}",
        "Options of a command:   hdc-train COMMAND --help",
    ]
    return "\n".join(lines)


def parse(name: str, command: Command, options: list[str]) -> tuple[Any, list[str]]:
    """The command's configuration out of defaults, preset, YAML file and options, in that order; its places.

    Raises:
        InputError, argparse.ArgumentError: for anything that is unknown, missing or of a wrong type.
    """
    epilog = f"example: {command.example}"
    if command.config is PretrainConfig:
        epilog = f"{_preset_table()}\n\n{epilog}"
    parser = ArgumentParser(
        prog=f"hdc-train {name}",
        usage=" ".join(["hdc-train", name, *map(str, command.places), "[--option value ...]"]),
        description=command.run.__doc__,
        epilog=epilog,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of options (a run writes its own)"
    )
    for place in command.places:
        limits: dict[str, Any] = {"choices": place.choices} if place.choices else {}
        parser.add_argument(place.name.lower(), metavar=place.name, help=place.help, **limits)
    fields = [field for field in dataclasses.fields(command.config) if field.init]
    switches = [f.name for f in fields if f.default is False]
    parser.add_class_arguments(command.config, skip=set(switches))
    descriptions = _attribute_docs(command.config)
    for switch in switches:
        names = sorted({f"--{switch.replace('_', '-')}", f"--{switch}"})
        parser.add_argument(*names, action="store_true", help=descriptions[switch])
    if command.config is PretrainConfig:
        parser.add_argument(
            "--preset", type=str, metavar="NAME", help="a row of the paper's tables, see below"
        )
        options = _apply_preset(parser, options)
    values = parser.instantiate(parser.parse_args(options))
    if values.get("preset"):
        raise InputError("preset is in a --config file; it is an option of the command line only")
    config = command.config(**{f.name: values[f.name] for f in fields})
    return config, [values[place.name.lower()] for place in command.places]


def _attribute_docs(config: type) -> dict[str, str]:
    """The "Attributes" of a configuration's docstring and of its parents'."""
    found: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        text = re.sub(r"\n {10,}", " ", parent.__doc__ or "")
        found |= dict(re.findall(r"^ {8}(\w+): (.+)$", text, flags=re.MULTILINE))
    return found


def _preset_table() -> str:
    """Every preset with what it stands for, and what the paper reaches with it."""
    lines = [
        "Presets (top-1 accuracy % that the paper reports after finetuning on UCF101 split 1):"
    ]
    figures = preset_figures()
    for name, preset in PRESETS.items():
        figure = f"{figures[name]:.1f}" if name in figures else "–"
        lines.append(f"  {name:<32}{figure:>4}  {preset.summary}")
    return "\n".join(lines)


def _apply_preset(parser: ArgumentParser, options: list[str]) -> list[str]:
    """Make the preset's values the defaults, so that a file or an option can still change them; the other options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset")
    found, others = finder.parse_known_args(options)
    name = found.preset
    if name is None:
        return others
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    for group in ("objective", "augment"):
        for key, value in dataclasses.asdict(getattr(PRESETS[name], group)).items():
            parser.set_defaults({f"{group}.{key}": value})
    return others


def one_line(error: Exception) -> str:
    """The message without line breaks, and without the parser's internal names."""
    text = " ".join(str(error).split())
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    return re.sub(r"Expected an? (.*)\. Got value: ", r"expected \1, got ", text)


def _show_run(config: TrainConfig, run: TrainedRun, evaluation: str) -> None:
    """What a training wrote, and the command that evaluates it with the same options."""
    if not run.metrics:
        say("nothing was left to do")
    say(f"wrote {run.checkpoint} and {run.checkpoint.parent}/metrics.jsonl")
    kind = COMMANDS[evaluation].config
    following = kind(**shared(config, kind) | {"checkpoint": str(run.checkpoint)})
    say(f"next: {command_line(['hdc-train', evaluation], following, defaults(kind))}")


def _show_next(*words: str) -> None:
    say(f"next: {shlex.join(['hdc-train', *words])}")


def _show_written(out: str, name: str) -> None:
    say(f"wrote {Path(out) / name}")


def run() -> NoReturn:
    """The entry point `hdc-train`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII alone shows "−" as "\u2212"
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where Python flushes to at its end
        code = 1
    distributed.leave(code)


if __name__ == "__main__":
    run()
