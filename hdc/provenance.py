"""What trained weights were made with, which their names and shapes do not show: it must go with a command's options.

Weights that were not trained here (`backbones/exchange.py`) have no such record: for them the options hold.
"""

from collections.abc import Mapping
from typing import Any

from hdc.backbones.exchange import OPTIONS
from hdc.config import CommandConfig
from hdc.data.manifest import Manifest
from hdc.errors import InputError


def check_encoder(config: CommandConfig, state: Mapping[str, Any], path: str) -> None:
    """Refuse to compute another function with the weights of the checkpoint `state`, read from `path`.

    Raises:
        InputError: an option that the encoder is built with is not what it was in training.
    """
    trained = state["config"]
    different = [name for name in OPTIONS if getattr(config, name) != trained[name]]
    if different:
        given = ", ".join(f"{name} {getattr(config, name)}" for name in different)
        needed = " ".join(f"--{name} {trained[name]}" for name in different)
        raise InputError(f"{path} was not trained with {given}; pass {needed}")


def check_split(
    config: CommandConfig, state: Mapping[str, Any], path: str, manifest: Manifest
) -> None:
    """Refuse weights that have seen test videos with their labels.

    All splits divide the same videos, so those that one trains on are largely those that another tests on.
    Pretraining looks at no labels, so its split does not matter. Where the checkpoint's classes are not
    those of `manifest`, it was finetuned on another dataset.

    Raises:
        InputError: they were finetuned on another split than `config.split`.
    """
    trained = state["config"]
    if state["kind"] != "finetune" or trained["split"] == config.split:
        return
    columns = manifest.columns.keys() & {config.label, trained["label"]}
    if any(set(manifest.columns[name].tolist()) <= set(state["classes"]) for name in columns):
        raise InputError(
            f"{path} was finetuned on split {trained['split']}, where test videos of split {config.split} "
            f"are trained on; pass --split {trained['split']}, or a checkpoint of pretraining or of split "
            f"{config.split}"
        )
