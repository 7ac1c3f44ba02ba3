"""Checkpoints: whole or not at all, and never loaded in part."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from hdc import checkpoint
from hdc.backbones import build_backbone
from hdc.errors import InputError

STATE = {
    "config": {"backbone": "tiny", "scales": (1.0, 0.5), "clip_norm": None},
    "step": 7,
    "model": {"weight": torch.arange(6.0).view(2, 3)},
    "classes": ["a", "b"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint.save(path, "pretrain", STATE)
    return path


def test_plain_torch_can_load_it(path: Path) -> None:
    """With weights_only: a checkpoint from a stranger cannot run code."""
    state = torch.load(path, weights_only=True)
    assert (state["kind"], state["step"], state["classes"]) == ("pretrain", 7, ["a", "b"])
    assert state["config"] == STATE["config"]
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


def test_load_takes_a_file_or_its_folder(path: Path) -> None:
    for given in (path, path.parent):
        state = checkpoint.load(given, "finetune", "pretrain")
        assert state["step"] == 7
        assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_failed_write_leaves_the_old_file(
    error: Exception, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(state: Any, file: BinaryIO) -> None:
        file.write(b"the first half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"cannot write .*checkpoint\.pt"):
        checkpoint.save(path, "pretrain", {**STATE, "step": 8})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_killed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half that was written is taken away, or replaced by the next save where nothing could run."""

    def die(state: Any, file: BinaryIO) -> None:
        file.write(b"the first half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, "pretrain", {**STATE, "step": 8})
    assert checkpoint.load(path, "pretrain")["step"] == 7
    assert list(path.parent.iterdir()) == [path]
    (path.parent / ".checkpoint.pt.partial").write_bytes(b"left by kill -9")
    checkpoint.save(path, "pretrain", {**STATE, "step": 8})
    assert checkpoint.load(path, "pretrain")["step"] == 8
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*checkpoint\.pt"):
        checkpoint.save(tmp_path / "run" / "checkpoint.pt", "pretrain", STATE)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no checkpoint .*none\.pt"):
        checkpoint.load(tmp_path / "none.pt", "pretrain")
    with pytest.raises(InputError, match=r"there is no checkpoint .*checkpoint\.pt"):
        checkpoint.load(tmp_path, "pretrain")


class Trap:
    """Pickled, it makes a folder when it is loaded by a loader that trusts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_loading_runs_no_code(path: Path, tmp_path: Path) -> None:
    torch.save({"format": 1, "kind": "pretrain", "model": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(InputError, match=r"checkpoint\.pt is not a readable checkpoint: ."):
        checkpoint.load(path, "pretrain")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", ["empty", "garbage", "truncated"])
def test_unreadable(content: str, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "garbage": b"not a checkpoint\n" * 50,
            "truncated": whole[: len(whole) // 2],
        }[content]
    )
    with pytest.raises(InputError, match=r"checkpoint\.pt is not a readable checkpoint: ."):
        checkpoint.load(path, "pretrain")


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, [1, 2], torch.ones(2)])
def test_written_by_something_else(foreign: object, path: Path) -> None:
    torch.save(foreign, path)
    with pytest.raises(InputError, match=r"checkpoint\.pt was not written by hdc-train"):
        checkpoint.load(path, "pretrain")


def test_wrong_kind_or_format(path: Path) -> None:
    with pytest.raises(InputError, match="is a pretrain checkpoint; a finetune one is needed"):
        checkpoint.load(path, "finetune")
    torch.save({"format": 99, "kind": "pretrain"}, path)
    with pytest.raises(InputError, match="has format 99; this version reads 1"):
        checkpoint.load(path, "pretrain")


def test_load_strict_names_every_fault() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    weights = {key: value + 1 for key, value in before.items()}
    checkpoint.load_strict(module, weights, "a file", "a model")
    assert all(torch.equal(module.state_dict()[key], before[key] + 1) for key in before)

    del weights["0.bias"]
    weights["2.bias"] = torch.zeros(1)
    weights["1.weight"] = torch.zeros(1, 4)
    weights["0.weight"] += 1
    message = (
        r"the weights in a file do not fit a model: "
        r"1 missing \(0\.bias\), 1 left over \(2\.bias\), 1 of another shape \(1\.weight\)"
    )
    with pytest.raises(InputError, match=message):
        checkpoint.load_strict(module, weights, "a file", "a model")
    assert torch.equal(module.state_dict()["0.weight"], before["0.weight"] + 1)  # nothing half done


def test_backbone_weights(path: Path) -> None:
    """Only the encoder is taken, whatever else the model had; another encoder is refused by its keys."""
    trained = build_backbone("tiny")
    state = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    model = {**state, "classifier.weight": torch.ones(2, 2)}
    checkpoint.save(path, "finetune", {**STATE, "model": model})
    fresh = build_backbone("tiny")
    assert not torch.equal(fresh.block5[0].conv1.weight, trained.block5[0].conv1.weight)
    assert checkpoint.load_backbone_weights(fresh, "tiny", path)["classes"] == ["a", "b"]
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key])
    message = r"backbone tiny\) do not fit backbone c3d: .* missing \(block1\.0\.bias, .*left over"
    with torch.device("meta"):
        other = build_backbone("c3d")
    with pytest.raises(InputError, match=message):
        checkpoint.load_backbone_weights(other, "c3d", path)


def test_norms_without_scale_are_another_model(path: Path) -> None:
    """Silently skipped weights are the classic way to a result at chance level."""
    weights = build_backbone("tiny").state_dict()
    state = {f"backbone.{key}": value for key, value in weights.items()}
    checkpoint.save(path, "pretrain", {**STATE, "model": state})
    with pytest.raises(InputError, match=r"left over \(block1\.1\.bias"):
        checkpoint.load_backbone_weights(build_backbone("tiny", norm_affine=False), "tiny", path)
