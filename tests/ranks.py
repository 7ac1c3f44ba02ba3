"""What test_torchrun.py starts on several ranks: everything that trains or looks at videos, and faults.

ranks.py work VIDEOS BROKEN OUT           `work`
ranks.py fault NAME hdc-train's arguments  hdc-train, with one of `FAULTS` in it
"""

import atexit
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

import hdc.probe
from hdc import cli, distributed, training
from hdc.config import (
    FinetuneConfig,
    ObjectiveConfig,
    PretrainConfig,
    ProbeConfig,
    RetrieveConfig,
    TestConfig,
)
from hdc.data.clips import ClipConfig
from hdc.data.manifest import read_manifest
from hdc.errors import InputError
from hdc.features import extract, load_encoder
from hdc.finetune import finetune
from hdc.optimizer import OptimizerConfig
from hdc.pretrain import pretrain
from hdc.probe import probe
from hdc.recognition import test
from hdc.retrieval import retrieve
from hdc.views import AugmentConfig

COMMON: dict[str, Any] = {"backbone": "tiny", "clips": ClipConfig(size=32), "device": "cpu"}
# At a rate that moves the weights but little, rounding errors are not blown up from step to step.
TRAIN = COMMON | {
    "augment": AugmentConfig(crop_size=28),
    "optimizer": OptimizerConfig(lr=1e-6),
    "epochs": 2,
    "batch_size": 8,
    "log_every": 1,
}


def work(videos: Path, broken: Path, out: Path) -> None:
    """Every command once, into folders of `out`. In `broken` one training video cannot be decoded.

    With 2 or 3 ranks, neither a batch of 8 nor 20 training videos nor 5 test videos come out even; a batch
    of 3 leaves nothing for one of 3 ranks when the broken video is in it.
    """
    whole, part = read_manifest(videos / "manifest.csv"), read_manifest(broken / "manifest.csv")
    first = PretrainConfig(data=str(videos), out=str(out / "pretrain"), **TRAIN, checkpoint_every=1)
    trained = str(pretrain(first, whole).checkpoint)
    pretrain(replace(first, out=str(out / "half"), epochs=1), whole)
    few = replace(first, batch_size=3, epochs=1)
    pretrain(replace(few, out=str(out / "pretrain-3")), part)
    block3 = ObjectiveConfig(spatial_scales=(3,), temporal_scales=(), alpha=(1.0,), beta=())
    pretrain(replace(few, out=str(out / "block3"), objective=block3), whole)
    second = FinetuneConfig(
        data=str(videos), out=str(out / "finetune"), checkpoint=trained, **TRAIN | {"batch_size": 3}
    )
    classifier = str(finetune(second, part).checkpoint)
    settings = COMMON | {"data": str(videos), "crop_size": 28, "out": str(out)}
    test(TestConfig(checkpoint=classifier, **settings), whole)
    # From random weights, which are the same for any number of ranks.
    probe(ProbeConfig(**settings), whole)
    config = RetrieveConfig(**settings)
    retrieve(config, whole)
    found = extract(config, load_encoder(config, None, whole), whole, "train")
    damaged = extract(config, load_encoder(config, None, part), part, "train")
    torch.save(
        {
            "whole": (found.vectors.clone(), found.manifest.path.tolist()),
            "broken": (damaged.vectors.clone(), damaged.manifest.path.tolist()),
            "unreadable": [entry.path for entry in damaged.unreadable],
        },
        out / f"features-{distributed.rank()}.pt",
    )


def resume(videos: Path, out: Path) -> None:
    """Go on with the run in `out/resumed` up to its second epoch."""
    config = PretrainConfig(data=str(videos), out=str(out / "resumed"), **TRAIN, resume=True)
    pretrain(config, read_manifest(videos / "manifest.csv"))


def forbid_writing(folder: Path) -> None:
    """From now on, this process may not open a file in `folder` to write in it, but for its own features."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = str(arguments[0])
            if path.startswith(str(folder)) and "features-" not in path:
                raise AssertionError(f"rank {os.environ['RANK']} writes {path}")

    sys.addaudithook(hook)


def at_step(action: Callable[[], None], rank: int, step: int, start: int = 0) -> None:
    """Call `action` on `rank` when it begins `step`, in the given start by torchrun."""
    seed = training.step_seed

    def patched(value: int, now: int) -> int:
        here = (int(os.environ["RANK"]), now, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        if here == (rank, step, start):
            action()
        return seed(value, now)

    training.step_seed = patched


def at_save(action: Callable[[], None], number: int, start: int = 0) -> None:
    """Call `action` in the middle of writing the checkpoint of that number, in the given start by torchrun."""
    save, count = torch.save, 0

    def patched(state: Any, file: BinaryIO, **options: Any) -> None:
        nonlocal count
        if isinstance(state, dict) and "format" in state:
            count += 1
            if (count, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (number, str(start)):
                file.write(b"the first half")
                action()
        save(state, file, **options)

    torch.save = patched


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kills() -> None:
    at_step(kill, rank=2, step=2, start=0)
    at_save(kill, number=1, start=1)


def hang() -> None:
    distributed.TIMEOUT, distributed.ROLL_CALL = timedelta(seconds=5), 2.0
    at_step(lambda: time.sleep(1000), rank=1, step=1)


def full_disk() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    at_save(fail, number=2)


def mistake() -> None:
    def fail() -> None:
        raise InputError("something is wrong on this node alone")

    at_step(fail, rank=1, step=1)


def vanish() -> None:
    """Move the videos away once the first batch is read."""
    (data,) = (Path(one.removeprefix("--data=")) for one in sys.argv if one.startswith("--data="))
    at_step(lambda: data.rename(data.with_name("away")), rank=0, step=0)


def at_fit(action: Callable[[], None]) -> None:
    """Call `action` where rank 0 fits the linear probe, and the others wait."""
    fit = hdc.probe.fit_linear

    def patched(features: Tensor, ids: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
        assert os.environ["RANK"] == "0"
        action()
        return fit(features, ids, classes, l2)

    hdc.probe.fit_linear = patched


def long_fit() -> None:
    distributed.TIMEOUT = timedelta(seconds=3)
    at_fit(lambda: time.sleep(6))


def killed_fit() -> None:
    at_fit(kill)


class Lingering:
    """What the interpreter takes a second to free at its end."""

    def __del__(self) -> None:
        time.sleep(1)


lingering: Lingering | None = None


def late_sum() -> None:
    """Rank 0 ends with a sum under way. Rank 1 joins it after all else that Python does before its end."""
    (out,) = (Path(one.removeprefix("--out=")) for one in sys.argv if one.startswith("--out="))
    ending = out / "ending"

    def begin() -> None:
        global lingering
        lingering = Lingering()
        dist.all_reduce(torch.ones(1), async_op=True)
        raise InputError("enough")

    def keep_lock() -> None:
        if lingering is not None:
            ending.touch()
            sys.setswitchinterval(60)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                pass

    def join() -> None:
        while not ending.exists():
            time.sleep(0.01)
        dist.all_reduce(torch.ones(1))

    atexit.register(keep_lock)
    at_step(begin, rank=0, step=1)
    at_step(join, rank=1, step=1)


FAULTS = {
    "kills": kills,
    "hang": hang,
    "full-disk": full_disk,
    "mistake": mistake,
    "vanish": vanish,
    "long-fit": long_fit,
    "killed-fit": killed_fit,
    "late-sum": late_sum,
}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name == "fault":
        FAULTS[arguments[0]]()
        sys.argv[1:] = arguments[1:]
        cli.run()
    videos, broken, out = map(Path, arguments)
    with distributed.session():
        if distributed.rank() > 0:
            forbid_writing(out)
        work(videos, broken, out)
        if (out / "resumed").exists():
            resume(videos, out)
    distributed.leave(0)
