"""A command line and the configuration that it was written from are the same thing."""

import shlex
from dataclasses import replace

import pytest

from hdc.cli import COMMANDS, parse
from hdc.config import ObjectiveConfig, PretrainConfig, RecognizeConfig, RetrieveConfig, RunConfig
from hdc.config import TestConfig as RecognitionConfig
from hdc.data.clips import ClipConfig
from hdc.options import command_line, defaults
from hdc.views import AugmentConfig


def test_only_what_differs_is_written() -> None:
    config = RecognitionConfig(
        data="my videos", checkpoint="it's.pt", clips=ClipConfig(start_every=8)
    )
    written = command_line(["hdc-train", "test"], config, defaults(RecognitionConfig))
    assert written == (
        "hdc-train test '--data=my videos' --clips.start_every=8 '--checkpoint=it'\"'\"'s.pt'"
    )
    assert command_line(["x"], config, config) == "x"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("retrieve", RetrieveConfig(data="a=b", center=True, norm_affine=False, workers=0)),
        ("retrieve", RetrieveConfig(data="--data", checkpoint="x", seed=2**64 - 1)),
        ("recognize", RecognizeConfig(data="a", splits=(3, 1), resume=True, label="null")),
        (
            "pretrain",
            PretrainConfig(
                data="[x] :bug:",
                objective=ObjectiveConfig(spatial_scales=(), alpha=(), temperature=1e-7),
                augment=AugmentConfig(flip=False, scales=(1.0, 0.5)),
                resume=True,
            ),
        ),
    ],
)
def test_parsed_again_it_is_the_same(name: str, config: RunConfig) -> None:
    written = command_line([], config, defaults(type(config)))
    assert parse(name, COMMANDS[name], shlex.split(written))[0] == config


def test_defaults_are_those_of_the_command() -> None:
    usual = defaults(RecognitionConfig)
    assert (usual.data, usual.checkpoint) == ("", "")
    given = ["--data=x", "--checkpoint=y"]
    parsed, _ = parse("test", COMMANDS["test"], given)
    assert parsed == replace(usual, data="x", checkpoint="y")
