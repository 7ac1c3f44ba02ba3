"""Checkpoints: written whole or not at all, loadable with `torch.load(weights_only=True)`, never half-matched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from hdc import atomic
from hdc.data.workers import hash_file
from hdc.errors import InputError

FILE = "checkpoint.pt"
FORMAT = 1

Kind = str  # "pretrain" or "finetune"


def save(path: Path, kind: Kind, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain values) in one step: the file before, or the file after.

    Raises:
        InputError: when it cannot be written; an older checkpoint stays as it was.
    """

    def fill(file: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, "kind": kind, **state}, file)
        except RuntimeError as error:  # torch's writer turns a full disk into a RuntimeError
            raise OSError(str(error).splitlines()[0]) from error

    atomic.write(path, fill)


def kept(folder: Path, epoch: int) -> Path:
    """Where a run keeps its checkpoint of the end of an epoch, counting from 1."""
    return folder / f"checkpoint-{epoch}.pt"


def locate(path: Path) -> Path:
    """The checkpoint's file, which may be given by its run's folder."""
    return path / FILE if path.is_dir() else path


def digest(path: str | None) -> str | None:
    """SHA-256 of the checkpoint that `path` or its folder holds; None where there is none (yet)."""
    file = locate(Path(path)) if path else None
    return hash_file(file) if file and file.is_file() else None


def load(path: Path, *kinds: Kind) -> dict[str, Any]:
    """Read a checkpoint of one of `kinds` onto the CPU.

    Raises:
        InputError: a missing, unreadable or cut-short file, or a checkpoint of another kind.
    """
    path = locate(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises five kinds for a file that is no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(f"{path} was not written by hdc-train")
    if state["format"] != FORMAT:
        raise InputError(f"{path} has format {state['format']}; this version reads {FORMAT}")
    if state["kind"] not in kinds:
        raise InputError(
            f"{path} is a {state['kind']} checkpoint; a {' or '.join(kinds)} one is needed"
        )
    return state


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str, target: str) -> None:
    """Copy `weights` into `module`; every key and every shape must match.

    Raises:
        InputError: naming the keys that are missing, left over or of another shape.
    """
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "left over": sorted(weights.keys() - own.keys()),
        "of another shape": sorted(
            key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape
        ),
    }
    if any(faults.values()):
        parts = [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys]
        raise InputError(f"the weights in {source} do not fit {target}: {', '.join(parts)}")
    module.load_state_dict(weights)


def load_backbone_weights(backbone: nn.Module, name: str, path: Path) -> dict[str, Any]:
    """Fill an encoder from a pretraining or finetuning checkpoint; returns the whole checkpoint."""
    state = load(path, "pretrain", "finetune")
    trained = state["config"]["backbone"]
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    load_strict(backbone, weights, f"{path} (backbone {trained})", f"backbone {name}")
    return state


def _some(keys: list[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")
