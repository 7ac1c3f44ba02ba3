"""What an evaluation leaves: a JSON file with its numbers, and with all that they follow from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hdc import atomic, checkpoint, distributed, environment
from hdc.config import CommandConfig, RunConfig, plain
from hdc.data.clips import Unreadable
from hdc.data.manifest import manifest_file
from hdc.data.workers import hash_file
from hdc.device import pick_device

TEST, PROBE, KNN, RETRIEVAL = "test.json", "probe.json", "knn.json", "retrieval.json"
RECOGNITION = "recognition.json"
# Stand by themselves in the file; of the other options, these do not change a result.
SUBJECT = ("data", "checkpoint", "label", "split")
FREE = {
    "out",
    "device",
    "workers",
    "crop_batch",
    "resume",
    "checkpoint_every",
    "keep_every",
    "log_every",
    "dry_run",
}


def write(
    config: RunConfig,
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
    """What `write` wrote for these very settings, videos and weights; empty if that is still to do.

    Raises:
        InputError: there is such a file, but a damaged one.
    """

    def look() -> dict[str, Any]:
        found = atomic.read_json(Path(config.out) / name, ("settings",))
        same = found and all(found.get(key) == value for key, value in _origin(config).items())
        return found if same else {}

    return distributed.on_rank0(look)


def different(config: CommandConfig, name: str) -> list[str]:
    """The options that the file was written with other values of; none where there is no file.

    Raises:
        InputError: there is such a file, but a damaged one.
    """

    def look() -> list[str]:
        found = atomic.read_json(Path(config.out) / name, ("settings",))
        ours = _origin(config)
        options = {key: ours[key] for key in SUBJECT if key in ours} | ours["settings"]
        theirs = {**found, **found.get("settings", {})}
        return [key for key, value in options.items() if found and theirs.get(key) != value]

    return distributed.on_rank0(look)


def _origin(config: RunConfig) -> dict[str, Any]:
    """All that a result follows from: the options; the manifest and the weights by the hashes of their files."""
    values = plain(asdict(config))
    given = {field.name: values[field.name] for field in fields(config) if field.init}
    subject = {name: given[name] for name in SUBJECT if name in given}
    manifest = manifest_file(given["data"]) if "data" in given else None
    return {
        **subject,
        "manifest_sha256": hash_file(manifest) if manifest and manifest.is_file() else None,
        "weights_sha256": checkpoint.digest(given.get("checkpoint")),
        "settings": {k: v for k, v in given.items() if k not in FREE and k not in subject},
    }
