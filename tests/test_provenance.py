"""What names and shapes of weights do not show: the encoder's epsilon, and the split they were finetuned on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hdc import cli
from hdc.config import FinetuneConfig, PretrainConfig, ProbeConfig, RetrieveConfig, finetune_augment
from hdc.config import TestConfig as RecognitionConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.features import load_encoder
from hdc.finetune import finetune
from hdc.pretrain import pretrain
from hdc.probe import probe
from hdc.recognition import test as recognize
from hdc.retrieval import retrieve

COMMON = {"data": "", "backbone": "tiny", "clips": ClipConfig(size=32), "device": "cpu"}


@pytest.fixture(scope="module")
def videos(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
) -> Manifest:
    """Four videos of two classes; the second split tests on what the first one trains on."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number, part in enumerate(("train", "train", "test", "test")):
        write_video(folder / f"{number}.avi", 20, width=32, height=32)
        rows.append((f"{number}.avi", 0, 20, "ab"[number % 2], part))
    manifest = make_manifest(folder, rows)
    manifest.columns["split2"] = np.where(manifest.columns["split1"] == "test", "train", "test")
    manifest.write()
    return manifest


@pytest.fixture(scope="module")
def pretrained(videos: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """On split 1, with Keras's epsilon."""
    config = PretrainConfig(
        **COMMON,
        out=str(tmp_path_factory.mktemp("pretrain")),
        augment=finetune_augment(28),
        epochs=1,
        batch_size=2,
        norm_eps=1e-3,
    )
    return str(pretrain(config, videos).checkpoint)


@pytest.fixture(scope="module")
def finetuned(videos: Manifest, pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """On split 2, from weights of split 1."""
    return str(
        finetune(_finetuning(pretrained, tmp_path_factory.mktemp("f"), 2), videos).checkpoint
    )


def _finetuning(path: str, out: Path, split: int) -> FinetuneConfig:
    return FinetuneConfig(
        **COMMON,
        out=str(out),
        checkpoint=path,
        augment=finetune_augment(28),
        epochs=1,
        batch_size=2,
        norm_eps=1e-3,
        split=split,
    )


def test_encoder_of_another_epsilon(
    videos: Manifest, pretrained: str, finetuned: str, tmp_path: Path
) -> None:
    """Strict loading does not see it, and the features would be other ones."""
    common = {**COMMON, "out": str(tmp_path), "crop_size": 28}
    message = "was not trained with norm_eps 1e-05; pass --norm_eps 0.001"
    for refused in (
        lambda: retrieve(RetrieveConfig(**common, checkpoint=pretrained), videos),
        lambda: probe(ProbeConfig(**common, checkpoint=pretrained), videos),
        lambda: recognize(RecognitionConfig(**common, checkpoint=finetuned, split=2), videos),
        lambda: finetune(replace(_finetuning(pretrained, tmp_path, 2), norm_eps=1e-5), videos),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    config = RetrieveConfig(**common, checkpoint=pretrained, norm_eps=1e-3)
    clips = torch.rand(1, 3, 16, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.1
    encoder = load_encoder(config, pretrained, videos)
    features = encoder(clips)[5]
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.InstanceNorm3d):
            assert layer.eps == 1e-3
            layer.eps = 1e-5
    assert not torch.allclose(encoder(clips)[5], features, rtol=1e-2)


def test_trained_on_another_split(
    videos: Manifest, pretrained: str, finetuned: str, tmp_path: Path
) -> None:
    """With labels it is refused, by whatever command; pretraining has none."""
    common = {**COMMON, "out": str(tmp_path), "crop_size": 28, "norm_eps": 1e-3}
    message = (
        "was finetuned on split 2, where test videos of split 1 are trained on; pass --split 2, or "
    )
    for refused in (
        lambda: recognize(RecognitionConfig(**common, checkpoint=finetuned), videos),
        lambda: retrieve(RetrieveConfig(**common, checkpoint=finetuned), videos),
        lambda: probe(ProbeConfig(**common, checkpoint=finetuned), videos),
        lambda: finetune(_finetuning(finetuned, tmp_path, 1), videos),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    assert recognize(RecognitionConfig(**common, checkpoint=finetuned, split=2), videos).videos == 2
    retrieve(RetrieveConfig(**common, checkpoint=finetuned, split=2), videos)
    retrieve(RetrieveConfig(**common, checkpoint=pretrained, split=2), videos)


def test_another_dataset_has_other_splits(videos: Manifest, finetuned: str, tmp_path: Path) -> None:
    """Supervised pretraining elsewhere: the number of its split says nothing here."""
    config = RetrieveConfig(
        **COMMON, out=str(tmp_path), checkpoint=finetuned, crop_size=28, norm_eps=1e-3
    )
    other = videos.take(np.arange(4))
    other.columns["label"] = np.array(["c", "d", "c", "b"])
    load_encoder(config, finetuned, other)
    other.columns["verb"] = videos.columns["label"]
    with pytest.raises(InputError, match="was finetuned on split 2"):
        load_encoder(replace(config, label="verb"), finetuned, other)


def test_one_line(
    videos: Manifest, finetuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone=tiny", "--clips.size=32", "--crop_size=28", "--norm_eps=0.001"]
    options += [f"--data={videos.source}", f"--checkpoint={finetuned}", f"--out={tmp_path}"]
    assert cli.main(["test", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hdc-train: {finetuned} was finetuned on split 2, ")
    assert cli.main(["test", *options, "--split=2", "--device=cpu"]) == 0
