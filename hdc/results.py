"""What an evaluation leaves: a JSON file with its numbers, and with all that they follow from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hdc import atomic, distributed, environment
from hdc.checkpoint import locate
from hdc.config import CommandConfig, plain
from hdc.data.clips import Unreadable
from hdc.data.workers import hash_file
from hdc.device import pick_device

TEST, PROBE, KNN, RETRIEVAL = "test.json", "probe.json", "knn.json", "retrieval.json"
RECOGNITION = "recognition.json"
# Stand by themselves in the file; of the other options, these do not change a result.
SUBJECT = ("data", "checkpoint", "label", "split")
FREE = {"out", "device", "workers", "crop_batch", "resume", "checkpoint_every", "log_every"}


def write(
    config: CommandConfig,
    name: str,
    values: Mapping[str, Any],
    unreadable: Sequence[Unreadable] = (),
) -> None:
    """Write `values` into the file `name` of `config.out`, once for all ranks.

    Args:
        values: plain values under names of their own.
        unreadable: the videos that were left out.
    """
    device = pick_device(config)

    def summary() -> dict[str, Any]:
        return {
            **_origin(config),
            **values,
            "unreadable": [entry._asdict() for entry in unreadable],
            "environment": environment.describe(device),
        }

    distributed.on_rank0(lambda: atomic.write_json(Path(config.out) / name, summary()))


def finished(config: CommandConfig, name: str) -> dict[str, Any]:
    """What `write` wrote for these very settings and this very checkpoint; empty if that is still to do.

    Raises:
        InputError: there is such a file, but a damaged one.
    """

    def look() -> dict[str, Any]:
        found = atomic.read_json(Path(config.out) / name, ("settings",))
        same = found and all(found.get(key) == value for key, value in _origin(config).items())
        return found if same else {}

    return distributed.on_rank0(look)


def _origin(config: CommandConfig) -> dict[str, Any]:
    """All that a result follows from: the options, and the weights by the hash of their file."""
    values = plain(asdict(config))
    given = {field.name: values[field.name] for field in fields(config) if field.init}
    subject = {name: given[name] for name in SUBJECT if name in given}
    checkpoint = given.get("checkpoint")
    return {
        **subject,
        "weights_sha256": _hash(locate(Path(checkpoint))) if checkpoint else None,
        "settings": {k: v for k, v in given.items() if k not in FREE and k not in subject},
    }


def _hash(path: Path) -> str | None:
    """None for a checkpoint that is not there (yet)."""
    return hash_file(path) if path.is_file() else None
