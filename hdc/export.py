"""Give a trained encoder away: its weights as safetensors and a model card, in a folder of their own.

`hdc.load_backbone` reads the folder. Optimizer, projections and classifier stay behind, and so does what
belongs to one machine: paths and devices.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from hdc import atomic, checkpoint
from hdc.backbones.exchange import WEIGHTS, pack_backbone
from hdc.config import plain
from hdc.errors import InputError
from hdc.report.records import Record, read_record

CARD = "README.md"
PRIVATE = {"out", "device", "workers", "resume", "data", "checkpoint"}
TASKS = {"pretrain": "self-supervised pretraining (HD-NCE)", "finetune": "supervised finetuning"}


def export(run: Path, target: Path) -> Path:
    """Write the encoder of a pretraining or finetuning run into the folder `target`, and return its file.

    Raises:
        InputError: `run` has no checkpoint, `target` cannot be written, or has a README.md of something else.
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
    record = read_record(run if run.is_dir() else run.parent)
    size = sum(value.numel() for value in weights.values())
    atomic.write_bytes(target / WEIGHTS, pack_backbone(weights, state["config"]))
    atomic.write_text(target / CARD, "\n".join(_card(state, record, size)) + "\n")
    return target / WEIGHTS


def _card(state: Mapping[str, Any], record: Record, size: int) -> Iterator[str]:
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
    results = list(_results(record))
    if results:
        yield "\n## Results\n"
        yield from results
    yield "\n## Configuration\n"
    shared = {name: value for name, value in config.items() if name not in PRIVATE}
    yield f"```yaml\n{yaml.safe_dump(plain(shared), sort_keys=False)}```"


def _dataset(path: str) -> str:
    """The name of the dataset's folder: the rest of the path is nobody's business."""
    given = PurePath(path)
    return given.parent.name if given.suffix == ".csv" else given.name


def _results(record: Record) -> Iterator[str]:
    """What the run folder holds: the last line of the log, and the summaries of other commands."""
    if record.lines:
        last = record.lines[-1]
        values = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, float)]
        yield f"- training, step {last['step']:,}: {', '.join(values)}"
    if record.test:
        yield (
            f"- action recognition, top-1: {100 * record.test['video_accuracy']:.1f} % of "
            f"{record.test['videos']} videos, {100 * record.test['clip_accuracy']:.1f} % of clips"
        )
    if record.probe:
        yield f"- linear probe ({record.probe['label']}): {100 * record.probe['test_accuracy']:.1f} %"
    if record.retrieval:
        shares = [f"{k} {100 * share:.1f} %" for k, share in record.retrieval["accuracy"].items()]
        yield f"- retrieval ({record.retrieval['label']}): {', '.join(shares)}"
