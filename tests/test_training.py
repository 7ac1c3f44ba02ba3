"""The training loop: killed and resumed runs, corrupt videos, and every way it refuses to go on."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdc import checkpoint, training
from hdc.config import FinetuneConfig, PretrainConfig, RetrieveConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import read_manifest
from hdc.data.synthetic import make_dataset
from hdc.errors import InputError
from hdc.finetune import finetune
from hdc.optimizer import OptimizerConfig
from hdc.presets import PRESETS
from hdc.pretrain import pretrain
from hdc.retrieval import retrieve
from hdc.views import AugmentConfig

TINY = [
    "--backbone=tiny",
    "--clips.size=32",
    "--augment.crop_size=28",
    "--batch_size=8",
    "--device=cpu",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in UCF101's layout with 20 training and 5 test videos, and its manifest."""
    root = tmp_path_factory.mktemp("videos")
    make_dataset(root, train=20, test=5, seed=0)
    return root


def settings(videos: Path, out: Path, kind: type[Any] = PretrainConfig, **changes: object) -> Any:
    config = kind(
        data=str(videos),
        out=str(out),
        backbone="tiny",
        clips=ClipConfig(size=32),
        augment=AugmentConfig(crop_size=28),
        epochs=2,
        batch_size=8,
        device="cpu",
        log_every=1,
        checkpoint_every=2,
    )
    return replace(config, **changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / checkpoint.FILE, weights_only=True)["model"]


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


def test_killed_and_resumed_equals_undisturbed(videos: Path, tmp_path: Path) -> None:
    """kill -9 twice, at moments nobody chose, resume each time: the same losses and weights, bit for bit."""
    command = [sys.executable, "-P", "-m", "hdc.cli", "pretrain", f"--data={videos}", *TINY]
    command += ["--epochs=15", "--checkpoint_every=3", "--log_every=1", "--seed=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    undisturbed = tmp_path / "undisturbed"
    subprocess.run([*command, f"--out={undisturbed}"], env=environment, check=True, timeout=300)

    killed = tmp_path / "killed"
    seen = 0
    for _ in range(2):
        process = subprocess.Popen([*command, f"--out={killed}", "--resume"], env=environment)
        deadline = time.monotonic() + 120
        # Wait until this process has written lines of its own past a checkpoint, then pull the plug.
        while len(losses(killed) if (killed / "metrics.jsonl").exists() else []) < seen + 5:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        seen = len(losses(killed))
    subprocess.run(
        [*command, f"--out={killed}", "--resume"], env=environment, check=True, timeout=300
    )

    assert [step for step, _ in losses(killed)] == list(range(30))
    assert losses(killed) == losses(undisturbed)
    for name, value in weights(undisturbed).items():
        assert torch.equal(value, weights(killed)[name]), name


def test_resuming_in_another_epoch_sees_the_same_batches(videos: Path, tmp_path: Path) -> None:
    """One epoch, then resume for two: equal to two epochs at once."""
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path / "whole"), manifest)
    pretrain(settings(videos, tmp_path / "parts", epochs=1), manifest)
    pretrain(settings(videos, tmp_path / "parts", resume=True), manifest)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_training_learns(videos: Path, tmp_path: Path) -> None:
    """A real run on real files gets below ln B, the loss of guessing."""
    pretrain(
        settings(videos, tmp_path, epochs=90, objective=PRESETS["table1-sc5"].objective),
        read_manifest(videos / "manifest.csv"),
    )
    last = [loss for _, loss in losses(tmp_path)][-40:]
    assert sum(last) / 40 < math.log(8) - 0.2


def test_finished_run_is_left_alone(videos: Path, tmp_path: Path) -> None:
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path), manifest)
    before = weights(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint.pt exists; add --resume"):
        pretrain(settings(videos, tmp_path), manifest)
    assert all(torch.equal(value, weights(tmp_path)[name]) for name, value in before.items())


def test_resuming_with_other_settings_is_refused(videos: Path, tmp_path: Path) -> None:
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path), manifest)
    with pytest.raises(InputError, match="made with different seed, batch_size; repeat what"):
        pretrain(settings(videos, tmp_path, batch_size=4, seed=1, resume=True), manifest)


def test_resuming_with_other_videos_is_refused(videos: Path, tmp_path: Path) -> None:
    """The manifest is where it was, but has another order: the batches would be others."""
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path, epochs=1), manifest)
    turned = manifest.take(np.arange(len(manifest))[::-1])
    with pytest.raises(InputError, match="made with different videos; repeat what"):
        pretrain(settings(videos, tmp_path, resume=True), turned)
    assert not pretrain(settings(videos, tmp_path, epochs=1, resume=True), manifest).metrics


def test_corrupt_video_is_skipped_counted_and_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    make_dataset(copy, train=20, test=5, seed=0)
    manifest = read_manifest(copy / "manifest.csv")
    broken = manifest.file(3)
    broken.write_bytes(broken.read_bytes()[:300])
    if str(manifest.columns["split1"][3]) == "test":
        pytest.fail("the test must break a training video")
    result = pretrain(settings(copy, tmp_path / "run"), manifest)
    assert [entry.path for entry in result.unreadable] == [str(broken)]
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["skipped"] for line in log if "skipped" in line} == {str(broken)}
    shown = capsys.readouterr().out
    assert f"skipped {broken}" in shown
    assert re.search(r"1 unreadable videos? (was|were) left out", shown)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["unreadable"] != []


@pytest.mark.parametrize("batch_size", [8, 4])
def test_disk_that_vanishes(
    batch_size: int, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends, its last checkpoint is of the last step with videos, and resumed it knows no difference.

    A batch of 4 may be bad luck, two of them are not.
    """
    manifest = read_manifest(videos / "manifest.csv")
    ours = {"batch_size": batch_size, "epochs": 6, "checkpoint_every": 1}
    pretrain(settings(videos, tmp_path / "undisturbed", **ours), manifest)
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(videos, data)
    copy = read_manifest(data / "manifest.csv")
    seed = training.step_seed

    def vanish(value: int, step: int) -> int:
        if step == 4:  # whose videos have been read
            data.rename(away)
        return seed(value, step)

    run = settings(data, tmp_path / "run", **ours)
    with monkeypatch.context() as patch:
        patch.setattr(training, "step_seed", vanish)
        with pytest.raises(InputError) as found:
            pretrain(run, copy)
    step = {8: 5, 4: 6}[batch_size]
    assert str(found.value).startswith(
        f"training stopped at step {step}: of a batch of {batch_size} videos (batch_size), fewer than 2 "
        f"can be read, e.g. {data}"
    )
    assert str(found.value).endswith(
        f": no such file or directory; the last good checkpoint is {tmp_path}/run/checkpoint.pt"
    )
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 5

    away.rename(data)
    assert pretrain(replace(run, resume=True), copy).unreadable == []
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    for name, value in weights(tmp_path / "undisturbed").items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def test_batches_that_are_never_large_enough(videos: Path, tmp_path: Path) -> None:
    """Two videos, one of them broken: no step has what a contrastive loss needs, so there is no result."""
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    manifest = read_manifest(data / "manifest.csv")
    pair = manifest.take(np.flatnonzero(manifest.columns["split1"] == "train")[:2])
    pair.file(1).write_bytes(b"")
    for epochs, step in ((3, 3), (100, 7)):  # short of `TOO_MANY_LOST`, and not
        message = (
            rf"training stopped at step {step}: of a batch of 2 videos \(batch_size\), fewer than 2"
        )
        run = settings(data, tmp_path / "run", batch_size=2, epochs=epochs, checkpoint_every=1)
        with pytest.raises(InputError, match=message):
            pretrain(run, pair)
        assert not list((tmp_path / "run").glob("*.pt"))


def test_divergence_keeps_the_last_good_checkpoint(videos: Path, tmp_path: Path) -> None:
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path, epochs=1), manifest)
    state = torch.load(tmp_path / checkpoint.FILE, weights_only=True)
    state["model"]["backbone.block1.0.weight"][:] = float("nan")
    torch.save(state, tmp_path / checkpoint.FILE)
    with pytest.raises(InputError, match="training diverged at step 2: lower --optimizer"):
        pretrain(settings(videos, tmp_path, resume=True), manifest)
    assert torch.load(tmp_path / checkpoint.FILE, weights_only=True)["step"] == 2


def test_gradient_clipping(videos: Path, tmp_path: Path) -> None:
    """Clipped to a norm of 1e-9, without decay and momentum, nothing moves."""
    manifest = read_manifest(videos / "manifest.csv")
    optimizer = OptimizerConfig(clip_norm=1e-9, weight_decay=0.0, momentum=0.0)
    pretrain(settings(videos, tmp_path / "one", epochs=1, optimizer=optimizer), manifest)
    pretrain(settings(videos, tmp_path / "two", optimizer=optimizer), manifest)
    first, last = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((first[k] - last[k]).abs().max().item() for k in first) < 1e-8


def test_bf16(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop under autocast: weights and loss stay in float32, and the loss is about the same.

    A CPU is refused for its convolutions, so these run without oneDNN.
    """
    manifest = read_manifest(videos / "manifest.csv")
    config = settings(videos, tmp_path / "bf16", precision="bf16", epochs=1)
    with pytest.raises(InputError, match="precision is 'bf16' but the device is the CPU"):
        pretrain(config, manifest)
    monkeypatch.setattr("hdc.pretrain.pick_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("hdc.training.decoding_workers", lambda _: 0)
    with torch.backends.mkldnn.flags(enabled=False):
        pretrain(config, manifest)
        pretrain(settings(videos, tmp_path / "float32", epochs=1), manifest)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())
    low, full = losses(tmp_path / "bf16")[0][1], losses(tmp_path / "float32")[0][1]
    assert low != full
    assert low == pytest.approx(full, rel=0.02)


def test_finetuning_starts_from_the_pretrained_encoder(videos: Path, tmp_path: Path) -> None:
    """At a vanishing learning rate the encoder stays what it was; from scratch it is another."""
    manifest = read_manifest(videos / "manifest.csv")
    trained = pretrain(settings(videos, tmp_path / "pre"), manifest).checkpoint
    base = settings(
        videos,
        tmp_path / "fine",
        FinetuneConfig,
        checkpoint=str(trained),
        epochs=1,
        optimizer=OptimizerConfig(lr=1e-12),
    )
    finetune(base, manifest)
    finetune(replace(base, checkpoint=None, out=str(tmp_path / "scratch")), manifest)
    pre, fine, scratch = (weights(tmp_path / name) for name in ("pre", "fine", "scratch"))
    name = "backbone.block5.0.conv1.weight"
    assert torch.allclose(pre[name], fine[name], atol=1e-9)
    assert not torch.allclose(pre[name], scratch[name], atol=1e-3)
    assert fine["classifier.weight"].shape == (5, pre[name].shape[0])


def test_finetuning_one_video_at_a_time(videos: Path, tmp_path: Path) -> None:
    """Every readable video is a step, and a single broken one is no reason to stop."""
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    manifest = read_manifest(data / "manifest.csv")
    manifest.rows("train", 1).file(3).write_bytes(b"")
    config = settings(
        data, tmp_path / "run", FinetuneConfig, batch_size=1, checkpoint_every=1, keep_every=1
    )
    assert len(finetune(config, manifest).unreadable) == 1
    assert len(losses(tmp_path / "run")) == 2 * 19
    first, last = (
        torch.load(tmp_path / "run" / name, weights_only=True)["model"]
        for name in ("checkpoint-1.pt", "checkpoint-2.pt")
    )
    assert not any(torch.equal(value, last[name]) for name, value in first.items())


def test_checkpoints_that_stay(videos: Path, tmp_path: Path) -> None:
    """Of every second epoch: each is what a run of so many epochs ends with."""
    manifest = read_manifest(videos / "manifest.csv")
    whole = settings(videos, tmp_path / "whole", epochs=5, keep_every=2, checkpoint_every=3)
    pretrain(whole, manifest)
    assert sorted(path.name for path in (tmp_path / "whole").glob("*.pt")) == [
        "checkpoint-2.pt",
        "checkpoint-4.pt",
        "checkpoint.pt",
    ]
    parts = settings(videos, tmp_path / "parts", epochs=2)
    for epochs in (2, 4):
        pretrain(replace(parts, epochs=epochs, resume=epochs > 2), manifest)
        kept = torch.load(tmp_path / f"whole/checkpoint-{epochs}.pt", weights_only=True)
        assert kept["step"] == 2 * epochs
        for name, value in weights(tmp_path / "parts").items():
            assert torch.equal(value, kept["model"][name]), name
    with pytest.raises(InputError, match="keep_every is -1; it must not be negative"):
        replace(whole, keep_every=-1)
    # It changes nothing that is computed: the run goes on without, and has nothing left to do.
    assert pretrain(replace(whole, keep_every=0, resume=True), manifest).metrics == {}


def test_kept_checkpoint_is_a_checkpoint(videos: Path, tmp_path: Path) -> None:
    """For retrieval by name, and for a run that goes on: it is as new as the newest."""
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path, epochs=1, keep_every=1), manifest)
    kept = tmp_path / "checkpoint-1.pt"
    assert kept.read_bytes() == (tmp_path / "checkpoint.pt").read_bytes()
    config = RetrieveConfig(
        data=str(videos),
        out=str(tmp_path),
        checkpoint=str(kept),
        backbone="tiny",
        clips=ClipConfig(size=32),
        crop_size=28,
        device="cpu",
    )
    retrieve(config, manifest)
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert found["weights_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()


def test_one_run_at_a_time_in_a_folder(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one ends with a line, the first one does not notice."""
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path / "undisturbed"), manifest)
    command = [sys.executable, "-P", "-m", "hdc.cli", "pretrain", f"--data={videos}", *TINY]
    command += [f"--out={tmp_path}/run", "--epochs=1", "--seed=1"]
    seed, second = training.step_seed, []

    def start_another(value: int, step: int) -> int:
        if step == 0:
            second.append(subprocess.run(command, capture_output=True, text=True, timeout=120))
        return seed(value, step)

    monkeypatch.setattr(training, "step_seed", start_another)
    pretrain(settings(videos, tmp_path / "run"), manifest)
    assert [(done.returncode, done.stderr) for done in second] == [
        (2, f"hdc-train: another hdc-train is at work in {tmp_path}/run\n")
    ]
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_finetuning_needs_every_class_in_the_training_list(videos: Path, tmp_path: Path) -> None:
    text = (videos / "manifest.csv").read_text()
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "\n".join(
            line.replace(",train", ",") if "/Up/" in line else line for line in text.splitlines()
        ).replace("UCF-101", str(videos / "UCF-101"))
    )
    config = FinetuneConfig(
        data=str(manifest), out=str(tmp_path), backbone="tiny", clips=ClipConfig(size=112)
    )
    with pytest.raises(InputError, match="class Up has no training videos in split 1"):
        finetune(config, read_manifest(manifest))


def test_fewer_epochs_than_done_is_nothing_left_to_do(videos: Path, tmp_path: Path) -> None:
    manifest = read_manifest(videos / "manifest.csv")
    pretrain(settings(videos, tmp_path), manifest)
    assert pretrain(settings(videos, tmp_path, epochs=1, resume=True), manifest).metrics == {}
    assert torch.load(tmp_path / checkpoint.FILE, weights_only=True)["step"] == 4
