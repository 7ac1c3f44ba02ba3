"""A configuration as the command that one types."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from hdc.config import RunConfig, flat, plain

Config = TypeVar("Config", bound=RunConfig)


def defaults(kind: type[Config]) -> Config:
    """What a command takes without options; empty for what it must be given."""
    required = [
        field.name
        for field in fields(kind)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]
    empty: dict[str, Any] = dict.fromkeys(required, "")
    return kind(**empty)


def command_line(words: Sequence[str], config: Config, usual: Config) -> str:
    """`words` and the options of `config` that are not as in `usual`, quoted for a shell."""
    known = dict(flat(asdict(usual)))
    given = [
        f"--{name}" if _is_switch(name, known[name]) else f"--{name}={_written(value)}"
        for name, value in flat(asdict(config))
        if value != known[name]
    ]
    return shlex.join([*words, *given])


def _is_switch(name: str, usual: object) -> bool:
    """Options of a command itself that are off: these take no value."""
    return usual is False and "." not in name


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value))
