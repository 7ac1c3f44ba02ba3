"""Give a trained encoder away: its weights as safetensors and a model card, in a folder of their own.

`hdc.load_backbone` reads the folder. Optimizer, projections and classifier stay behind, and so does what
belongs to one machine: paths and devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from hdc import atomic, checkpoint, results
from hdc.backbones.exchange import WEIGHTS, pack_backbone
from hdc.config import plain
from hdc.errors import InputError
from hdc.report.records import RESULTS, read_record, read_result

CARD = "README.md"
PRIVATE = {"out", "device", "workers", "resume", "data", "checkpoint"}
TASKS = {"pretrain": "self-supervised pretraining (HD-NCE)", "finetune": "supervised finetuning"}


def export(run: Path, target: Path) -> Path:
    """Write the encoder of a pretraining or finetuning run into the folder `target`, and return its file.

    Raises:
        InputError: `run` has no checkpoint, a result there is damaged, `target` cannot be written, or has a
            README.md of something else.
    """
    if (target / CARD).exists() and not (target / WEIGHTS).exists():
        raise InputError(f"{target / CARD} is not of hdc-train export; choose another folder")
    state = checkpoint.load(run, "pretrain", "finetune")
    prefix = "backbone."
    weights = {
        name.removeprefix(prefix): value
        for name, value in state["model"].items()
        if name.startswith(prefix)
    }
    folder = run if run.is_dir() else run.parent
    evaluations = list(_evaluations(folder, checkpoint.digest(str(run))))
    size = sum(value.numel() for value in weights.values())
    atomic.write_bytes(target / WEIGHTS, pack_backbone(weights, state["config"]))
    atomic.write_text(
        target / CARD, "\n".join(_card(state, read_record(folder).lines, evaluations, size)) + "\n"
    )
    return target / WEIGHTS


def _evaluations(run: Path, weights: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, content) of what was measured with these very weights, in the run's folder and in those beside it."""
    own = run.resolve()
    beside = sorted(path for path in own.parent.iterdir() if path.is_dir() and path != own)
    for folder in (own, *beside):
        for name, shape in RESULTS.items():
            found = read_result(folder / name, shape)
            if found and found.get("weights_sha256") == weights:
                yield name, found


def _card(
    state: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tuple[str, dict[str, Any]]],
    size: int,
) -> Iterator[str]:
    """The model card's lines."""
    config = state["config"]
    clip, side = config["clips"]["frames"], config["augment"]["crop_size"]
    yield f"# {config['backbone']}: {TASKS[state['kind']]}\n"
    yield f"A 3D encoder of {size:,} weights, trained with `hdc-train {state['kind']}`.\n"
    yield "```python\nimport hdc\n"
    yield 'backbone = hdc.load_backbone("this folder")'
    yield f"maps = backbone(clips)  # [B, 3, {clip}, {side}, {side}] in [-1, 1] -> {{3: ..., 4: ..., 5: ...}}"
    yield "```\n"
    yield "## Training\n"
    yield f"- data: `{_dataset(config['data'])}`, split {config['split']}"
    yield f"- epochs: {config['epochs']}; steps done: {state['step']:,}, of {config['batch_size']} videos each"
    yield f"- videos that could not be read: {len(state['unreadable'])}"
    if log or evaluations:
        yield "\n## Results\n"
    if log:
        last = log[-1]
        values = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, float)]
        yield f"- training, step {last['step']:,}: {', '.join(values)}"
    for name, found in evaluations:
        where = f"`{_dataset(found['data'])}`"
        if found["label"] != "label":
            where += f", {found['label']}"
        if "split" in found:
            where += f", split {found['split']}"
        yield f"- {where}: {_WORDS[name](found)}"
    yield "\n## Configuration\n"
    shared = {name: value for name, value in config.items() if name not in PRIVATE}
    yield f"```yaml\n{yaml.safe_dump(plain(shared), sort_keys=False)}```"


def _dataset(path: str) -> str:
    """The name of the dataset's folder: the rest of the path is nobody's business."""
    given = PurePath(path)
    return given.parent.name if given.suffix == ".csv" else given.name


def _recognized(found: Mapping[str, Any]) -> str:
    return f"{_percent(found['video_accuracy'])} of videos, {_percent(found['clip_accuracy'])} of clips"


def _recognized_by_split(found: Mapping[str, Any]) -> str:
    splits = [f"split {name}: {_recognized(each)}" for name, each in found["splits"].items()]
    return "finetuned, " + "; ".join([*splits, f"mean: {_recognized(found['mean'])}"])


def _retrieved(found: Mapping[str, Any]) -> str:
    shares = [
        f"{k.replace('top', 'top-')} {_percent(share)}" for k, share in found["accuracy"].items()
    ]
    return f"retrieval, {', '.join(shares)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    results.TEST: lambda found: f"action recognition, {_recognized(found)}",
    results.RECOGNITION: _recognized_by_split,
    results.PROBE: lambda found: f"linear probe, {_percent(found['test_accuracy'])}",
    results.KNN: lambda found: (
        f"vote of the {found['neighbors']} nearest, {_percent(found['weighted'])} "
        f"(weighted by similarity), {_percent(found['majority'])} (majority)"
    ),
    results.RETRIEVAL: _retrieved,
}
