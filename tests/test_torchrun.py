"""Several processes under torchrun: the results of one, whatever dies on the way.

Every process here computes with one thread: the number of threads decides the order of sums.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch.distributed import TCPStore

from hdc import checkpoint
from hdc.data.manifest import read_manifest
from hdc.data.synthetic import make_dataset

TRAIN = [
    "--backbone=tiny",
    "--clips.size=32",
    "--augment.crop_size=28",
    "--batch_size=8",
    "--epochs=2",
    "--optimizer.lr=1e-6",
    "--log_every=1",
    "--checkpoint_every=1",
    "--device=cpu",
]

PROBE = ["--backbone=tiny", "--clips.size=32", "--crop_size=28", "--device=cpu"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 5 test videos in UCF101's layout."""
    root = tmp_path_factory.mktemp("videos")
    make_dataset(root, train=20, test=5, seed=0)
    return root


@pytest.fixture(scope="module")
def broken(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a training video cut short."""
    root = tmp_path_factory.mktemp("broken") / "videos"
    shutil.copytree(videos, root)
    file = read_manifest(root / "manifest.csv").rows("train", 1).file(3)
    file.write_bytes(file.read_bytes()[:300])
    return root


def torchrun(
    processes: int, *arguments: object, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", ranks.__file__]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def one(videos: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ranks.work(videos, broken, out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def two(videos: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    done = torchrun(2, "work", videos, broken, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def three(videos: Path, broken: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Besides, `resumed` is what two ranks did in one epoch, gone on with."""
    out = tmp_path_factory.mktemp("three")
    shutil.copytree(two / "half", out / "resumed")
    done = torchrun(3, "work", videos, broken, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(params=["two", "three"])
def several(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def losses(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "clips_per_second"} for line in lines]


def assert_same_losses(ours: Path, theirs: Path) -> None:
    for our, their in zip(losses(ours), losses(theirs), strict=True):
        assert our.keys() == their.keys()
        for name, value in their.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert our[name] == same


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / checkpoint.FILE, weights_only=True)


def momentum(run: Path) -> torch.Tensor:
    buffers = state(run)["optimizer"]["state"].values()
    return torch.cat([buffer["momentum_buffer"].flatten() for buffer in buffers])


def assert_equal_weights(ours: Path, theirs: Path) -> None:
    first, second = state(ours)["model"], state(theirs)["model"]
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(momentum(ours), momentum(theirs))


@pytest.mark.parametrize("run", ["pretrain", "pretrain-3", "block3", "finetune"])
def test_same_training(run: str, one: Path, several: Path) -> None:
    """Every logged value, and the momentum, which sums the gradients of all steps.

    Measured: values to 3e-6, the momentum to 2e-5 of its norm (3e-4 for batches of 3 clips). The rate is
    tiny on purpose. At the paper's, rounding errors grow fiftyfold from one step to the next, with another
    number of threads as with another number of ranks.
    """
    assert_same_losses(several / run, one / run)
    difference = (momentum(several / run) - momentum(one / run)).norm() / momentum(one / run).norm()
    assert difference < 2e-3
    assert state(several / run)["unreadable"] == state(one / run)["unreadable"]


def test_checkpoints_know_nothing_of_ranks(one: Path, several: Path) -> None:
    ours, theirs = state(several / "finetune"), state(one / "finetune")
    assert ours.keys() == theirs.keys()
    assert ours["model"].keys() == theirs["model"].keys()
    folders = [str(several), str(one)]
    configs = [
        str(s["config"]).replace(f, "") for s, f in zip((ours, theirs), folders, strict=True)
    ]
    assert configs[0] == configs[1]


def test_another_number_of_ranks_goes_on(videos: Path, one: Path, two: Path, three: Path) -> None:
    """What two ranks began, three and one go on with."""
    alone = two / "alone"
    shutil.copytree(two / "half", alone / "resumed")
    ranks.resume(videos, alone)
    for run in (three / "resumed", alone / "resumed"):
        assert_same_losses(run, one / "pretrain")


def test_features_have_the_same_bits(one: Path, several: Path) -> None:
    """20 videos in batches of four, one of which cannot be read: no rank has as much as another."""
    expected = torch.load(one / "features-0.pt")
    files = sorted(several.glob("features-*.pt"))
    assert len(files) == (3 if several.name.startswith("three") else 2)
    for found in map(torch.load, files):
        assert torch.equal(found["whole"][0], expected["whole"][0])
        torch.testing.assert_close(found["broken"][0], expected["broken"][0])
        for name in ("whole", "broken"):
            assert found[name][1] == expected[name][1]
        assert found["unreadable"] == expected["unreadable"]


def test_same_evaluation(one: Path, several: Path) -> None:
    for name in ("retrieval.json", "probe.json", "test.json"):
        ours, theirs = (json.loads((out / name).read_text()) for out in (several, one))
        assert ours["environment"].pop("processes") != theirs["environment"].pop("processes")
        own = {"checkpoint": "", "weights_sha256": ""}  # the weights are equal but for rounding
        assert ours | own == theirs | own
    assert len(json.loads((several / "test.json").read_text())["predictions"]) == 5


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the ranks say of an error; torchrun adds a report of its own."""
    text = done.stdout + done.stderr
    assert "[rank" not in text, text  # where torch marks a traceback
    return [line for line in text.splitlines() if line.startswith("hdc-train: ")]


def test_kill_9(videos: Path, three: Path, tmp_path: Path) -> None:
    """Rank 2 in a step, then rank 0 in the middle of a checkpoint: the bits of the undisturbed run."""
    options = [f"--data={videos}", f"--out={tmp_path}", *TRAIN]
    done = torchrun(3, "fault", "kills", "pretrain", *options, restarts=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("restarted by torchrun: going on from step 2") == 2
    assert_equal_weights(tmp_path, three / "pretrain")
    assert losses(tmp_path) == losses(three / "pretrain")


def test_hung_rank_is_named(videos: Path, tmp_path: Path) -> None:
    done = torchrun(2, "fault", "hang", "pretrain", f"--data={videos}", f"--out={tmp_path}", *TRAIN)
    assert done.returncode != 0
    assert said(done) == ["hdc-train: rank 1 hangs: no answer within 5 s"]
    assert state(tmp_path)["step"] == 1


@pytest.mark.parametrize(
    ("fault", "restarts", "message"),
    [
        ("full-disk", 0, "hdc-train: cannot write {}/checkpoint.pt: no space left on device"),
        ("mistake", 1, "hdc-train: something is wrong on this node alone"),
    ],
)
def test_error_is_one_line(
    fault: str, restarts: int, message: str, videos: Path, tmp_path: Path
) -> None:
    """However many ranks there are and however often torchrun starts them; the checkpoint before it stays."""
    options = [f"--data={videos}", f"--out={tmp_path}", *TRAIN]
    done = torchrun(2, "fault", fault, "pretrain", *options, restarts=restarts)
    assert done.returncode != 0
    assert said(done) == [message.format(tmp_path)]
    assert state(tmp_path)["step"] == 1


def test_disk_that_vanishes(videos: Path, tmp_path: Path) -> None:
    """All ranks find the same, that no rank could read anything; the checkpoint before it stays."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(videos, data)
    done = torchrun(2, "fault", "vanish", "pretrain", f"--data={data}", f"--out={out}", *TRAIN)
    assert done.returncode != 0
    (line,) = said(done)
    assert line.startswith(
        "hdc-train: training stopped at step 1: of a batch of 8 videos (batch_size), fewer than 2 can be "
        f"read, e.g. {data}/"
    )
    assert line.endswith(f"; the last good checkpoint is {out}/checkpoint.pt")
    assert state(out)["step"] == 1


def test_rank_0_may_work_long(videos: Path, one: Path, tmp_path: Path) -> None:
    """Twice as long as a rank may be silent elsewhere, in the fit of the linear probe."""
    options = [f"--data={videos}", f"--out={tmp_path}", *PROBE]
    done = torchrun(2, "fault", "long-fit", "probe", *options)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((out / "probe.json").read_text()) for out in (tmp_path, one))
    for name in ("train_accuracy", "test_accuracy"):
        assert ours[name] == theirs[name]


def start_by_hand(processes: int, fault: str, *arguments: str) -> tuple[list[int], list[list[str]]]:
    """As torchrun would, which ends the others of its node if one dies. Exit codes and lines on stderr, by rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, "fault", fault, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    shown = [process.communicate(timeout=120)[1].splitlines() for process in started]
    return [process.returncode for process in started], shown


def test_rank_0_dies_where_it_works_alone(videos: Path, tmp_path: Path) -> None:
    """The others notice, long before ten minutes are over."""
    options = [f"--data={videos}", f"--out={tmp_path}", *PROBE]
    codes, shown = start_by_hand(3, "killed-fit", "probe", *options)
    assert codes == [-signal.SIGKILL, 3, 3]
    lines = [line for lines in shown for line in lines if "hdc-train" in line]
    assert lines == ["hdc-train: rank 0 died"]


def test_sum_that_ends_after_a_rank(videos: Path, tmp_path: Path) -> None:
    """The thread that makes it must not meet an interpreter at its end: that would abort rank 0."""
    options = [f"--data={videos}", f"--out={tmp_path}", *TRAIN]
    codes, shown = start_by_hand(2, "late-sum", "pretrain", *options)
    assert codes == [2, 2]
    assert [line for lines in shown for line in lines if "hdc-train" in line] == [
        "hdc-train: enough"
    ]
